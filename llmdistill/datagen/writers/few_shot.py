"""The teacher answers behind examples of how it should; the trace's prompt is without them.

For small or base teachers, and to give all answers one form. Options: ``examples``, a list of [question, answer].
"""

from llmdistill.datagen.asking import Ask
from llmdistill.datagen.schema import Trace
from llmdistill.datagen.writing import Row, trace
from llmdistill.errors import UserError


async def write(row: Row, ask: Ask) -> list[Trace]:
    examples = ask.options.get("examples")
    if not examples or not all(len(example) == 2 for example in examples):
        raise UserError("writer few_shot has no examples. Fix: options with examples: [[question, answer], ...].")
    shown = [
        {"role": role, "content": str(text)}
        for example in examples
        for role, text in zip(("user", "assistant"), example, strict=True)
    ]
    system = [message for message in row["prompt"] if message["role"] == "system"]
    rest = [message for message in row["prompt"] if message["role"] != "system"]
    return [trace(row, ask, "few_shot", await ask("teacher", [*system, *shown, *rest]))]
