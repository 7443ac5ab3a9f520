"""Accuracy of the majority answer among k of n completions, as a module of the ``evaluate`` library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate


class MajAtK(evaluate.Metric):
    """compute(predictions=[[completion] * n] * P, references=[gold] * P, k=[8]) -> {"maj_at_8": ...}.

    Answers vote by mathematical equivalence, not by string. ``ties`` is that of ``llmdistill.evals.metrics.maj_at_k``.
    """

    def _info(self) -> Any:
        return evaluate.MetricInfo(
            description="Chance that the most frequent answer of k completions is right, mean over problems.",
            citation="Wang et al. 2022, Self-Consistency Improves Chain of Thought Reasoning, arXiv:2203.11171",
            inputs_description="predictions: n completions per problem. references: right answers. k: list of draws; "
            "all n when left out. ties: 'expected' or 'first'.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("string")),
                    "references": datasets.Value("string"),
                }
            ),
        )

    def _compute(
        self,
        predictions: list[list[str]],
        references: list[str],
        k: Sequence[int] | int | None = None,
        ties: Any = "expected",
    ) -> dict[str, float]:
        """k: one or several, each at most the number of completions of every problem."""
        from llmdistill.evals.metrics import maj_at_k

        votes = [_vote(completions, gold) for completions, gold in zip(predictions, references, strict=True)]
        if k is None:
            k = min(len(classes) for classes, _ in votes)
        ks = [k] if isinstance(k, int) else k
        return {
            f"maj_at_{each}": sum(maj_at_k(classes, right, each, ties=ties) for classes, right in votes) / len(votes)
            for each in ks
        }


def _vote(completions: list[str], gold: str) -> tuple[list[int | None], list[bool]]:
    """Class of each completion's answer, numbered by first appearance, and its verdict."""
    from llmdistill.verify.asked import Asked
    from llmdistill.verify.math import equivalent, judge_answers

    first: list[str] = []
    classes: list[int | None] = []
    right: list[bool] = []
    for verdict in judge_answers([Asked(completion, gold) for completion in completions]):
        right.append(verdict.passed)
        answer = verdict.extracted
        if answer is None:
            classes.append(None)
            continue
        same = next((i for i, other in enumerate(first) if other == answer or equivalent(other, answer)), len(first))
        if same == len(first):
            first.append(answer)
        classes.append(same)
    return classes, right
