"""The teacher goes on behind a first thought: the row's ``first_thought``, or ``--prefix`` for all.

Changes the course of thoughts ("<think>\\nLet me check small cases first."; with the tag where the model's own thoughts
have one), and is part of the completion: the student learns to begin so by itself.
"""

from llmdistill.datagen.asking import Ask
from llmdistill.datagen.schema import Trace
from llmdistill.datagen.writing import Row, trace
from llmdistill.errors import UserError


async def write(row: Row, ask: Ask) -> list[Trace]:
    prefix = row.get("more", {}).get("first_thought") or ask.options.get("prefix")
    if not prefix:
        raise UserError(
            "writer first_thought has no prefix. Fix: a column first_thought, or --options '{\"prefix\": …}'."
        )
    reply = await ask("teacher", row["prompt"], prefix=str(prefix))
    return [trace(row, ask, "first_thought", str(prefix), reply)]
