"""Whether a completion's answer is the gold one.

The answer is found by extract.py and compared by answers/equality.py. `judge_quickly` decides what arithmetic of
fractions decides, for many answers at a time; `compare_all` decides the rest, one by one. Both read what a model wrote,
and do it in worker processes with a limit on time and memory (answer_requests.py, workers.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmdistill.verify.answers.algebra import Undecided
from llmdistill.verify.answers.equality import Decision, decide
from llmdistill.verify.answers.notation import tidy, unwrap
from llmdistill.verify.asked import Kind
from llmdistill.verify.extract import Extraction, extract

SHORT = 200


def gold_answer(gold: str) -> str:
    """The answer in a gold: the gold itself, or what a worked solution given in its place states."""
    prose = len(gold) > SHORT and re.search(r"\b[A-Za-z]{3,20} [A-Za-z]{2,20} [A-Za-z]", gold[:2000])
    if prose or "boxed" in gold or "####" in gold:
        return extract(gold).answer or gold
    return gold


def word_in_conclusion(prediction: str, gold: str) -> str | None:
    """A gold that is one word, as the last sentence of an unmarked completion names it; None where it does not.

    The sentence must name no other candidate: no second proper noun, no negation, no comparison.
    """
    word = unwrap(tidy(gold))
    if word in _STATEMENTS:
        return _statement(prediction, word)
    if not re.fullmatch(r"[^\W\d_]{3,30}", word):
        return None
    sentences = [s for s in re.split(r"(?<=[.!?])\s+|\n+", prediction[-4000:].strip()) if s.strip()]
    if not sentences:
        return None
    last = re.sub(r"[*_`$\\]", "", sentences[-1])
    words = re.findall(r"[^\W\d_]+(?:['’]\w+)?", last)
    if sum(w.lower() == word.lower() for w in words) != 1:
        return None
    if re.search(
        r"\b(?:not|no|nor|neither|rather|instead|unless|whether|either|or|than|but|if|cannot)\b|n['’]t\b", last, re.I
    ):
        return None
    # "Navin from Mauritius": the place is no other candidate.
    named = re.sub(r"\b(?:from|of|in|at)\s+[^\W\d_]+", "", last)
    others = [
        w for w in re.findall(r"[^\W\d_]+", named)[1:] if w.istitle() and len(w) > 1 and w.lower() != word.lower()
    ]
    kin = next((kin for kin in _KIN if word.lower() in kin), frozenset())
    if others or any(w.lower() in kin and w.lower() != word.lower() for w in words) or (not kin and not word.istitle()):
        return None
    return word


# Golds that a concluding sentence ends with, and how else they are said.
_STATEMENTS = {
    "does not exist": ("does not exist", "doesn't exist"),
    "no solution": ("no solution", "no solutions", "no real solution", "no real solutions"),
    "no real solutions": ("no solution", "no solutions", "no real solution", "no real solutions"),
    "infinitely many": ("infinitely many", "infinitely many solutions"),
    "infinitely many solutions": ("infinitely many solutions",),
    "cannot be determined": ("cannot be determined", "can't be determined", "cannot be uniquely determined"),
    "undefined": ("undefined", "not defined"),
    r"\infty": ("infinity", "infinite"),
    r"-\infty": ("negative infinity", "minus infinity"),
}


def _statement(prediction: str, gold: str) -> str | None:
    """The gold, where the last sentence of a completion ends in it and turns it round in no way."""
    sentences = [s for s in re.split(r"(?<=[.!?])\s+|\n+", prediction[-4000:].strip()) if s.strip()]
    last = re.sub(r"[*_`$\\]", "", sentences[-1]).lower().rstrip(" .!") if sentences else ""
    for words in _STATEMENTS[gold]:
        before = last.removesuffix(words) if last.endswith(words) else last.removesuffix(f"{words} exist")
        if before != last and not re.search(
            r"\b(?:not|no|never|neither|whether|if|or|negative|minus)\b|n['’]t\b", before
        ):
            return gold
    return None


_KIN = [
    frozenset(words.split())
    for words in (
        "north south east west northeast northwest southeast southwest",
        "monday tuesday wednesday thursday friday saturday sunday",
        "january february march april may june july august september october november december",
        "red orange yellow green blue purple violet black white brown pink gray grey",
        "even odd neither both", "yes no", "true false", "increasing decreasing constant",
        "circle ellipse parabola hyperbola line point plane sphere cone cylinder", "left right up down",
    )
]  # fmt: skip


def quickly(gold: str, answer: str, *, kind: Kind = "math", tolerance: float | None = None) -> Decision | None:
    """The verdict on two answers by rules that are bounded in time; None where algebra must decide."""
    if len(gold) > SHORT or len(answer) > SHORT:
        return Decision(True, "same text") if gold.strip() == answer.strip() != "" else None
    try:
        return decide(gold, answer, choice=kind == "choice", may_be_long=False, tolerance=tolerance)
    except Undecided:
        return None


def thoroughly(gold: str, answer: str, *, kind: Kind = "math", tolerance: float | None = None) -> Decision:
    """The verdict on two answers by every rule there is. For worker processes."""
    return decide(gold, answer, choice=kind == "choice", tolerance=tolerance)


@dataclass(frozen=True)
class Found:
    """What judging one completion came to. The decision is None where there was no answer, or none could be taken."""

    extraction: Extraction
    decision: Decision | None


def find(prediction: str, gold: str, *, kind: Kind, last_number: bool) -> Extraction:
    """The answer of a completion. The gold matters only where it is a word and the completion has no marked answer."""
    extraction = extract(prediction, kind=kind, last_number=last_number)
    if last_number and extraction.stage in ("last_number", "last_math", "conclusion", "none"):
        word = word_in_conclusion(prediction, gold_answer(gold))
        if word is not None:
            return Extraction(word, "concluding_word")
    return extraction


def judge_quickly(prediction: str, gold: str, *, kind: Kind, last_number: bool, tolerance: float | None) -> Found:
    """Extraction and, where there is an answer and the rules that are bounded suffice, the verdict."""
    extraction = find(prediction, gold, kind=kind, last_number=last_number)
    if extraction.answer is None or extraction.parts:
        return Found(extraction, None)
    return Found(extraction, quickly(gold_answer(gold), extraction.answer, kind=kind, tolerance=tolerance))


def compare_all(
    gold: str,
    answer: str,
    parts: tuple[str, ...] = (),
    *,
    kind: Kind = "math",
    tolerance: float | None = None,
    both_ways: bool = False,
) -> Decision:
    """The verdict on an answer that may have stood in several boxes. May hang: for worker processes only.

    Boxes in a row are the elements of one answer, or one answer said twice ("\\boxed{9 6/7} or \\boxed{69/7}").
    """
    gold = gold_answer(gold)
    decision = thoroughly(gold, answer, kind=kind, tolerance=tolerance)
    if not decision.equal and both_ways:
        decision = thoroughly(answer, gold, kind=kind, tolerance=tolerance)
    if not decision.equal and parts:
        each = [thoroughly(gold, part, kind=kind, tolerance=tolerance) for part in parts]
        if all(one.equal for one in each):
            return each[-1]
    return decision
