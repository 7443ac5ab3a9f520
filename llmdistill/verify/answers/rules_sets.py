"""Rules for sets of real numbers and for inequalities."""

from __future__ import annotations

from llmdistill.verify.answers import algebra
from llmdistill.verify.answers.algebra import Undecided
from llmdistill.verify.answers.realsets import from_inequality, probes
from llmdistill.verify.answers.terms import Terms, same_trees
from llmdistill.verify.answers.tree import Node, substituted, symbols
from llmdistill.verify.answers.values import Chain, Interval, RealSet, Value


def real_set_rule(gold: RealSet, answer: RealSet, terms: Terms) -> bool:
    """The same intervals, of the same variable where both name one."""
    if gold.variable and answer.variable and gold.variable != answer.variable:
        return False
    if len(gold.intervals) != len(answer.intervals):
        return False
    return all(_interval(a, b, terms) for a, b in zip(gold.intervals, answer.intervals, strict=True))


def _interval(gold: Interval, answer: Interval, terms: Terms) -> bool:
    if (gold.low_open, gold.high_open) != (answer.low_open, answer.high_open):
        return False
    return same_trees(gold.low, answer.low, terms) and same_trees(gold.high, answer.high, terms)


def chain_rule(gold: Chain, answer: Chain, terms: Terms) -> bool:
    """The same sides in the same or the turned order; or two sides with a factor between their differences."""
    for sides, signs in (
        (answer.sides, answer.signs),
        (answer.sides[::-1], tuple(_turn(s) for s in answer.signs[::-1])),
    ):
        if signs == gold.signs and all(
            algebra.same(a, b, may_be_long=terms.may_be_long) for a, b in zip(gold.sides, sides, strict=True)
        ):
            return True
    if len(gold.signs) != 1 or len(answer.signs) != 1:
        return False
    factor = algebra.proportional(_difference(gold), _difference(answer), may_be_long=terms.may_be_long)
    if factor is None:
        return False
    return answer.signs[0] == (gold.signs[0] if factor > 0 else _turn(gold.signs[0]))


def _turn(sign: str) -> str:
    return sign.translate(str.maketrans("<>", "><"))


def _difference(chain: Chain) -> Node:
    return Node("sum", (chain.sides[0], Node("minus", (chain.sides[1],))))


def chain_as_set_rule(gold: Value, answer: Value, terms: Terms) -> bool:
    """An inequality that holds inside of a set and not outside: at its ends, beside them, between them, far away."""
    chain, real = (gold, answer) if isinstance(gold, Chain) else (answer, gold)
    assert isinstance(chain, Chain) and isinstance(real, RealSet)
    if from_inequality(list(chain.sides), list(chain.signs)) is not None:
        return False  # it is a set itself, and compared as one
    names = frozenset().union(*map(symbols, chain.sides))
    if len(names) != 1 or (real.variable and real.variable not in names):
        return False
    if not terms.may_be_long:
        raise Undecided
    tests = probes(real) or []
    (name,) = names
    held = []
    for point, inside in tests:
        truth = _holds(chain, name, point)
        if truth is None or truth != inside:
            return False
        held.append(inside)
    return len(held) > 4


def _holds(chain: Chain, name: str, point: Node) -> bool | None:
    sides = [substituted(side, name, point) for side in chain.sides]
    for a, b, sign in zip(sides, sides[1:], chain.signs, strict=False):
        order = algebra.sign_of_difference(a, b)
        if order is None:
            return None
        if order != 0 and algebra.same(a, b, may_be_long=True):
            order = 0
        if not {"<": order < 0, ">": order > 0, "<=": order <= 0, ">=": order >= 0, "!=": order != 0, "=": order == 0}[
            sign
        ]:
            return False
    return True
