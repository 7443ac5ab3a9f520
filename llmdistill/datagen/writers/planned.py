"""The teacher first writes a plan, then answers with the plan before its eyes; the student sees the answer alone.

Options: ``plan_tokens``, the most of a plan (256).
"""

from llmdistill.datagen.asking import Ask
from llmdistill.datagen.schema import Trace
from llmdistill.datagen.writing import Row, trace, with_hint

PLAN = "Before you answer, write down in a few short lines how you would go about it. Do not solve it yet."
FOLLOW = "Go about it like this:\n{plan}"


async def write(row: Row, ask: Ask) -> list[Trace]:
    limit = int(ask.options.get("plan_tokens", 256))
    plan = await ask("teacher", with_hint(row["prompt"], PLAN), max_new_tokens=limit)
    said = plan.text.rpartition("</think>")[2].strip()
    reply = await ask("teacher", with_hint(row["prompt"], FOLLOW.replace("{plan}", said)))
    return [trace(row, ask, "planned", reply, meta={"plan": said})]
