"""Rules for answers of several parts: tuples, sets, lists, systems, matrices, permutations."""

from __future__ import annotations

from itertools import permutations

from llmdistill.verify.answers.rules_named import by_name
from llmdistill.verify.answers.terms import Terms
from llmdistill.verify.answers.values import Assignment, Matrix, Permutation, Readings, Sequence, System, Value


def sequence_rule(gold: Sequence, answer: Sequence, terms: Terms) -> bool:
    """Tuples in their order, sets and lists in any; a list may stand for a set or, in its order, for a tuple."""
    kinds = gold.kind, answer.kind
    if "tuple" in kinds or "bracket" in kinds:
        if "set" in kinds or (kinds[0] != kinds[1] and "list" not in kinds and len(gold.items) < 3):
            return False
        return len(gold.items) == len(answer.items) and all(
            terms.readings(a, b, terms) for a, b in zip(gold.items, answer.items, strict=True)
        )
    items = [_distinct(s.items, terms) if "set" in kinds and s.kind == "set" else list(s.items) for s in (gold, answer)]
    return _in_any_order(items[0], items[1], terms)


def _distinct(items: tuple[Readings, ...], terms: Terms) -> list[Readings]:
    found: list[Readings] = []
    for item in items:
        if not any(terms.readings(other, item, terms) for other in found):
            found.append(item)
    return found


def _in_any_order(gold: list[Readings], answer: list[Readings], terms: Terms) -> bool:
    """Whether each element has a partner of its own: multisets."""
    if len(gold) != len(answer):
        return False
    left = list(answer)
    for item in gold:
        partner = next((n for n, other in enumerate(left) if terms.readings(item, other, terms)), None)
        if partner is None:
            return False
        left.pop(partner)
    return True


def one_element_rule(gold: Value, answer: Value, terms: Terms) -> bool:
    r"""\{5\} is 5."""
    sequence, other = (gold, answer) if isinstance(gold, Sequence) else (answer, gold)
    assert isinstance(sequence, Sequence)
    if sequence.kind != "set" or len(sequence.items) != 1:
        return False
    return terms.readings(sequence.items[0], (other,), terms)


def system_rule(gold: System, answer: System, terms: Terms) -> bool:
    """Named values by their names."""
    theirs = {part.name: part for part in answer.parts}
    if {part.name for part in gold.parts} != set(theirs):
        return False
    return all(terms.readings(part.value, theirs[part.name].value, terms) for part in gold.parts)


def system_as_values_rule(gold: Value, answer: Value, terms: Terms) -> bool:
    """x = 3, y = -8 is (3, -8): names in the order of the alphabet, or of a list as they were written."""
    system, sequence = (gold, answer) if isinstance(gold, System) else (answer, gold)
    assert isinstance(system, System) and isinstance(sequence, Sequence)
    if sequence.kind in ("set", "bracket") or len(system.parts) != len(sequence.items):
        return False
    if any(isinstance(value, Assignment) for item in sequence.items for value in item):
        return False  # names on both sides, and not the same ones
    orders = [sorted(system.parts, key=lambda part: (part.name.lower(), part.name))]
    if sequence.kind == "list":
        orders.append(list(system.parts))
        bases = {part.name.split("_")[0].rstrip("0123456789") for part in system.parts}
        if len(bases) == 1:  # x_1 = 3, x_2 = -8: the roots of one equation
            return _in_any_order([part.value for part in system.parts], list(sequence.items), terms)
    return any(
        all(terms.readings(part.value, item, terms) for part, item in zip(order, sequence.items, strict=True))
        for order in orders
    )


def system_as_tuple_rule(gold: Value, answer: Value, terms: Terms) -> bool:
    """x = 1, y = 2 is (x, y) = (1, 2)."""
    system, tuple_ = (gold, answer) if isinstance(gold, System) else (answer, gold)
    assert isinstance(system, System) and isinstance(tuple_, Assignment)
    named = by_name(tuple_)
    if named.keys() != {part.name for part in system.parts}:
        return False
    return all(terms.readings(part.value, named[part.name], terms) for part in system.parts)


def matrix_rule(gold: Matrix, answer: Matrix, terms: Terms) -> bool:
    """Cell by cell; the branches of cases in any order."""
    if gold.kind != answer.kind or len(gold.rows) != len(answer.rows):
        return False

    def rows(a: tuple[Readings, ...], b: tuple[Readings, ...]) -> bool:
        return len(a) == len(b) and all(terms.readings(x, y, terms) for x, y in zip(a, b, strict=True))

    if gold.kind != "cases" or len(gold.rows) > 6:
        return all(rows(a, b) for a, b in zip(gold.rows, answer.rows, strict=True))
    return any(all(rows(a, b) for a, b in zip(gold.rows, order, strict=True)) for order in permutations(answer.rows))


def column_rule(gold: Value, answer: Value, terms: Terms) -> bool:
    """A column or a row of numbers is a tuple."""
    matrix, sequence = (gold, answer) if isinstance(gold, Matrix) else (answer, gold)
    assert isinstance(matrix, Matrix) and isinstance(sequence, Sequence)
    if matrix.kind != "matrix" or sequence.kind == "set" or (len(matrix.rows) > 1 and len(matrix.rows[0]) > 1):
        return False
    cells = [cell for row in matrix.rows for cell in row]
    return len(cells) == len(sequence.items) and all(
        terms.readings(a, b, terms) for a, b in zip(cells, sequence.items, strict=True)
    )


def permutation_rule(gold: Permutation, answer: Permutation, terms: Terms) -> bool:
    return gold == answer
