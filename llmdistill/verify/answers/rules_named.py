"""Rules for what has a name: assignments, functions, equations, families, words and options."""

from __future__ import annotations

from dataclasses import replace

from llmdistill.verify.answers import algebra
from llmdistill.verify.answers.terms import Terms
from llmdistill.verify.answers.tree import Node, number, substituted, symbols
from llmdistill.verify.answers.values import (
    Assignment,
    Equation,
    Family,
    Option,
    Quantity,
    Readings,
    Sequence,
    Time,
    Value,
    Words,
)


def assignment_rule(gold: Assignment, answer: Assignment, terms: Terms) -> bool:
    """The same name and value; a function's variable may have any name, and y may be called f(x)."""
    if bool(gold.argument) != bool(answer.argument):
        return "y" in (gold.name, answer.name) and terms.readings(gold.value, answer.value, terms)
    if not gold.argument:
        if gold.name == answer.name:
            return terms.readings(gold.value, answer.value, terms)
        ours, theirs = by_name(gold), by_name(answer)
        return ours.keys() == theirs.keys() != set() and all(
            terms.readings(ours[name], theirs[name], terms) for name in ours
        )
    old, new = answer.argument.split(","), gold.argument.split(",")
    if gold.name != answer.name or len(old) != len(new):
        return False
    return terms.readings(gold.value, tuple(_renamed(value, old, new) for value in answer.value), terms)


def _renamed(value: Value, old: list[str], new: list[str]) -> Value:
    """A function's value with its variables renamed; what bore the new names before is something else."""
    if not isinstance(value, Quantity) or old == new:
        return value
    tree = value.tree
    for name in set(new) - set(old):
        tree = substituted(tree, name, Node("symbol", name=f"{name} elsewhere"))
    for at, name in enumerate(old):
        tree = substituted(tree, name, Node("symbol", name=f"variable {at}"))
    for at, name in enumerate(new):
        tree = substituted(tree, f"variable {at}", Node("symbol", name=name))
    return Quantity(tree, value.unit)


def by_name(assignment: Assignment) -> dict[str, Readings]:
    """The names of (x, y) = (1, 2), and the value of each; {} of what is no tuple."""
    names = assignment.name.strip("()").split(",") if assignment.name.startswith("(") else []
    values = next((v for v in assignment.value if isinstance(v, Sequence) and v.kind == "tuple"), None)
    if values is None or len(set(names)) < len(names) or len(names) != len(values.items):
        return {}
    return dict(zip(names, values.items, strict=True))


def _in_order_of_axes(assignment: Assignment) -> Assignment:
    """(y, x) = (2, 1) as (x, y) = (1, 2): a tuple without names is of coordinates in their order."""
    named = by_name(assignment)
    if not named or not set(named) <= set("xyz"):
        return assignment
    names = sorted(named)
    return replace(assignment, value=(Sequence("tuple", tuple(named[name] for name in names)),))


def value_of_name_rule(gold: Value, answer: Value, terms: Terms) -> bool:
    """x = 5 is 5. What is no name, as x + y = 5, is only where the gold is a number."""
    assignment, other = (gold, answer) if isinstance(gold, Assignment) else (answer, gold)
    assert isinstance(assignment, Assignment)
    if isinstance(other, Time) and not any(isinstance(value, Time) for value in assignment.value):
        return False  # x = 4 is no time
    is_gold, assignment = assignment is gold, _in_order_of_axes(assignment)
    if not assignment.label and (is_gold or not isinstance(other, Quantity) or symbols(other.tree)):
        return False
    if is_gold:
        return terms.readings(assignment.value, (other,), terms)
    return terms.readings((other,), assignment.value, terms)


def equation_rule(gold: Equation, answer: Equation, terms: Terms) -> bool:
    """The same curve: differences of sides with a constant factor between them."""
    if algebra.same(gold.difference, answer.difference, may_be_long=terms.may_be_long):
        return bool(symbols(gold.difference)) and not _always_true(gold.difference, terms)
    return algebra.proportional(gold.difference, answer.difference, may_be_long=terms.may_be_long) is not None


def _always_true(difference: Node, terms: Terms) -> bool:
    return algebra.same(difference, number(0), may_be_long=terms.may_be_long)


def family_rule(gold: Family, answer: Family, terms: Terms) -> bool:
    """The same values: the parameter renamed, turned or shifted."""
    if gold.domain != answer.domain:
        return False
    k = Node("symbol", name=gold.parameter)
    shifts = range(-3, 4) if gold.domain == "Z" else (0,)
    signs = (1, -1) if gold.domain == "Z" else (1,)
    for shift in sorted(shifts, key=abs):
        for sign in signs:
            moved = (
                Node("sum", (k if sign > 0 else Node("minus", (k,)), number(shift))) if (shift, sign) != (0, 1) else k
            )
            if algebra.same(
                gold.tree, substituted(answer.tree, answer.parameter, moved), may_be_long=terms.may_be_long
            ):
                return True
    return False


def option_rule(gold: Option, answer: Option, terms: Terms) -> bool:
    return gold.letter == answer.letter


def words_rule(gold: Words, answer: Words, terms: Terms) -> bool:
    return gold.words == answer.words
