"""Divergence-aware selection of traces by their sentences (DASD; METHODS 4.3).

A sentence's probability under a model is the geometric mean of its tokens' (exp of the mean log-prob). Where the
teacher gives it well more than the student does, it is a *teacher sentence*: something the student does not say yet,
and the teacher surely does. Where it is the other way round it is a *student sentence*, else *shared*. A response that
is rich in teacher sentences is preferred under a fixed budget of samples.

The paper names neither the threshold nor the score of a response. Both forms that its text allows are here:

- ``margin`` in probability (p_T - p_S) or, with ``scale="log"``, in nats per token (log p_T - log p_S);
- a response's score is the share of its sentences that are the teacher's (``score="share"``), or the mean difference of
  its sentences on that scale (``score="mean"``).

The teacher's log-probs are those of the tokens it sampled, which a trace carries; the student reads the same text once,
in its own tokens: sentences are spans of characters, so the two need not share a tokenizer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

# A mark that ends a sentence, what closes a bracket or quotation after it, and space; or an end of line. A point within
# a number, a name ("e.g.") or a formula has no space behind it or no capital to follow, which is left alone below.
_END = re.compile(r"(?:[.!?…]+[)\]}\"'”’»*_]*(?=\s)|[。！？]+[」』”’）]*|\n)\s*")
_ABBREVIATED = re.compile(r"(?:\b(?:[A-Za-z]|e\.g|i\.e|etc|vs|cf|Mr|Mrs|Ms|Dr|Prof|St|No|Eq|Fig|approx)|^\s*\d+)\.$")

Scale = Literal["probability", "log"]
Kind = Literal["teacher", "student", "shared"]


def spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of the sentences of a text: they follow one another without gaps, from 0 to its length.

    Space after a sentence belongs to it. An abbreviation ("e.g."), an initial and the number of a list ("1.") end none.
    """
    found: list[tuple[int, int]] = []
    start = 0
    for end in _END.finditer(text):
        if "\n" not in end[0] and _ABBREVIATED.search(text[max(start, end.start() - 12) : end.start() + 1]):
            continue
        if text[start : end.start() + 1].strip():  # empty lines go with the sentence before them
            found.append((start, end.end()))
            start = end.end()
        elif found:
            found[-1] = (found[-1][0], end.end())
            start = end.end()
    if start < len(text):
        found.append((start, len(text)))
    return found


def sentence_logprobs(text: str, tokens: Sequence[tuple[int, int]], logprobs: Sequence[float]) -> list[float]:
    """The mean log-prob per token of each sentence of ``spans(text)``; NaN for one in which no token begins.

    Args:
        text: of the response.
        tokens: (start, end) in characters of each token; a token belongs to the sentence of its first character that is
            no space.
        logprobs: of each token, natural logarithms.

    Raises:
        ValueError: there are not as many log-probs as tokens.
    """
    if len(tokens) != len(logprobs):
        raise ValueError(f"{len(logprobs)} log-probs for {len(tokens)} tokens")
    sentences = spans(text)
    sums, counts = [0.0] * len(sentences), [0] * len(sentences)
    i = 0
    for (start, end), logprob in zip(tokens, logprobs, strict=True):
        start += len(text[start:end]) - len(text[start:end].lstrip()) if text[start:end].strip() else 0
        while i + 1 < len(sentences) and start >= sentences[i][1]:
            i += 1
        if sentences:
            sums[i] += logprob
            counts[i] += 1
    return [total / count if count else math.nan for total, count in zip(sums, counts, strict=True)]


@dataclass(frozen=True)
class Statistics:
    """Of one response.

    Attributes:
        teacher, student, shared: how many sentences are which.
        difference: the mean over sentences of p_T - p_S, or of log p_T - log p_S, as asked.
    """

    teacher: int
    student: int
    shared: int
    difference: float

    @property
    def share(self) -> float:
        """Of teacher sentences."""
        return self.teacher / max(self.teacher + self.student + self.shared, 1)

    def score(self, by: Literal["share", "mean"] = "share") -> float:
        """What responses are compared by."""
        return self.share if by == "share" else self.difference


def statistics(
    teacher: Iterable[float], student: Iterable[float], *, margin: float = 0.1, scale: Scale = "probability"
) -> Statistics:
    """Counts a response's sentences.

    Args:
        teacher, student: mean log-probs of the sentences, as :func:`sentence_logprobs` gives them. One that is NaN on
            either side (no token begins in it) is left out.
        margin: least difference for a sentence to be one side's; of probabilities, or of nats with ``scale="log"``.

    Raises:
        ValueError: ``margin`` is negative, or the two differ in length.
    """
    if margin < 0:
        raise ValueError(f"margin is {margin}; it must not be negative")
    differences = [
        t - s if scale == "log" else math.exp(t) - math.exp(s)
        for t, s in zip(teacher, student, strict=True)
        if not (math.isnan(t) or math.isnan(s))
    ]
    ours, theirs = sum(d > margin for d in differences), sum(d < -margin for d in differences)
    mean = sum(differences) / len(differences) if differences else 0.0
    return Statistics(ours, theirs, len(differences) - ours - theirs, mean)


def select(scores: Sequence[Sequence[float]], *, each: int | None = None, total: int | None = None) -> list[list[int]]:
    """The responses to keep, best first, by prompt.

    Args:
        scores: of each prompt's responses.
        each: the best so many of every prompt, which keeps the prompts' balance; or
        total: the best so many of all, which prefers prompts on which teacher and student differ.

    Raises:
        ValueError: not exactly one of ``each`` and ``total``.
    """
    if (each is None) == (total is None):
        raise ValueError("give one of each and total")
    ranked = [sorted(range(len(s)), key=lambda i, s=s: (-s[i], i)) for s in scores]  # type: ignore[misc]
    if each is not None:
        return [order[:each] for order in ranked]
    best = sorted(((-scores[p][i], p, i) for p, order in enumerate(ranked) for i in order))[:total]
    kept: list[list[int]] = [[] for _ in scores]
    for _, p, i in best:
        kept[p].append(i)
    return kept
