"""What worker processes do with answers (workers.py): all reading of a model's text, and all comparing.

A request is {"items": [...]} and its reply {"replies": [...]}, one for each item, whose "do" names one of ``_WORK``.
Items that go together take the limits of one call together, so who asks sends them again one by one where that failed.
"""

from __future__ import annotations

from typing import Any

from llmdistill.verify import equal
from llmdistill.verify.asked import LONGEST_ANSWER

Item = dict[str, Any]
SHOWN = 200  # characters of an answer that is too long


def reply_to(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to the items of one request."""
    return {"replies": [_WORK[item["do"]](item) for item in request["items"]]}


def _find(item: Item) -> Item:
    """The answer of a completion, and the verdict where plain rules have one: "equal" is None where they have none."""
    gold = item["gold"]
    found = equal.judge_quickly(
        item["prediction"],
        gold,
        kind=item["kind"],
        last_number=item["last_number"],
        tolerance=item["tolerance"],
    )
    extraction, decision = found.extraction, found.decision
    reply = {"answer": extraction.answer, "stage": extraction.stage, "parts": extraction.parts}
    if decision is not None:
        return {**reply, "equal": decision.equal, "rule": decision.rule}
    if extraction.answer is not None and max(len(extraction.answer), len(gold)) > LONGEST_ANSWER:
        rule = f"longer than {LONGEST_ANSWER} characters"
        return {**reply, "answer": extraction.answer[:SHOWN], "parts": (), "equal": False, "rule": rule}
    return {**reply, "equal": None, "rule": ""}


def _compare(item: Item) -> Item:
    """The verdict on an answer, by every rule there is."""
    parts, both_ways = tuple(item["parts"]), item.get("both_ways", False)
    decision = equal.compare_all(
        item["gold"], item["answer"], parts, kind=item["kind"], tolerance=item["tolerance"], both_ways=both_ways
    )
    return {"equal": decision.equal, "rule": decision.rule}


def _plainly(item: Item) -> Item:
    """Whether two answers say the same, by plain rules: None where these cannot tell."""
    gold, answer = item["gold"], item["answer"]
    decision = equal.quickly(gold, answer, kind=item["kind"])
    if decision is None:
        return {"equal": False if max(len(gold), len(answer)) > LONGEST_ANSWER else None}
    return {"equal": decision.equal}


_WORK = {"find": _find, "compare": _compare, "plainly": _plainly}
