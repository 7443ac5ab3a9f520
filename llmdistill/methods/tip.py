"""TIP: train on the tokens at which the student is unsure or wrong (arXiv 2604.14084, METHODS-2026 9.1.6).

    accelerate launch -m llmdistill.opd --config recipes/tip.yaml

h and d are the student's entropy and KL(S || T), scaled to [0, 1] by the extremes of the *global* batch; the score is
h + d - h d, and the ``keep`` best of all the batch's tokens are trained on with the whole-vocabulary reverse KL. Scores
carry no gradient. One outlier moves the scale; that is the method's, and why it may not depend on how ranks are cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llmdistill.composition.method import Method
from llmdistill.composition.term import Ask, Rows, Term
from llmdistill.objectives.divergences import reverse_kl
from llmdistill.objectives.selection import entropy, extremes, keep_top, tip_scores
from llmdistill.recipe.settings import setting


@dataclass
class Settings:
    """Settings of TIP."""

    keep: float = setting(0.5, "share of the global batch's tokens that is trained on", above=0, at_most=1)


def build(args: Any) -> Method:
    """The reverse KL on the tokens that a survey of the round selects."""
    return Method((Term("divergence", reverse_kl, (Ask("teacher"),), survey=Selection(args.keep)),))


@dataclass(frozen=True)
class Selection:
    """The survey: entropy and divergence of every row, then the best of them, of all processes."""

    keep: float

    def measure(self, student_logits: Tensor, /, *evidence: Tensor) -> dict[str, Tensor]:
        return {"h": entropy(student_logits), "d": reverse_kl(student_logits, evidence[0])}

    def derive(self, rows: Rows) -> Mapping[str, Tensor]:
        h, d = rows.everywhere["h"], rows.everywhere["d"]
        if not len(h):  # every completion was cut off, and those are left out
            return {"weight": h}
        kept = keep_top(tip_scores(h, d, extremes(h, d)), self.keep)
        return {"weight": kept[rows.first : rows.first + len(rows.values["h"])]}
