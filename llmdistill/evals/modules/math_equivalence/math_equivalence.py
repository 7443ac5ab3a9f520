"""Share of completions whose answer is mathematically the reference's, as a module of the ``evaluate`` library."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate


class MathEquivalence(evaluate.Metric):
    """compute(predictions=[completion, ...], references=[gold, ...]) -> {"math_equivalence": share right}."""

    def _info(self) -> Any:
        return evaluate.MetricInfo(
            description="Share of completions whose final answer equals the reference (1/2 = 0.5 = \\frac12).",
            citation="",
            inputs_description="predictions: completions. references: right answers.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str], verdicts: bool = False) -> dict[str, Any]:
        """With ``verdicts`` the list of them too."""
        from llmdistill.verify.asked import Asked
        from llmdistill.verify.math import judge_answers

        asked = [Asked(p, gold) for p, gold in zip(predictions, references, strict=True)]
        passed = [verdict.passed for verdict in judge_answers(asked)]
        share = {"math_equivalence": sum(passed) / len(passed)}
        return {**share, "verdicts": passed} if verdicts else share
