"""The teacher answers with a hint or the solution before its eyes; the trace's prompt is without it.

For prompts that the teacher alone is too seldom right on. Rows have a column ``hint`` or ``solution``; ``words`` among
the options replaces the text around it.
"""

from llmdistill.datagen.asking import Ask
from llmdistill.datagen.calls import Unanswerable
from llmdistill.datagen.schema import Trace
from llmdistill.datagen.writing import Row, trace, with_hint

WORDS = (
    "Here is what the right solution looks like. Use it to find your own way there, and write as if you had not seen "
    "it:\n{hint}"
)


async def write(row: Row, ask: Ask) -> list[Trace]:
    hint = row.get("more", {}).get("hint") or row.get("solution") or row.get("answer")
    if not hint:
        raise Unanswerable("no hint, solution or answer to show the teacher")
    seen = with_hint(row["prompt"], ask.options.get("words", WORDS).replace("{hint}", str(hint)))
    return [trace(row, ask, "privileged", await ask("teacher", seen), meta={"hint": str(hint)})]
