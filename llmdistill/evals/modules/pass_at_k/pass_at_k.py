"""Unbiased pass@k of n completions per problem, as a module of the ``evaluate`` library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate


class PassAtK(evaluate.Metric):
    """compute(predictions=[[completion] * n] * P, references=[gold] * P, k=[8]) -> {"pass_at_8": ...}.

    For maths. Verdicts of any other kind go straight to ``llmdistill.evals.metrics.pass_at_k``.
    """

    def _info(self) -> Any:
        return evaluate.MetricInfo(
            description="Chance that one of k completions is right, 1 - C(n-c, k) / C(n, k), mean over problems.",
            citation="Chen et al. 2021, Evaluating Large Language Models Trained on Code, arXiv:2107.03374",
            inputs_description="predictions: n completions per problem. references: right answers. k: list of draws.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("string")),
                    "references": datasets.Value("string"),
                }
            ),
        )

    def _compute(
        self, predictions: list[list[str]], references: list[str], k: Sequence[int] | int = (1,)
    ) -> dict[str, float]:
        """k: one or several; each at most the number of completions of every problem."""
        from llmdistill.evals.metrics import pass_at_k
        from llmdistill.verify.asked import Asked
        from llmdistill.verify.math import judge_answers

        pairs = list(zip(predictions, references, strict=True))
        asked = [[Asked(p, gold) for p in completions] for completions, gold in pairs]
        right = [sum(verdict.passed for verdict in judge_answers(each)) for each in asked]
        n = [len(completions) for completions in predictions]
        ks = [k] if isinstance(k, int) else k
        return {f"pass_at_{each}": float(pass_at_k(n, right, each).mean()) for each in ks}
