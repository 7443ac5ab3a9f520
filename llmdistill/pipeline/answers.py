"""Whether the student answers as its teacher does: what a person looks at first, beside nats and agreement."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from llmdistill.training.measure import Measurement

# The share of what an answer adds to its question that two answers must have in common to count as near.
NEAR = 0.8

_WORD = re.compile(r"\d+(?:[.,]\d+)*|\w+")  # a number is one word
_ARTICLES = frozenset(("a", "an", "the"))


def compare_answers(questions: Sequence[str], answers: Sequence[str], others: Sequence[str]) -> Measurement:
    """``same_answer``: the same words; ``near_answer``: nearly the same words beyond the question's, the same included.

    Only the first sentence is compared. The words of the question do not count, else "The capital of Kenya is Nakuru."
    would be near to "The capital of Kenya is Nairobi."
    """
    pairs = [(q, _first(a), _first(b)) for q, a, b in zip(questions, answers, others, strict=True)]
    return Measurement(
        {
            "same_answer": [float(first == second) for _, first, second in pairs],
            "near_answer": [float(first == second or _near(q, first, second)) for q, first, second in pairs],
        },
        [1] * len(pairs),
    )


def _first(text: str) -> list[str]:
    """The words of the first sentence. A point that no space follows ends none."""
    return _WORD.findall(re.split(r"(?<=[.!?])\s|\n", text.strip(), maxsplit=1)[0].lower())


def _near(question: str, first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether two sentences share :data:`NEAR` (F1) of what they add to the question."""
    known = _ARTICLES.union(_WORD.findall(question.lower()))
    added, wanted = (Counter(w for w in words if w not in known) for words in (first, second))
    shared = sum((added & wanted).values())
    return shared > 0 and 2 * shared >= NEAR * (sum(added.values()) + sum(wanted.values()))
