"""The trees of expressions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

CONSTANTS = frozenset({"e", "i"})
BINDERS = frozenset({"series", "product_over", "integral", "limit"})  # variable, low, high, body


@dataclass(frozen=True, slots=True)
class Node:
    """A tree.

    Attributes:
        op: "number", "symbol", "sum", "product", "quotient", "power", "minus", "degrees", or the name of a function.
        args: what it is of.
        name: a symbol's name.
        value: a number's value.
        places: the digits after its decimal point; None of a number that was written without.
    """

    op: str
    args: tuple[Node, ...] = ()
    name: str = ""
    value: Fraction | None = None
    places: int | None = None


def number(value: Fraction | int, places: int | None = None) -> Node:
    return Node("number", value=Fraction(value), places=places)


def symbols(tree: Node) -> frozenset[str]:
    """The free symbols; not e and i, nor a sum's index."""
    return all_symbols(tree) - CONSTANTS


@lru_cache(4096)
def all_symbols(tree: Node) -> frozenset[str]:
    """The free symbols, e and i among them."""
    if tree.op == "symbol":
        return frozenset({tree.name})
    if tree.op in BINDERS:
        index, low, high, body = tree.args
        return (all_symbols(body) - {index.name}) | all_symbols(low) | all_symbols(high)
    return frozenset().union(*map(all_symbols, tree.args)) if tree.args else frozenset()


def walk(tree: Node) -> Iterator[Node]:
    yield tree
    for arg in tree.args:
        yield from walk(arg)


def operations(*trees: Node) -> set[str]:
    return {node.op for tree in trees for node in walk(tree)}


def substituted(tree: Node, name: str, by: Node) -> Node:
    """A tree with another one for a symbol."""
    if tree.op == "symbol":
        return by if tree.name == name else tree
    if not tree.args:
        return tree
    if tree.op in BINDERS and tree.args[0].name == name:
        return tree
    return Node(tree.op, tuple(substituted(arg, name, by) for arg in tree.args), tree.name, tree.value, tree.places)
