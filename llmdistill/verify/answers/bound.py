r"""Sums, products, integrals, limits and derivatives: what is said with a variable of its own.

The name of a bound variable says nothing. Integrals, limits and sums without end are not computed. Two of them are
equal if their bounds are and what stands under the sign is, with the bound variable renamed: evaluate.py takes a fixed
functional of it.
"""

from __future__ import annotations

import re

from llmdistill.verify.answers.figures import Figures
from llmdistill.verify.answers.tokens import Cursor, NotUnderstood, Token, tokens
from llmdistill.verify.answers.tree import Node

LONGEST_SIGN = 400  # tokens under an integral's sign


class Bound(Figures):
    """The part of the grammar that reads signs with a bound variable."""

    def sum(self) -> Node:
        raise NotImplementedError

    def product(self) -> Node:
        raise NotImplementedError

    def _script(self) -> Node:
        raise NotImplementedError

    def parsed(self, found: list[Token]) -> Node:
        """The tree of some tokens. Raises NotUnderstood."""
        raise NotImplementedError

    def _series(self, name: str) -> Node:
        r"""\sum_{k=1}^{n} body: the index, its bounds, and the body, which is the rest of the term."""
        self.expect("_")
        self.expect("{")
        index = self.take()
        if index.kind != "letter":
            raise NotUnderstood("an index")
        self.expect("=")
        low = self.sum()
        self.expect("}")
        self.expect("^")
        high = self._script()
        body = self._with_index(self.product(), index.text)
        kind = "series" if name == "sum" else "product_over"
        return Node(kind, (Node("symbol", name=index.text), low, high, body))

    def _with_index(self, tree: Node, index: str) -> Node:
        """A sum's body in which a_k is a function of the index k."""
        if tree.op == "symbol" and "_" in tree.name:
            base, _, subscript = tree.name.partition("_")
            if re.search(rf"(?<![A-Za-z]){index}(?![A-Za-z])", subscript):
                return Node("unknown", (self.parsed(tokens(subscript)),), name=base + "_")
        if not tree.args:
            return tree
        args = tuple(self._with_index(arg, index) for arg in tree.args)
        return Node(tree.op, args, tree.name, tree.value, tree.places)

    def _integral(self) -> Node:
        r"""\int_a^b body dx."""
        self.expect("_")
        low = self._script()
        self.expect("^")
        high = self._script()
        end = self._differential()
        body = self.parsed(self.tokens[self.at : end]) if end > self.at else Node("symbol", name="1")
        variable = self.tokens[end + 1].text
        self.at = end + 2
        return Node("integral", (Node("symbol", name=variable), low, high, body))

    def _derivative(self) -> Node | None:
        r"""\frac{dv}{dt} and \frac{\partial u}{\partial x} are symbols."""
        rest, at, words = self.tokens, self.at, []
        for part in range(2):
            if (
                at >= len(rest)
                or rest[at].text != "{"
                or at + 1 >= len(rest)
                or rest[at + 1].text not in ("d", "partial")
            ):
                return None
            close = next(
                (n for n in range(at, min(at + 16, len(rest))) if rest[n].text == "}" and self._balanced(at, n)), None
            )
            if close is None or (part == 1 and close < at + 3) or (part == 0 and close < at + 3):
                return None
            words.append("".join(token.text for token in rest[at + 1 : close] if token.text not in "{}"))
            at = close + 1
        if any(re.search(r"[-+*/()]", word) for word in words):
            return None
        self.at = at
        return Node("symbol", name=derivative_name(*words))

    def _balanced(self, start: int, end: int) -> bool:
        inside = [token.text for token in self.tokens[start : end + 1]]
        return inside.count("{") == inside.count("}")

    def _differential(self) -> int:
        """Where the d of the first dx outside of brackets stands."""
        depth = 0
        for at in range(self.at, min(len(self.tokens) - 1, self.at + LONGEST_SIGN)):
            token, following = self.tokens[at], self.tokens[at + 1]
            depth += (token.text in ("(", "{", "[")) - (token.text in (")", "}", "]"))
            if depth == 0 and token.kind == "letter" and token.text == "d" and _is_variable(following):
                return at
        raise NotUnderstood("an integral without a differential")

    def _limit(self) -> Node:
        r"""\lim_{x \to a^+} body: the body is the rest of the term."""
        self.expect("_")
        self.expect("{")
        variable = self.take()
        if not _is_variable(variable) or not self.is_command("to"):
            raise NotUnderstood("a limit")
        self.take()
        start = self.at
        while not self.is_sign("}") or _depth(self, start):
            self.take()
        inner = self.tokens[start : self.at]
        self.take()
        side = ""
        for length in (4, 2):  # 0^{+}, 0^+
            end = "".join(token.text for token in inner[-length:])
            if re.fullmatch(r"\^\{?[-+]\}?", end):
                side, inner = end.strip("^{}"), inner[:-length]
                break
        target = self.parsed(inner)
        return Node("limit", (Node("symbol", name=variable.text), target, target, self.product()), name=side)


def derivative_name(top: str, bottom: str) -> str:
    """dy/dx is y', and of x itself x' is dx/dt; other derivatives keep the variable in their name."""
    match = re.fullmatch(r"d(?:\^([23]))?([A-Za-z])/d([xt])(?:\^([23]))?", f"{top}/{bottom}")
    if match is None or match[1] != match[4] or (match[3] == "x") == (match[2] == "x"):
        return f"{top}/{bottom}"
    return match[2] + "'" * int(match[1] or 1)


def _is_variable(token: Token) -> bool:
    return token.kind == "letter" or (token.kind == "command" and token.text in ("theta", "phi", "alpha", "tau", "xi"))


def _depth(cursor: Cursor, start: int) -> int:
    inside = [token.text for token in cursor.tokens[start : cursor.at]]
    return inside.count("{") - inside.count("}")
