"""Sampled-token distillation with a baseline: the same expected gradient, less variance (vOPD, arXiv 2605.07865).

    accelerate launch -m llmdistill.opd --config recipes/vopd.yaml

A = log T(y) - log S(y) - b for a b that does not depend on y (METHODS-2026 9.1.3). ``kl`` takes b = -KL(S || T) over
the student's ``top_k`` likeliest tokens, which a remote teacher can give; ``optimal`` the best scalar, which needs the
whole row, and with it the exact gradient would cost the same evidence. What either buys is little once student and
teacher are close: at KL .1 they leave 84 and 75 % of the variance, at KL 6 20 % (METHODS-2026 9.0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llmdistill.composition.method import Method
from llmdistill.composition.term import Ask, Term
from llmdistill.objectives.baseline import optimal_baseline, topk_kl_baseline, with_baseline
from llmdistill.recipe.settings import GREEDY, PENALISED, setting


@dataclass
class Settings:
    """Settings of vOPD."""

    baseline: Literal["kl", "optimal"] = setting("kl", "what is taken from the advantage: -KL on a list, or the best b")
    top_k: int = setting(100, "kl: tokens of the student's list", at_least=1, read_by={"baseline": ("kl",)})
    importance_cap: float = setting(5.0, "weigh tokens by min(student/sampler, cap); 0: no", at_least=0)

    conflicts = (GREEDY, PENALISED)


def build(args: Any) -> Method:
    """One term that hears the sampled token, and what the baseline is made of."""
    listed = args.baseline == "kl"
    loss = with_baseline(topk_kl_baseline if listed else optimal_baseline, **args.sampler)
    asks = (Ask("teacher", "sampled"), Ask("teacher", "top_k" if listed else "full"))
    top_k = args.top_k if listed else 0
    term = Term("divergence", loss, asks, top_k=top_k, support="student", on_student=True)
    return Method((term.importance_weighted(args.importance_cap, **args.sampler),))
