"""OPSA: a fixed negative advantage on the student's least likely tokens, and no teacher (arXiv 2608.31046).

    accelerate launch -m llmdistill.opd --config recipes/opsa.yaml

The control of every gain on the student's own text (METHODS-2026 9.1.14): of all the batch's tokens the ``fraction``
with the lowest log-prob are pushed down, by ``advantage``, or, with ``strongest``, by as much more as the student is
unsure there. What this reaches too says nothing about the teacher, who is only measured against.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from llmdistill.composition.method import Method
from llmdistill.composition.term import Rows, Term
from llmdistill.objectives.policy import policy_gradient
from llmdistill.objectives.sampler import token_logprobs
from llmdistill.objectives.selection import entropy, opsa_advantages
from llmdistill.recipe.settings import GREEDY, PENALISED, setting


@dataclass
class Settings:
    """Settings of OPSA."""

    fraction: float = setting(0.2, "share of the global batch's tokens that is pushed down", above=0, at_most=1)
    advantage: float = setting(-0.5, "of these tokens, or of the surest of them", below=0)
    strongest: float | None = setting(
        None, "advantage of the least sure of them, by entropy, such as -1; unset: that of all", below=0
    )

    conflicts = (GREEDY, PENALISED)


def build(args: Any) -> Method:
    """One term that hears nobody."""
    loss = partial(policy_gradient, **args.sampler)
    survey = Unlikely(args.fraction, args.advantage, args.strongest)
    reads = ("tokens", "fixed_advantage")
    return Method((Term("pushed_down", loss, (), reads, survey=survey, vanishes=False, on_student=True),))


@dataclass(frozen=True)
class Unlikely:
    """The survey: which tokens of the global batch are the least likely, and their advantages."""

    fraction: float
    weakest: float
    strongest: float | None

    def measure(self, student_logits: Tensor, /, *evidence: Tensor) -> dict[str, Tensor]:
        return {"logprob": token_logprobs(student_logits, evidence[0]), "entropy": entropy(student_logits)}

    def derive(self, rows: Rows) -> Mapping[str, Tensor]:
        logprob, unsure = rows.everywhere["logprob"], rows.everywhere["entropy"]
        if not len(logprob):  # every completion was cut off, and those are left out
            return {"weight": logprob, "fixed_advantage": logprob}
        advantages = opsa_advantages(
            logprob,
            None if self.strongest is None else unsure,
            fraction=self.fraction,
            weakest=self.weakest,
            strongest=self.strongest or self.weakest,
        )
        own = advantages[rows.first : rows.first + len(rows.values["logprob"])]
        return {"weight": (own != 0).to(own.dtype), "fixed_advantage": own}
