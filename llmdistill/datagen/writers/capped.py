"""The student writes within a budget; where it is cut off, the teacher goes on from a point in the second half.

DASD's mixed policy (METHODS 4.3): traces in which a teacher rescues the student's own text, trained on as a whole. The
cut is uniform in the second half of what the student wrote, at the next blank. What the student finished within the
budget teaches nothing new and is left out; ``keep_finished`` among the options keeps it.

Options: ``budget``, tokens of the student (DASD: 1.5 times the teacher's usual length); the sampling's max_new_tokens
where it is not set.
"""

from llmdistill.datagen.asking import Ask
from llmdistill.datagen.schema import Trace
from llmdistill.datagen.writing import Row, chance, trace


async def write(row: Row, ask: Ask) -> list[Trace]:
    budget = int(ask.options.get("budget") or ask.sampling.max_new_tokens)
    begun = await ask("student", row["prompt"], max_new_tokens=budget)
    if begun.finished:
        return [trace(row, ask, "capped", begun)] if ask.options.get("keep_finished") else []
    text = begun.text
    cut = int(len(text) * (1 + chance("cut", row["prompt_id"], ask.sample)) / 2)
    blank = text.find(" ", cut)
    kept = text[: blank if blank >= 0 else cut]
    rest = await ask("teacher", row["prompt"], prefix=kept)
    return [trace(row, ask, "capped", (kept, begun), rest)]
