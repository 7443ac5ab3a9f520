"""Terms weighed by the inverse of their gradients' norms: each pulls as hard as its own weight says (ALM's GradMag)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

from llmdistill.composition.method import Measured, Method, Schedule
from llmdistill.composition.term import Term
from llmdistill.objectives.alm import inverse_norm_weights


class GradientBalance(Schedule):
    """The share of every term, from the norm of its gradient in the global batch of the step before.

    The norm is of the unweighted loss at the hidden states that it reads, which adds up over micro-batches and ranks.
    Before the first step all shares are alike; the authors take the norms of the step itself, at the last layer's
    weights, for which every loss needs a backward pass of its own.
    """

    state: ClassVar[tuple[str, ...]] = ("shares",)
    hears_norms: ClassVar[bool] = True

    def __init__(self, names: Sequence[str]) -> None:
        self.shares = dict.fromkeys(names, 1.0 / len(names))

    def update(self, measured: Measured) -> None:
        known = {name: measured.norms[name] for name in self.shares if measured.norms.get(name, 0.0) > 0}
        if len(known) == len(self.shares):  # what had nothing to count in this step says nothing about the next
            self.shares = dict(zip(known, inverse_norm_weights(list(known.values())), strict=True))

    def numbers(self) -> dict[str, float]:
        return {f"{name}/share": share for name, share in self.shares.items()}

    def weight(self, term: Term) -> float:
        """Of a term now: its own, times its share."""
        return term.weight_now * self.shares[term.name]


def balanced(method: Method) -> Method:
    """The same method with its terms so weighed."""
    balance = GradientBalance([term.name for term in method.terms])
    terms = tuple(replace(term, weight=partial(balance.weight, term)) for term in method.terms)
    return replace(method, terms=terms, schedules={**method.schedules, "balance": balance})
