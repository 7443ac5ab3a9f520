"""Two answers, each revised with the other before its eyes, and a judge who chooses: an example of many calls.

Roles: ``teacher``; ``judge`` and ``opponent`` where they are given, the teacher otherwise. Options: ``rounds`` (1). The
trace is the revised answer that the judge prefers; the other one is in ``meta``.
"""

import asyncio
import re

from llmdistill.datagen.asking import Ask
from llmdistill.datagen.calls import Reply
from llmdistill.datagen.schema import Trace
from llmdistill.datagen.writing import Row, trace, with_hint

REVISE = "Another solver answered:\n{other}\n\nSay what is wrong or better there, then give your own final answer."
CHOOSE = (
    "Two answers to this were given.\n\nAnswer 1:\n{0}\n\nAnswer 2:\n{1}\n\nWhich is right, or better argued? "
    "End with a line that says 1 or 2 and nothing else."
)


async def write(row: Row, ask: Ask) -> list[Trace]:
    prompt = row["prompt"]
    sides = ["teacher", "opponent" if "opponent" in ask.roles else "teacher"]
    answers = await asyncio.gather(*(ask(role, prompt) for role in sides))
    for _ in range(int(ask.options.get("rounds", 1))):
        others = [REVISE.replace("{other}", spoken(answer)) for answer in reversed(answers)]
        asked = zip(sides, others, strict=True)
        answers = await asyncio.gather(*(ask(role, with_hint(prompt, other)) for role, other in asked))
    judge = "judge" if "judge" in ask.roles else "teacher"
    verdict = await ask(judge, with_hint(prompt, CHOOSE.format(*map(spoken, answers))))
    named = re.findall(r"\b[12]\b", verdict.text)
    best = int(named[-1]) - 1 if named else 0
    meta = {"other": answers[1 - best].text, "verdict": verdict.text, "decided": bool(named)}
    return [trace(row, ask, "debate", answers[best], meta=meta)]


def spoken(answer: Reply) -> str:
    """What an answer says in the end, without its thoughts."""
    return answer.text.rpartition("</think>")[2].strip()
