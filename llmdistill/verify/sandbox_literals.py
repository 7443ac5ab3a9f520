"""Arguments and expected values as LeetCode and LiveCodeBench write them."""

from __future__ import annotations

import ast
import json
from typing import Any

_WORDS = {"null": None, "true": True, "false": False, "inf": float("inf"), "nan": float("nan")}
_WORDS |= {"Infinity": float("inf"), "NaN": float("nan")}


def arguments(text: str) -> tuple[list[Any], dict[str, Any]]:
    """Positional and named arguments (in order) of "n = 5, queries = [[2,4]]", of one JSON value a line, or of
    "1, [2]".

    Raises:
        ValueError: neither.
    """
    lines = [line for line in text.strip().split("\n") if line.strip()]
    positional: list[Any] = []
    named: dict[str, Any] = {}
    try:
        for line in lines:
            _add(line, positional, named)
    except (SyntaxError, ValueError):
        positional, named = [], {}
        try:
            _add(text, positional, named)
        except SyntaxError:
            raise ValueError(f"arguments {text[:100]!r} are neither `name = value, ...` nor one value a line") from None
    return positional, named


def _add(text: str, positional: list[Any], named: dict[str, Any]) -> None:
    try:
        positional.append(json.loads(text))
        return
    except ValueError:
        pass
    tree = ast.parse(f"f({text.strip()})", mode="eval").body
    if not isinstance(tree, ast.Call):
        raise ValueError(f"no arguments: {text[:100]!r}")
    positional.extend(_literal(node) for node in tree.args)
    for keyword in tree.keywords:
        if keyword.arg is None:
            raise ValueError("** in arguments")
        named[keyword.arg] = _literal(keyword.value)


def expected_value(text: str) -> Any:
    """The value of a literal (Python's or JSON's); the text itself where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return _literal(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return text.strip()


def _literal(node: ast.expr) -> Any:
    """ast.literal_eval that knows null, true and false."""
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return _WORDS[node.id]
    if isinstance(node, ast.List):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_literal(item) for item in node.elts)
    if isinstance(node, ast.Set):
        return {_literal(item) for item in node.elts}
    if isinstance(node, ast.Dict):
        if None in node.keys:
            raise ValueError("** in a literal")
        return {_literal(k): _literal(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
    return ast.literal_eval(node)
