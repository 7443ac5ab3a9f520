"""Rules for what has a name: assignments, functions, equations, families, words and options."""

from __future__ import annotations

from llmdistill.verify.answers import algebra
from llmdistill.verify.answers.terms import Terms
from llmdistill.verify.answers.tree import Node, number, substituted, symbols
from llmdistill.verify.answers.values import Assignment, Equation, Family, Option, Quantity, Value, Words


def assignment_rule(gold: Assignment, answer: Assignment, terms: Terms) -> bool:
    """The same name and value; a function's variable may have any name, and y may be called f(x)."""
    if bool(gold.argument) != bool(answer.argument):
        return "y" in (gold.name, answer.name) and terms.readings(gold.value, answer.value, terms)
    if not gold.argument:
        return gold.name == answer.name and terms.readings(gold.value, answer.value, terms)
    if gold.name != answer.name:
        return False
    renamed = tuple(_renamed(value, answer.argument, gold.argument) for value in answer.value)
    return terms.readings(gold.value, renamed, terms)


def _renamed(value: Value, old: str, new: str) -> Value:
    if not isinstance(value, Quantity) or old == new:
        return value
    free = substituted(value.tree, new, Node("symbol", name=f"{new} elsewhere"))
    return Quantity(substituted(free, old, Node("symbol", name=new)), value.unit)


def value_of_name_rule(gold: Value, answer: Value, terms: Terms) -> bool:
    """x = 5 is 5. What is no name, as x + y = 5, is only where the gold is a number."""
    assignment, other = (gold, answer) if isinstance(gold, Assignment) else (answer, gold)
    assert isinstance(assignment, Assignment)
    if not assignment.label and (assignment is gold or not isinstance(other, Quantity) or symbols(other.tree)):
        return False
    if assignment is gold:
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
