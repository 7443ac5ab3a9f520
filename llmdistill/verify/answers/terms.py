"""What a rule is told, and the comparison of two expressions that all rules share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from llmdistill.verify.answers import algebra
from llmdistill.verify.answers.tree import Node, number
from llmdistill.verify.answers.values import Readings


@dataclass(frozen=True, slots=True)
class Terms:
    """How far a comparison may go.

    Attributes:
        readings: whether two texts' readings are equal, for the parts of an answer.
        may_be_long: whether algebra may be done that takes time; without, it raises ``Undecided``.
        tolerance: how far numbers may be apart, absolute.
    """

    readings: Callable[[Readings, Readings, Terms], bool]
    may_be_long: bool
    tolerance: float | None = None


def same_trees(gold: Node, answer: Node, terms: Terms) -> bool:
    if algebra.same(gold, answer, may_be_long=terms.may_be_long):
        return True
    if terms.tolerance is not None and algebra.within(gold, answer, terms.tolerance):
        return True
    long = terms.may_be_long
    return algebra.rounds_to(answer, gold, may_be_long=long) or algebra.rounds_to(gold, answer, may_be_long=long)


def times(tree: Node, factor: Fraction) -> Node:
    return tree if factor == 1 else Node("product", (tree, number(factor)))
