r"""Whether two expressions are equal.

Closed expressions are compared as fractions, where they are some, else to 400 digits. Functions are compared at points
that are drawn from the symbols' names: exactly where all is rational, else to 50 digits. Two analytic functions that
agree at a dozen unrelated points are the same one (Schwartz-Zippel and its kin), and one point where they differ
decides.

A point where a side is no real number says nothing: \sqrt a\sqrt b and \sqrt{ab} agree where both are. Symbols that
stand to an odd power in a monomial under an even root, in a logarithm, or to a power that is not whole are quantities,
and positive: so \sqrt{ab}/b is \sqrt{a/b}, while |x| is not x.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache, partial
from itertools import product
from typing import Any

from llmdistill.verify.answers.evaluate import Inexact, Numeric, Point, TooLarge, Undefined, coordinate, exact
from llmdistill.verify.answers.tree import CONSTANTS, Node, all_symbols, operations, symbols, walk

ENOUGH = 3  # points at which both sides are defined
_POINTS = [
    (0, 1, False), (1, 4, False), (0, 2, True), (2, 9, True), (0, 1, False), (1, 3, True), (4, 20, False), (0, 1, True),
    (1, 4, False), (0, 3, True), (9, 40, False), (0, 9, True),
]  # fmt: skip
_PRECISE = 400
MOST_EXTRA = 5_000  # digits; numbers that take more are different
PLACES = 6  # from so many on, a decimal stands for the number it rounds


class Undecided(Exception):
    """Algebra that may take long, asked for where it may not."""


def same(gold: Node, answer: Node, *, may_be_long: bool) -> bool:
    """Whether two expressions are equal wherever both are defined.

    Raises:
        Undecided: it takes more than arithmetic of fractions, and ``may_be_long`` is not set.
    """
    if gold == answer:
        return True
    infinite = _infinity(gold), _infinity(answer)
    if infinite[0] or infinite[1]:
        return infinite[0] == infinite[1]
    names = symbols(gold) | symbols(answer)
    if not names:
        return _same_number(gold, answer, may_be_long)
    return _same_function(gold, answer, names, may_be_long)


def _infinity(tree: Node) -> int:
    if tree.op == "minus":
        return -_infinity(tree.args[0])
    return int(tree.op == "infinity")


# Closed expressions


def rational(tree: Node, most_bits: int = 20_000) -> Fraction | None:
    """The value as a fraction, if it is one that can be computed without ado."""
    try:
        return exact(tree, {}, most_bits)
    except (Inexact, TooLarge, Undefined, ValueError, ZeroDivisionError):
        return None


def _same_number(gold: Node, answer: Node, may_be_long: bool) -> bool:
    bits = 2_000_000 if may_be_long else 20_000
    values = rational(gold, bits), rational(answer, bits)
    if values[0] is not None and values[1] is not None:
        return values[0] == values[1]
    if not may_be_long:
        raise Undecided
    return any(_equal_at(gold, answer, {}, base, real=False, closed=True) for base in _log_bases(gold, answer))


def _log_bases(*trees: Node) -> tuple[str, ...]:
    bare = any(node.op == "log" and len(node.args) == 1 for tree in trees for node in walk(tree))
    return ("e", "10") if bare else ("e",)


_of_thread = threading.local()


def _numeric(digits: int, base: str, real: bool, applied: bool) -> Numeric:
    made: dict[tuple[int, str, bool, bool], Numeric] = _of_thread.__dict__.setdefault("made", {})
    key = (digits, base, real, applied)
    if key not in made:
        made[key] = Numeric(digits, base, real, applied)
    return made[key]


def _equal_at(
    gold: Node, answer: Node, at: dict[str, Fraction], base: str, *, real: bool, closed: bool, applied: bool = True
) -> bool:
    """Whether the values agree: relatively, and where both vanish, at more digits.

    Raises:
        Undefined: a side has no value here.
    """
    extra = _extra_digits(gold, answer)
    if extra > MOST_EXTRA:
        if closed:
            return False
        raise Undefined
    for digits in (50 + extra, 120 + extra, _PRECISE + extra):
        numeric = _numeric(digits, base, real, applied)
        try:
            a, b = numeric.value(gold, at), numeric.value(answer, at)
        except TooLarge as error:
            if closed:
                return False
            raise Undefined from error
        except Undefined:
            if closed:
                return False
            raise
        size = max(abs(a), abs(b))
        if size <= numeric.mp.mpf(10) ** (-int(0.8 * (digits - extra)) - extra):
            continue  # both vanish, or are cancelled to noise
        last = digits == _PRECISE + extra
        if abs(a - b) > size * numeric.mp.mpf(10) ** -(digits - 60 if last else (digits - extra) // 2 + extra):
            return False
        if not closed:
            return True
    return True


@lru_cache(4096)
def _magnitude(tree: Node) -> int:
    """The digits by which the numbers in a tree are very large or very small: 60 of x + 10^-60."""
    value = None if symbols(tree) else rational(tree)
    if value is not None:
        bits = max(value.numerator.bit_length(), value.denominator.bit_length())
        return bits * 3 // 10 if bits > 30 else 0
    return sum(map(_magnitude, tree.args))


def _extra_digits(*trees: Node) -> int:
    """The digits beyond the usual ones that numbers of this size take, in steps of 50."""
    return -(-sum(map(_magnitude, trees)) // 50) * 50


# Functions


def whole_symbols(*trees: Node) -> set[str]:
    """Symbols that count something: under factorials and floors, in bounds of sums, in powers of negative numbers."""
    found: set[str] = set()
    for tree in trees:
        for node in walk(tree):
            if node.op in ("factorial", "double_factorial", "binomial", "permutations", "gcd", "lcm"):
                found |= symbols(node)
            elif node.op in ("floor", "ceiling"):
                found |= {name for name in symbols(node) if name[0] in "nmkpqNMK"}
            elif node.op in ("series", "product_over"):
                found |= symbols(node.args[1]) | symbols(node.args[2])
            elif (
                node.op == "power"
                and node.args[0].op == "minus"
                or node.op == "power"
                and node.args[0].op in ("number", "symbol")
                and node.args[0].name == "i"
            ):
                found |= symbols(node.args[1])
    return found


def positive_symbols(*trees: Node) -> set[str]:
    found: set[str] = set()
    for tree in trees:
        for node in walk(tree):
            if (
                node.op == "root"
                and node.args[1].value is not None
                and node.args[1].value % 2 == 0
                or node.op in ("ln", "log", "log10")
                or node.op == "power"
                and not _is_whole(node.args[1])
            ):
                found |= _quantities(node.args[0])
    return found


def _is_whole(tree: Node) -> bool:
    value = rational(tree)
    return value is not None and (value.denominator == 1 or value.denominator % 2 == 1)


def _quantities(tree: Node) -> set[str]:
    """The symbols of a monomial in which some stands to an odd power; none of anything else."""
    powers = _monomial(tree)
    return set(powers) if powers and any(power % 2 for power in powers.values()) else set()


def _monomial(tree: Node) -> dict[str, Fraction] | None:
    if tree.op == "symbol":
        return {tree.name: Fraction(1)} if tree.name not in CONSTANTS else {}
    if not symbols(tree):
        return {}
    if tree.op in ("product", "quotient"):
        parts = [_monomial(arg) for arg in tree.args]
        if parts[0] is None or parts[1] is None:
            return None
        sign = 1 if tree.op == "product" else -1
        return {n: parts[0].get(n, Fraction(0)) + sign * parts[1].get(n, Fraction(0)) for n in parts[0] | parts[1]}
    if tree.op == "power":
        base, exponent = _monomial(tree.args[0]), rational(tree.args[1])
        if base is None:
            return None
        return {n: p * (exponent if exponent is not None else 1) for n, p in base.items()}
    return None


def points(names: frozenset[str], *trees: Node) -> Iterator[dict[str, Fraction]]:
    whole, positive = whole_symbols(*trees), positive_symbols(*trees)
    rounded = {
        name for tree in trees for node in walk(tree) if node.op in ("floor", "ceiling") for name in symbols(node)
    }
    for number, (low, high, signed) in enumerate(_POINTS):
        yield {
            name: coordinate(
                name,
                number,
                low,
                high,
                name in whole or (name in rounded and number % 3 == 1),
                signed and name not in positive,
            )
            for name in names
        }


def _same_function(gold: Node, answer: Node, names: frozenset[str], may_be_long: bool) -> bool:
    drawn = list(points(names, gold, answer))
    with suppress(Inexact, TooLarge):
        return _agree(drawn, lambda at: exact(gold, at) == exact(answer, at))
    if not may_be_long:
        raise Undecided
    ops = operations(gold, answer)
    real = "i" not in all_symbols(gold) | all_symbols(answer)
    readings = [True]
    if "unknown" in ops:
        applied = {node.name for tree in (gold, answer) for node in walk(tree) if node.op == "unknown"}
        if applied & names:
            readings.append(False)  # h(x - h) beside an h that stands alone is a product

    def equal_at(at: Point, base: str, applied: bool) -> bool:
        return _equal_at(gold, answer, dict(at), base, real=real, closed=False, applied=applied)

    return any(
        _agree(drawn, partial(equal_at, base=base, applied=applied))
        for base, applied in product(_log_bases(gold, answer), readings)
    )


def _agree(drawn: list[dict[str, Fraction]], equal_at: Any) -> bool:
    agreed = 0
    for at in drawn:
        try:
            if not equal_at(at):
                return False
            agreed += 1
        except Undefined:
            continue
    return agreed >= ENOUGH


# Decimals


def decimal_places(tree: Node) -> int | None:
    """The digits after the point of a tree that is one decimal, with its sign; None of any other."""
    if tree.op == "minus":
        return decimal_places(tree.args[0])
    return tree.places if tree.op == "number" else None


def rounds_to(decimal: Node, other: Node, *, may_be_long: bool) -> bool:
    """Whether a decimal of ``PLACES`` places or more is a number rounded, or cut off, at its last place."""
    places, value = decimal_places(decimal), rational(decimal)
    if places is None or places < PLACES or value is None or symbols(other):
        return False
    unit = Fraction(1, 10 ** min(places, 12))
    if abs(value) < unit * 10**4:
        return False  # not five digits that agree
    known = rational(other)
    if known is None:
        if not may_be_long:
            raise Undecided
        with suppress(Undefined, TooLarge):
            numeric = _numeric(50, "e", False, True)
            number = numeric.value(other, {})
            if numeric.mp.im(number) == 0:
                known = Fraction(int(numeric.mp.nint(numeric.mp.re(number) * 10**40)), 10**40)
    if known is None:
        return False
    theirs = decimal_places(other)
    if theirs is not None and theirs <= places and places <= 12:
        return False  # two decimals of which the longer is not the shorter
    return abs(known - value) <= unit / 2 or 0 <= (abs(known) - abs(value)) < unit


def within(gold: Node, answer: Node, tolerance: float) -> bool:
    """Whether two numbers differ by no more than an absolute tolerance."""
    values = [_real_value(tree) for tree in (gold, answer)]
    return None not in values and abs(values[0] - values[1]) <= Fraction(tolerance)  # type: ignore[operator]


def _real_value(tree: Node) -> Fraction | None:
    found = rational(tree)
    if found is None and not symbols(tree):
        with suppress(Undefined, TooLarge):
            numeric = _numeric(50, "e", False, True)
            number = numeric.value(tree, {})
            if numeric.mp.im(number) == 0:
                found = Fraction(int(numeric.mp.nint(numeric.mp.re(number) * 10**40)), 10**40)
    return found


def sign_of_difference(a: Node, b: Node) -> int | None:
    """The sign of a - b of two real numbers; None where they are none."""
    if _infinity(a) or _infinity(b):
        return (_infinity(a) > _infinity(b)) - (_infinity(a) < _infinity(b))
    values = _real_value(a), _real_value(b)
    if values[0] is None or values[1] is None:
        return None
    return (values[0] > values[1]) - (values[0] < values[1])


# Equations


def proportional(gold: Node, answer: Node, *, may_be_long: bool) -> int | None:
    r"""The sign of the factor by which two differences of sides differ; None where they differ by more.

    The factor is a number, or a monomial in symbols that one side divides by (m\,dv/dt + bv = f is dv/dt = -bv/m
    + f/m); the sign of that counts as positive.
    """
    names = symbols(gold) | symbols(answer)
    if not names:
        return None
    if not may_be_long:
        raise Undecided
    ratios: list[tuple[dict[str, Fraction], Any]] = []
    extra = _extra_digits(gold, answer)
    if extra > MOST_EXTRA:
        return None
    numeric = _numeric(50 + extra, "e", "i" not in all_symbols(gold) | all_symbols(answer), True)
    small = numeric.mp.mpf(10) ** -(25 + extra)
    for at in points(names, gold, answer):
        with suppress(Undefined, TooLarge):
            a, b = numeric.value(gold, at), numeric.value(answer, at)
            if abs(a) < small or abs(b) < small:
                return None  # one that is always true, or a point of the curve by chance
            ratios.append((at, a / b))
    if len(ratios) < ENOUGH:
        return None
    divisors = sorted(_divisors(gold) | _divisors(answer))[:3]
    for powers in product((0, 1, -1, 2, -2), repeat=len(divisors)):
        scaled = []
        for at, ratio in ratios:
            for name, power in zip(divisors, powers, strict=True):
                ratio = ratio * (numeric.mp.mpf(at[name].numerator) / at[name].denominator) ** power
            scaled.append(ratio)
        if all(abs(value - scaled[0]) <= small * abs(scaled[0]) for value in scaled):
            return 1 if numeric.mp.re(scaled[0]) > 0 or any(powers) else -1
    return None


def _divisors(tree: Node) -> set[str]:
    found: set[str] = set()
    for node in walk(tree):
        if node.op == "quotient":
            found |= set(_monomial(node.args[1]) or {})
    return found
