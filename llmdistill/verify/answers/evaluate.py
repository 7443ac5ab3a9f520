"""The value of an expression at a point: as a fraction where it is one, else to many digits.

Both are bounded: powers and factorials too large to write down raise ``TooLarge``. What is not a number at a point (a
root of a negative number among real ones, a division by zero) raises ``Undefined``.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from fractions import Fraction
from math import comb, factorial, gcd, isqrt, lcm, perm, prod
from typing import Any

from llmdistill.verify.answers.tree import BINDERS, Node

MOST_BITS = 20_000  # of an exact value that is computed in the caller's process
MOST_TERMS = 400


class Inexact(Exception):
    """Not a rational number."""


class TooLarge(Exception):
    """A value that nobody can write down."""


class Undefined(Exception):
    """No number at this point."""


Point = Mapping[str, Fraction]


def exact(tree: Node, at: Point, most_bits: int = MOST_BITS) -> Fraction:
    """The value as a fraction.

    Raises:
        Inexact, TooLarge, Undefined.
    """
    found = _exact(tree, at, most_bits)
    if max(found.numerator.bit_length(), found.denominator.bit_length()) > 4 * most_bits:
        raise TooLarge
    return found


def _exact(tree: Node, at: Point, bits: int) -> Fraction:
    op = tree.op
    if op == "number":
        assert tree.value is not None
        return tree.value
    if op == "symbol":
        if tree.name in at:
            return at[tree.name]
        raise Inexact
    if op == "sum":
        return sum((_exact(arg, at, bits) for arg in tree.args), Fraction(0))
    if op == "minus":
        return -_exact(tree.args[0], at, bits)
    if op in ("series", "product_over"):
        return _series(tree, at, lambda body, where: _exact(body, where, bits))
    if op in _EXACT:
        values = [exact(arg, at, bits) for arg in tree.args]
        return Fraction(_EXACT[op](bits, *values))
    raise Inexact


def _product(bits: int, *factors: Fraction) -> Fraction:
    return factors[0] * factors[1]


def _quotient(bits: int, top: Fraction, bottom: Fraction) -> Fraction:
    if bottom == 0:
        raise Undefined
    return top / bottom


def _power(bits: int, base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        found = _exact_root(bits, base, Fraction(exponent.denominator))
        return _power(bits, found, Fraction(exponent.numerator))
    if base == 0 and exponent <= 0:
        raise Undefined
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if size > 1 and abs(exponent) * size > bits:
        raise TooLarge
    return base ** int(exponent) if size > 1 or base.denominator > 1 else base ** (int(exponent) % 2 or 2)


def _exact_root(bits: int, radicand: Fraction, index: Fraction) -> Fraction:
    if index.denominator != 1 or not 2 <= index <= 64:
        raise Inexact
    n = int(index)
    if radicand < 0:
        if n % 2 == 0:
            raise Inexact
        return -_exact_root(bits, -radicand, index)
    parts = [_integer_root(part, n) for part in (radicand.numerator, radicand.denominator)]
    return Fraction(parts[0], parts[1])


def _integer_root(value: int, n: int) -> int:
    if n == 2:
        found = isqrt(value)
    else:
        low, high = 0, 1 << (value.bit_length() // n + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle**n <= value else (low, middle - 1)
        found = low
    if found**n != value:
        raise Inexact
    return found


def _integers(*values: Fraction) -> list[int]:
    if any(value.denominator != 1 or value < 0 for value in values):
        raise Undefined
    if any(value > 1_000 for value in values):
        raise TooLarge
    return [int(value) for value in values]


def _round(value: Fraction, up: bool) -> int:
    return -((-value) // 1) if up else value // 1


def _mod(bits: int, *values: Fraction) -> int:
    return gcd(*_integers(*values))


_EXACT: dict[str, Any] = {
    "product": _product,
    "quotient": _quotient,
    "power": _power,
    "root": _exact_root,
    "abs": lambda bits, a: abs(a),
    "floor": lambda bits, a: _round(a, False),
    "ceiling": lambda bits, a: _round(a, True),
    "factorial": lambda bits, n: factorial(_integers(n)[0]),
    "double_factorial": lambda bits, n: prod(range(_integers(n)[0], 0, -2)),
    "binomial": lambda bits, n, k: comb(*_integers(n, k)),
    "permutations": lambda bits, n, k: perm(*_integers(n, k)),
    "gcd": _mod,
    "lcm": lambda bits, *values: lcm(*_integers(*values)),
    "max": lambda bits, *values: max(values),
    "min": lambda bits, *values: min(values),
}


def _series(tree: Node, at: Point, value: Any) -> Any:
    """A sum or a product between whole bounds."""
    index, low, high, body = tree.args
    bounds = [exact(bound, at) for bound in (low, high)]
    if any(bound.denominator != 1 for bound in bounds):
        raise Undefined
    inner = _series_in(body)
    if inner > 1 or bounds[1] - bounds[0] > (20 if inner else MOST_TERMS):
        raise TooLarge
    total: Any = Fraction(0 if tree.op == "series" else 1)
    for k in range(int(bounds[0]), int(bounds[1]) + 1):
        term = value(body, {**at, index.name: Fraction(k)})
        total = total + term if tree.op == "series" else total * term
    return total


def _series_in(tree: Node) -> int:
    return (tree.op in ("series", "product_over")) + sum(map(_series_in, tree.args))


class Numeric:
    """Values to a number of digits. Not to be shared between threads.

    Args:
        digits: of the working precision.
        log_base: what \\log without a base means, 10 or e.
        real: a root of a negative number is no number; else it is the principal complex one.
        applied: whether f(x) is a function that nothing is known of, or f times x.
    """

    def __init__(self, digits: int, log_base: str = "e", real: bool = True, applied: bool = True) -> None:
        import mpmath

        self.mp = mpmath.MPContext()
        self.mp.dps = digits
        self.log_base, self.real, self.applied = log_base, real, applied

    def value(self, tree: Node, at: Point) -> Any:
        """A real or complex number.

        Raises:
            TooLarge, Undefined.
        """
        try:
            found = self._value(tree, at)
        except (ZeroDivisionError, ValueError, OverflowError, MemoryError) as error:
            raise Undefined from error
        if not self.mp.isfinite(found):
            raise Undefined
        return found

    def _value(self, tree: Node, at: Point) -> Any:
        mp, op = self.mp, tree.op
        if op == "number":
            assert tree.value is not None
            return mp.mpf(tree.value.numerator) / tree.value.denominator
        if op == "symbol":
            return self._symbol(tree.name, at)
        if op == "pi":
            return +mp.pi
        if op == "infinity":
            raise Undefined
        if op in BINDERS:
            return self._bound(tree, at)
        if op == "unknown":
            value = self._value(tree.args[0], at)
            return self._unknown(tree.name, value) if self.applied else self._symbol(tree.name, at) * value
        if op in ("factorial", "double_factorial", "binomial", "permutations", "gcd", "lcm", "floor", "ceiling"):
            return self._whole(tree, at)
        values = [self._value(arg, at) for arg in tree.args]
        if op == "sum":
            return mp.fsum(values)
        if op == "power":
            return self._power(tree.args[1], at, *values)
        if op == "root":
            return self._root(*values)
        found = getattr(self, f"_{op}", None)
        if found is not None:
            return found(*values)
        if op in _MPMATH:
            return self._library(_MPMATH[op], values[0])
        raise Undefined

    def _bound(self, tree: Node, at: Point) -> Any:
        """A sum between whole bounds; of integrals, limits and sums without end a functional of the body.

        It is linear, and made of the body's values at points without a pattern: so it is the same for two bodies that
        are, whatever the bound variable's name, and another one for others.
        """
        index, low, high, body = tree.args
        if tree.op in ("series", "product_over") and high.op != "infinity":
            try:
                return _series(tree, at, self._value)
            except Inexact as error:
                raise Undefined from error
        ends = [self._end(bound, at) for bound in (low, high)]
        total, seen = self.mp.mpf(0), 0
        for n in range(_SAMPLES):
            if tree.op in ("series", "product_over"):
                point, weight = ends[0] + n, self.mp.mpf(_drawn(tree.op, n)) / 97
            else:
                point = self.mp.mpf(_drawn("point", n)) / 97 + n
                weight = self.mp.cos(ends[1] * _drawn(tree.op, n))
                if tree.op == "integral":  # from b to a is minus from a to b
                    weight -= self.mp.cos(ends[0] * _drawn(tree.op, n))
            try:
                total += weight * self._value(body, {**at, index.name: _as_fraction(self._real(point))})
                seen += 1
            except (Undefined, ZeroDivisionError):
                continue
        if seen < 4:
            raise Undefined
        return total * _drawn(tree.op + tree.name, 0)

    def _end(self, bound: Node, at: Point) -> Any:
        if bound.op == "infinity" or (bound.op == "minus" and bound.args[0].op == "infinity"):
            return self.mp.mpf(1009 if bound.op == "infinity" else -1013) / 7
        return self._real(self._value(bound, at))

    def _symbol(self, name: str, at: Point) -> Any:
        if name in at:
            return self.mp.mpf(at[name].numerator) / at[name].denominator
        if name == "e":
            return +self.mp.e
        if name == "i":
            return self.mp.mpc(0, 1)
        raise Undefined

    def _whole(self, tree: Node, at: Point) -> Any:
        """What is of whole numbers: exactly, where it can be."""
        try:
            found = exact(tree, at)
            return self.mp.mpf(found.numerator) / found.denominator
        except (Inexact, TooLarge, Undefined):
            values = [self._value(arg, at) for arg in tree.args]
        if tree.op in ("floor", "ceiling"):
            return (self.mp.floor if tree.op == "floor" else self.mp.ceil)(self._real(values[0]))
        if tree.op == "factorial":
            if not 0 <= self._real(values[0]) < 10**6:
                raise TooLarge
            return self.mp.factorial(values[0])
        if tree.op == "binomial":
            if abs(values[0]) > 10**6:
                raise TooLarge
            return self.mp.binomial(*values)
        raise Undefined

    def _real(self, value: Any) -> Any:
        if self.mp.im(value) != 0:
            raise Undefined
        return self.mp.re(value)

    def _minus(self, value: Any) -> Any:
        return -value

    def _product(self, a: Any, b: Any) -> Any:
        return a * b

    def _cross(self, a: Any, b: Any) -> Any:
        """Some product of vectors that is turned round with them, and not their inner one."""
        return a * b * self.mp.sin(a - b)

    def _quotient(self, a: Any, b: Any) -> Any:
        return a / b

    def _degrees(self, value: Any) -> Any:
        return value * self.mp.pi / 180

    def _abs(self, value: Any) -> Any:
        return abs(value)

    def _exp(self, value: Any) -> Any:
        if abs(value) > 10**8:
            raise TooLarge
        return self.mp.exp(value)

    def _ln(self, value: Any) -> Any:
        if value == 0 or (self.real and self._real(value) < 0):
            raise Undefined
        return self.mp.log(value)

    def _log(self, value: Any, base: Any = None) -> Any:
        if base is None:
            return self._ln(value) / (1 if self.log_base == "e" else self.mp.log(10))
        return self._ln(value) / self._ln(base)

    def _log10(self, value: Any) -> Any:
        return self._ln(value) / self.mp.log(10)

    def _max(self, *values: Any) -> Any:
        return max(map(self._real, values))

    def _min(self, *values: Any) -> Any:
        return min(map(self._real, values))

    def _unknown(self, name: str, value: Any) -> Any:
        """Some function of no pattern, another one for each name."""
        drawn = zlib.crc32(name.encode()) % 997 + 3
        return self.mp.cos(value * drawn / 700 + drawn) + value / drawn

    def _power(self, written: Node, at: Point, base: Any, exponent: Any) -> Any:
        mp = self.mp
        if base == 0:
            if self._real(exponent) <= 0:
                raise Undefined
            return mp.mpf(0)
        if abs(exponent) * max(1, abs(mp.mag(base))) > 10**7:
            raise TooLarge
        if mp.im(exponent) == 0 and mp.im(base) == 0 and base < 0:
            whole = mp.re(exponent)
            if mp.isint(whole):
                return base ** int(whole)
            try:
                fraction = exact(written, at)
            except (Inexact, TooLarge, Undefined):
                fraction = Fraction(1, 2)
            if fraction.denominator % 2:  # an odd root of a negative number is negative
                return (-1) ** fraction.numerator * (-base) ** exponent
            if self.real:
                raise Undefined
        return base**exponent

    def _root(self, radicand: Any, index: Any) -> Any:
        mp = self.mp
        if index == 2:
            if self.real and self._real(radicand) < 0:
                raise Undefined
            return mp.sqrt(radicand)
        if mp.im(radicand) == 0 and radicand < 0 and mp.isint(index) and int(index) % 2:
            return -((-radicand) ** (1 / index))
        if self.real and self._real(radicand) < 0:
            raise Undefined
        return radicand ** (1 / index)

    def _library(self, name: str, value: Any) -> Any:
        if self.mp.mag(value) > 60 if value else False:
            raise TooLarge
        if self.real and name in ("asin", "acos") and abs(self._real(value)) > 1:
            raise Undefined
        return getattr(self.mp, name)(value)


_SAMPLES = 12


def _drawn(word: str, n: int) -> int:
    return zlib.crc32(f"{word}/{n}".encode()) % 89 + 3


def _as_fraction(value: Any) -> Fraction:
    """A sample's place, which need not be exact."""
    return Fraction(int(value * 997), 997) if value != int(value) else Fraction(int(value))


_MPMATH = {
    "sin": "sin", "cos": "cos", "tan": "tan", "cot": "cot", "sec": "sec", "csc": "csc", "sinh": "sinh", "cosh": "cosh",
    "tanh": "tanh", "coth": "coth", "arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot",
    "arcsec": "asec", "arccsc": "acsc", "arcsinh": "asinh", "arccosh": "acosh", "arctanh": "atanh",
}  # fmt: skip


def coordinate(name: str, number: int, low: int, high: int, whole: bool, signed: bool) -> Fraction:
    """A symbol's value at the ``number``-th point: the same on both sides, and without a pattern between symbols."""
    drawn = zlib.crc32(f"{name}/{number}".encode())
    if whole:
        return Fraction(2 + drawn % 11)
    value = Fraction(low * 997 + drawn % ((high - low) * 997) + 1, 997)
    return -value if signed and (drawn >> 20) % 2 else value
