"""OPD with returns: a token also answers for the divergence that comes after it.

    accelerate launch -m llmdistill.opd --config recipes/returns.yaml

Per-token OPD takes the gradient of KL(S || T) at the places the student came to, and none for having come there
(discount 0, METHODS 2.1). Here token t answers for sum_k discount^(k-t) KL_k behind it as well: its own KL exactly,
from whole distributions, the rest as policy gradient, less a baseline: the batch's other sequences at the same place.
At discount 1 the expected gradient is that of the KL between whole texts (MiniLLM, arXiv 2306.08543, eq. 2). That one
is mode-seeking across tokens, which per-token reverse KL is not: of several right ways the student takes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from llmdistill.composition.method import Method
from llmdistill.composition.term import Ask, Rows, Term
from llmdistill.objectives.divergences import reverse_kl
from llmdistill.objectives.policy import policy_gradient
from llmdistill.objectives.returns import discounted_future, less_others_mean
from llmdistill.recipe.settings import GREEDY, PENALISED, setting


@dataclass
class Settings:
    """Settings of OPD with returns."""

    discount: float = setting(0.9, "what the KL one token later weighs; 0: per-token OPD", at_least=0, at_most=1)
    importance_cap: float = setting(5.0, "weigh tokens by min(student/sampler, cap); 0: no", at_least=0)

    conflicts = (GREEDY, PENALISED)


def build(args: Any) -> Method:
    """One term: the divergence at its token, and the return of what follows."""
    loss = partial(with_return, **args.sampler)
    asks, reads = (Ask("teacher"),), ("tokens", "blame")
    term = Term("divergence", loss, asks, reads, survey=Returns(args.discount), on_student=True)
    return Method((term.importance_weighted(args.importance_cap, **args.sampler),))


def with_return(student_logits: Tensor, teacher_logits: Tensor, token_ids: Tensor, blame: Tensor, **at: Any) -> Tensor:
    """KL(S || T) + sg[blame] log S(y) -> [n]: the cost of a token is a negative advantage."""
    return reverse_kl(student_logits, teacher_logits) + policy_gradient(student_logits, token_ids, -blame, **at)


@dataclass(frozen=True)
class Returns:
    """The survey: the divergence at every token, then what each has behind it, over that of other sequences."""

    discount: float

    def measure(self, student_logits: Tensor, /, *evidence: Tensor) -> dict[str, Tensor]:
        return {"kl": reverse_kl(student_logits, evidence[0])}

    def derive(self, rows: Rows) -> Mapping[str, Tensor]:
        future = discounted_future(rows.everywhere["kl"], rows.counts_everywhere, self.discount)
        blame = less_others_mean(future, rows.counts_everywhere)
        return {"blame": blame[rows.first : rows.first + len(rows.values["kl"])]}
