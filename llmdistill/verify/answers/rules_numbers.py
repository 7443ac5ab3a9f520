"""Rules for numbers: quantities, times, ratios, digits in a base, residues, sizes."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from llmdistill.verify.answers import algebra
from llmdistill.verify.answers.terms import Terms, same_trees, times
from llmdistill.verify.answers.tree import Node, operations, walk
from llmdistill.verify.answers.unit_tables import COMPASS, UNITS
from llmdistill.verify.answers.units import Unit, turned
from llmdistill.verify.answers.values import Digits, Quantity, Ratio, Residue, Sizes, Time, Value


def quantity_rule(gold: Quantity, answer: Quantity, terms: Terms) -> bool:
    """Equal values, units taken into account; one that a side leaves out is no difference."""
    if gold.comma and answer.comma:
        return False  # two lists: 330,90 is not 330,9
    if gold.comma or answer.comma:
        value = algebra.rational((answer if gold.comma else gold).tree)
        if value is None or value.denominator == 1:
            return False  # -3,0 is a list where -3 is the answer
    ours, theirs = gold.unit, answer.unit
    if ours is None and theirs is None:
        return same_trees(gold.tree, answer.tree, terms)
    if ours is not None and theirs is not None:
        return _both_units(gold, ours, answer, theirs, terms)
    if ours is not None:
        return _unit_left_out(gold, ours, answer.tree, terms, by_gold=False)
    assert theirs is not None
    return _unit_left_out(answer, theirs, gold.tree, terms, by_gold=True)


def _both_units(gold: Quantity, ours: Unit, answer: Quantity, theirs: Unit, terms: Terms) -> bool:
    if turned(ours.polarity) != turned(theirs.polarity) and not (ours.polarity and theirs.polarity):
        directed, other = (theirs, gold) if turned(theirs.polarity) else (ours, answer)
        if _reversed(directed) and _is_negative(other):
            return _turned_round(gold, ours, answer, theirs, terms)
    if ours.polarity != theirs.polarity and (ours.polarity and theirs.polarity or turned(theirs.polarity)):
        return False
    if ours.words and theirs.words and not (ours.words <= theirs.words or theirs.words <= ours.words):
        return False
    if {unit.dimensions for unit in (ours, theirs)} == _ANGLES:
        sides = [
            Node("degrees", (times(q.tree, unit.factor),)) if unit.dimensions == (("angle", 1),) else q.tree
            for q, unit in ((gold, ours), (answer, theirs))
        ]
        return same_trees(sides[0], sides[1], terms)
    if {unit.dimensions for unit in (ours, theirs)} == {(("sterling", 1),), UNITS["pound"][0]}:
        return UNITS["pound"][1] in (ours.factor, theirs.factor) and same_trees(gold.tree, answer.tree, terms)
    if ours.percent != theirs.percent:
        return False
    if ours.dimensions and theirs.dimensions:
        if _squares(ours) == _squares(theirs) and (ours.dimensions[0][0] == "unit") != (
            theirs.dimensions[0][0] == "unit"
        ):
            return same_trees(gold.tree, answer.tree, terms)  # "square units" for cm^2
        if ours.dimensions != theirs.dimensions:
            return False
        factor = theirs.factor / ours.factor
        return same_trees(gold.tree, times(answer.tree, factor), terms)
    if bool(ours.dimensions) != bool(theirs.dimensions) and (ours.words if not ours.dimensions else theirs.words):
        return False  # 5 cm are no 5 apples
    if ours.count != theirs.count and ours.count and theirs.count:
        return False
    if (gold.totals or answer.totals) and not (ours.dimensions and theirs.dimensions):
        return False
    counts = [ours.count or 1], [theirs.count or 1]
    if counts[0] == counts[1]:
        return same_trees(gold.tree, answer.tree, terms)
    return same_trees(times(gold.tree, Fraction(counts[0][0])), times(answer.tree, Fraction(counts[1][0])), terms)


_ANGLES = {(("angle", 1),), (("radian", 1),)}


def _is_negative(quantity: Quantity) -> bool:
    value = algebra.rational(quantity.tree)
    return value is not None and value < 0


def _reversed(unit: Unit) -> bool:
    """Whether a unit's direction is what a minus says: a loss, a decrease, below; not the south, and no era."""
    return turned(unit.polarity) and not unit.polarity & COMPASS


def _turned_round(gold: Quantity, ours: Unit, answer: Quantity, theirs: Unit, terms: Terms) -> bool:
    """A decrease of 10 % for -10 %."""
    sides = []
    for quantity, unit in ((gold, ours), (answer, theirs)):
        tree = Node("minus", (quantity.tree,)) if turned(unit.polarity) else quantity.tree
        sides.append((Quantity(tree), replace(unit, polarity=frozenset())))
    return _both_units(sides[0][0], sides[0][1], sides[1][0], sides[1][1], terms)


def _is_measured(tree: Node) -> bool:
    """A decimal or a power of ten: a number of physics, behind which C is the coulomb."""
    nodes = list(walk(tree))
    return any(node.places is not None for node in nodes) or any(
        node.op == "power" and node.args[0].value == 10 for node in nodes
    )


def _squares(unit: Unit) -> int:
    """The power of a length, or of a unit of length that is not named; 0 of anything else."""
    return unit.dimensions[0][1] if len(unit.dimensions) == 1 and unit.dimensions[0][0] in ("unit", "length") else 0


def _unit_left_out(quantity: Quantity, unit: Unit, other: Node, terms: Terms, *, by_gold: bool) -> bool:
    """A bare number against one with a unit."""
    if _reversed(unit) and same_trees(Node("minus", (quantity.tree,)), other, terms):
        return not _is_negative(quantity)  # a loss of 5 is -5
    if by_gold and turned(unit.polarity):
        return False
    if not by_gold and unit.polarity & COMPASS:
        return False
    if unit.weak and not by_gold and not _is_measured(quantity.tree):
        return False  # "5 m" for which the answer is 5: m may be a variable
    if quantity.totals:
        return any(same_trees(total, other, terms) for total in quantity.totals)
    if same_trees(quantity.tree, other, terms):
        return True
    if unit.percent:
        return same_trees(times(quantity.tree, Fraction(1, 100)), other, terms)
    if unit.dimensions == (("dollar", 1),) and unit.factor != 1:
        return same_trees(times(quantity.tree, unit.factor), other, terms)  # 50 cents for 0.50
    if unit.count:
        return same_trees(times(quantity.tree, Fraction(unit.count)), other, terms)
    if unit.dimensions == (("angle", 1),) and "pi" in operations(other):
        return same_trees(Node("degrees", (quantity.tree,)), other, terms)
    return False


def time_rule(gold: Time, answer: Time, terms: Terms) -> bool:
    """am and pm are a unit: who leaves them out has said the same time of a twelve-hour clock."""
    if gold.marked and answer.marked:
        return gold.minutes == answer.minutes
    return gold.minutes % 720 == answer.minutes % 720


def hour_rule(gold: Value, answer: Value, terms: Terms) -> bool:
    """2:00 pm for 2."""
    time, quantity = (gold, answer) if isinstance(gold, Time) else (answer, gold)
    assert isinstance(time, Time) and isinstance(quantity, Quantity)
    if quantity.unit is not None or time.minutes % 60:
        return False
    return algebra.rational(quantity.tree) == (time.minutes // 60 - 1) % 12 + 1


def ratio_rule(gold: Ratio, answer: Ratio, terms: Terms) -> bool:
    """The same parts, or parts with a common factor."""
    if len(gold.parts) != len(answer.parts):
        return False
    pairs = list(zip(gold.parts, answer.parts, strict=True))
    if all(algebra.same(a, b, may_be_long=terms.may_be_long) for a, b in pairs):
        return True
    (a0, b0), rest = pairs[0], pairs[1:]
    if algebra.rational(a0) == 0 or algebra.rational(b0) == 0:
        return False
    return all(
        algebra.same(Node("product", (a, b0)), Node("product", (b, a0)), may_be_long=terms.may_be_long) for a, b in rest
    )


def ratio_as_quotient_rule(gold: Value, answer: Value, terms: Terms) -> bool:
    """2:3 is 2/3; three parts are no number."""
    ratio, quantity = (gold, answer) if isinstance(gold, Ratio) else (answer, gold)
    assert isinstance(ratio, Ratio) and isinstance(quantity, Quantity)
    if len(ratio.parts) != 2 or quantity.unit is not None or algebra.rational(ratio.parts[1]) == 0:
        return False
    return algebra.same(Node("quotient", ratio.parts), quantity.tree, may_be_long=terms.may_be_long)


def digits_rule(gold: Digits, answer: Digits, terms: Terms) -> bool:
    return gold == answer


def digits_without_base_rule(gold: Value, answer: Value, terms: Terms) -> bool:
    """Digits for digits: a base that one side leaves out is no difference."""
    based, plain = (gold, answer) if isinstance(gold, Digits) else (answer, gold)
    assert isinstance(based, Digits) and isinstance(plain, Quantity)
    value = algebra.rational(plain.tree)
    if plain.tree.op == "symbol" and plain.tree.name == based.digits:
        return True  # FF
    literal = plain.tree.op == "number" and plain.unit is None and plain.tree.places is None
    return literal and value is not None and value.denominator == 1 and str(value) == based.digits


def residue_rule(gold: Residue, answer: Residue, terms: Terms) -> bool:
    moduli = algebra.rational(gold.modulus), algebra.rational(answer.modulus)
    values = algebra.rational(gold.value), algebra.rational(answer.value)
    if None in moduli or None in values:
        return gold == answer
    return moduli[0] == moduli[1] != 0 and (values[0] - values[1]) % moduli[0] == 0  # type: ignore[operator]


def number_with_modulus_rule(gold: Quantity, answer: Residue, terms: Terms) -> bool:
    """3 (mod 7) for a gold of 3."""
    return gold.unit is None and same_trees(gold.tree, answer.value, terms)


def product_of_sizes_rule(gold: Quantity, answer: Sizes, terms: Terms) -> bool:
    """3 x 4 for a gold of 12; 12 is no answer where the gold is 3 x 4."""
    product = answer.factors[0]
    for factor in answer.factors[1:]:
        product = Node("product", (product, factor))
    return quantity_rule(gold, Quantity(product, answer.unit), terms)


def sizes_rule(gold: Sizes, answer: Sizes, terms: Terms) -> bool:
    """The same sides in any order."""
    units = gold.unit, answer.unit
    if units[0] and units[1] and units[0] != units[1]:
        return False
    return sorted(map(_sortable, gold.factors)) == sorted(map(_sortable, answer.factors))


def _sortable(tree: Node) -> Fraction:
    assert tree.value is not None
    return tree.value
