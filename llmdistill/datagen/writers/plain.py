"""The teacher answers the prompt."""

from llmdistill.datagen.asking import Ask
from llmdistill.datagen.schema import Trace
from llmdistill.datagen.writing import Row, trace


async def write(row: Row, ask: Ask) -> list[Trace]:
    return [trace(row, ask, "plain", await ask("teacher", row["prompt"]))]
