r"""Expressions: a strict reading of LaTeX and plain arithmetic into trees.

What the grammar does not know is not an expression: ``parse`` returns None, and never skips or guesses a symbol.
Letters are symbols by their whole name: case, subscripts, primes, accents and arrows are part of it (v_{\max} is not
v_{\min}). Runs of letters are products, e is Euler's number, i the imaginary unit, and I and j are letters.
"""

from __future__ import annotations

import re

from llmdistill.verify.answers.bound import Bound
from llmdistill.verify.answers.tokens import FUNCTIONS, GREEK, LISTED, TEXTS, NotUnderstood, Token, tokens
from llmdistill.verify.answers.tree import Node, number

LONGEST = 2_000
DEEPEST = 60
_DECORATIONS = {
    "vec": "vec", "overline": "bar", "bar": "bar", "hat": "hat", "dot": "dot", "ddot": "ddot", "tilde": "tilde",
    "underline": "under", "mathbf": "bf", "overparen": "arc",
}  # fmt: skip
_NAME = re.compile(r"(?:\\?(?:triangle|angle)\s*)?[A-Z]{2,}'?")


def parse(text: str) -> Node | None:
    """The tree of a tidy text; None where it is no expression."""
    if len(text) > LONGEST:
        return None
    try:
        # 1,234 in the braces of a fraction is one number: lists stand in no braces.
        text = re.sub(r"\{[\d,. ]+\}", lambda m: re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", m.group()), text)
        named = _NAME.fullmatch(text.strip())
        if named:
            return name_of_points(text.strip())
        parser = _Parser(tokens(text))
        tree = parser.sum()
        return tree if parser.at == len(parser.tokens) else None
    except (NotUnderstood, RecursionError, ZeroDivisionError):
        return None


def name_of_points(text: str) -> Node:
    """ABC, an angle or a triangle: one symbol whose letters keep their order. An angle may be read from either side."""
    word = text.replace("\\", "").replace(" ", "")
    points = re.sub(r"triangle|angle", "", word)
    if "angle" in word and "triangle" not in word and len(points) == 3:
        word = "angle" + min(points, points[::-1])
    return Node("symbol", name=word)


class _Parser(Bound):
    """Recursive descent."""

    def parsed(self, found: list[Token]) -> Node:
        inner = _Parser(found)
        inner.depth = self.depth + 1
        tree = inner.sum()
        if inner.at < len(found):
            raise NotUnderstood("a part")
        return tree

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > DEEPEST:
            raise NotUnderstood("nested too deeply")
        terms = []
        negative = self._signs()
        while True:
            term = self.product()
            terms.append(Node("minus", (term,)) if negative else term)
            if not self.is_sign("+", "-"):
                break
            negative = self._signs()
        self.depth -= 1
        return terms[0] if len(terms) == 1 else Node("sum", tuple(terms))

    def _signs(self) -> bool:
        negative = False
        for _ in range(3):
            if not self.is_sign("+", "-"):
                break
            negative ^= self.take().text == "-"
        return negative

    def product(self) -> Node:
        result = self.power()
        while True:
            if self.is_sign("*") or self.is_command("cdot", "times"):
                cross = self.take().text == "times"
                factor = self._signed_power()
                vectors = result.name.startswith("vec ") and factor.name.startswith("vec ")
                result = Node("cross" if cross and vectors else "product", (result, factor))
            elif self.is_sign("/") or self.is_command("div"):
                self.take()
                result = Node("quotient", (result, self._signed_power()))
            elif self._begins_factor(result):
                result = Node("product", (result, self.power()))
            else:
                return result

    def _signed_power(self) -> Node:
        negative = self._signs()
        factor = self.power()
        return Node("minus", (factor,)) if negative else factor

    def _begins_factor(self, left: Node) -> bool:
        """Whether a factor follows without a sign. Two bare numbers side by side are no product."""
        token = self.peek()
        if token is None:
            return False
        if token.kind == "number":
            return left.op not in ("number", "minus") and not (left.op == "product" and left.args[-1].op == "number")
        if token.kind == "letter":
            return True
        if token.kind == "command":
            return token.text not in ("cdot", "times", "div", "rfloor", "rceil", "choose", "infty", "end")
        return (token.kind == "sign" and token.text in "({[") or (token.text == "|" and self.bars == 0)

    def power(self) -> Node:
        base = self.primary()
        while True:
            if self.is_sign("!"):
                self.take()
                double = self.is_sign("!")
                if double:
                    self.take()
                base = Node("double_factorial" if double else "factorial", (base,))
            elif self.is_sign("'"):
                if base.op != "symbol":
                    raise NotUnderstood("a prime")
                self.take()
                base = Node("symbol", name=base.name + "'")
            elif self.is_sign("^"):
                self.take()
                base = self._raised(base)
            elif self.is_sign("_") and base.op == "symbol":
                self.take()
                base = Node("symbol", name=f"{base.name}_{self._subscript()}")
            else:
                return base

    def _raised(self, base: Node) -> Node:
        if self.is_command("circ"):
            self.take()
            return Node("degrees", (base,))
        following = self.peek(1)
        if self.is_sign("{") and following is not None and following.text in ("circ", "'", "*"):
            close = self.peek(2)
            marks = following.text
            if marks == "'" and close is not None and close.text == "'":
                self.at += 1
                marks, close = "''", self.peek(2)
            if close is not None and close.text == "}":
                self.at += 3
                if marks == "circ":
                    return Node("degrees", (base,))
                if base.op == "symbol":
                    return Node("symbol", name=base.name + marks)
            raise NotUnderstood("an exponent")
        if self.is_sign("*") and base.op == "symbol":
            self.take()
            return Node("symbol", name=base.name + "*")
        if self.is_sign("'") and base.op == "symbol":
            self.take()
            return Node("symbol", name=base.name + "'")
        return Node("power", (base, self._script()))

    def _script(self) -> Node:
        """An exponent: what stands in braces, in brackets, or one sign."""
        if self.is_sign("{"):
            return self._group("{", "}")
        if self.is_sign("-", "+"):
            return self._signed_power_of_one()
        if self.is_sign("("):
            return self._group("(", ")")
        return self.primary(one_digit=False)

    def _signed_power_of_one(self) -> Node:
        negative = self._signs()
        found = self.primary()
        return Node("minus", (found,)) if negative else found

    def _group(self, opening: str, closing: str) -> Node:
        self.expect(opening)
        bars, self.bars = self.bars, 0
        inner = self.sum()
        self.bars = bars
        self.expect(closing)
        return inner

    def argument(self) -> Node:
        r"""What a command takes: a group in braces, or one digit, letter or command (\frac12, \sqrt\pi)."""
        if self.is_sign("{"):
            return self._group("{", "}")
        return self.primary(one_digit=True)

    def _subscript(self) -> str:
        """A subscript's text, without the commands that only set its type."""
        if not self.is_sign("{"):
            return self.take().text
        depth, words = 0, []
        while True:
            token = self.take()
            depth += (token.text == "{") - (token.text == "}")
            if token.text not in "{}" and token.text not in TEXTS:
                words.append(token.text)
            if depth == 0:
                return "".join(words)

    def primary(self, one_digit: bool = False) -> Node:
        token = self.take()
        if token.kind == "number":
            return self._number(token, one_digit)
        if token.kind == "letter":
            return self._letter(token.text)
        if token.kind == "command":
            return self._command(token.text)
        self.at -= 1
        if token.text == "(":
            return self._group("(", ")")
        if token.text == "[":
            return self._group("[", "]")
        if token.text == "{":
            return self._braces()
        if token.text in ("|", "\\|"):
            return self._bars(token.text)
        raise NotUnderstood(f"{token.text!r}")

    def _bars(self, bar: str) -> Node:
        self.take()
        self.bars += 1
        inner = self.sum()
        self.bars -= 1
        self.expect(bar)
        return Node("abs" if bar == "|" else "norm", (inner,))

    def _braces(self) -> Node:
        r"""A group, which may be {n \choose k}."""
        self.expect("{")
        bars, self.bars = self.bars, 0
        inner = self.sum()
        if self.is_command("choose"):
            self.take()
            inner = Node("binomial", (inner, self.sum()))
        self.bars = bars
        self.expect("}")
        return inner

    def _letter(self, letter: str) -> Node:
        number_in_brackets = self.is_sign("(") and [t.text if t else "" for t in (self.peek(2),)] == [")"]
        if number_in_brackets and (inner := self.peek(1)) is not None and inner.kind == "number":
            return Node("unknown", (self._group("(", ")"),), name=letter)  # I(0)
        counted = self._counted(letter) if letter in "CPA" else None
        if counted is not None:
            return counted
        if letter in "fgh" and self.is_sign("(") or letter in "CAP" and self.is_sign("_", "^"):
            found = self._combinations(letter) if letter in "CAP" else self._applied(letter)
            if found is not None:
                return found
        return Node("symbol", name=letter)

    def _counted(self, letter: str) -> Node | None:
        """C(5, 2), P(5, 2) and A(5, 2); C(n, k)."""
        ahead = [token.text if (token := self.peek(n)) else "" for n in range(5)]
        if [ahead[0], ahead[2], ahead[4]] != ["(", ",", ")"]:
            return None
        kind = "binomial" if letter == "C" else "permutations"
        if letter == "C" and ahead[1] in ("n", "m", "N") and ahead[3] in ("k", "r", "j", "m"):
            self.at += 5
            return Node(kind, (Node("symbol", name=ahead[1]), Node("symbol", name=ahead[3])))
        if not (ahead[1] + ahead[3]).isdigit():
            return None
        self.at += 5
        return Node(kind, (number(int(ahead[1])), number(int(ahead[3]))))

    def _applied(self, letter: str) -> Node | None:
        """f(x): a function that nothing is known of."""
        return Node("unknown", (self._group("(", ")"),), name=letter)

    def _combinations(self, letter: str) -> Node | None:
        """C_n^k and A_n^k; None where it is a constant with an index."""
        start = self.at
        try:
            scripts: dict[str, Node] = {}
            while self.is_sign("_", "^") and len(scripts) < 2:
                sign = self.take().text
                if sign in scripts:
                    break
                scripts[sign] = self._script()
            if len(scripts) == 2:
                n, k = scripts["_"], scripts["^"]
                counted = n.value is not None and k.value is not None and n.value >= k.value and n.value > 1
                if counted or (n.op == "symbol" and k.op in ("symbol", "number")):
                    return Node("binomial" if letter == "C" else "permutations", (n, k))
        except NotUnderstood:
            pass
        self.at = start
        return None

    def _command(self, name: str) -> Node:
        if name == "frac":
            return self._fraction()
        if name == "sqrt":
            return self._root()
        if name == "pi":
            return Node("pi")
        if name in ("infty", "infinity", "inf"):
            return Node("infinity")
        if name in GREEK or name == "degree":
            return Node("symbol", name=name)
        if name in FUNCTIONS:
            return self._function(name)
        if name == "binom":
            return Node("binomial", (self.argument(), self.argument()))
        if name in ("lfloor", "lceil"):
            inner = self.sum()
            if not self.is_command("rfloor" if name == "lfloor" else "rceil"):
                raise NotUnderstood(name)
            self.take()
            return Node("floor" if name == "lfloor" else "ceiling", (inner,))
        if name in ("abs", "floor", "ceil"):
            return Node({"ceil": "ceiling"}.get(name, name), (self._group("(", ")"),))
        if name in LISTED:
            return Node(name, tuple(self._listed()))
        if name in ("sum", "prod"):
            return self._series(name)
        if name == "int":
            return self._integral()
        if name == "lim":
            return self._limit()
        if name in _DECORATIONS:
            return self._decorated(_DECORATIONS[name])
        if name in ("triangle", "angle"):
            points = []
            while (token := self.peek()) is not None and token.kind == "letter" and token.text.isupper():
                points.append(self.take().text)
            return name_of_points(name + "".join(points))
        if name in TEXTS:
            return self._text()
        raise NotUnderstood(name)

    def _listed(self) -> list[Node]:
        closing = {"(": ")", "{": "}"}
        if not self.is_sign("(", "{"):
            if self.is_sign("_", "^"):
                raise NotUnderstood("a bound")
            return [self.power()]
        opening = self.take().text
        found = [self.sum()]
        while self.is_sign(","):
            self.take()
            found.append(self.sum())
        self.expect(closing[opening])
        return found

    def _text(self) -> Node:
        r"""\mathrm{e}, \text{i}, \mathrm{d}: one letter set upright. More letters are words, and no expression."""
        if not self.is_sign("{"):
            raise NotUnderstood("a switch of type")
        self.take()
        held = []
        while not self.is_sign("}"):
            held.append(self.take())
        self.take()
        if len(held) == 1 and held[0].kind == "letter":
            return self._letter(held[0].text)
        if len(held) == 1 and held[0].kind == "number":
            return self._number(held[0], False)
        if held and all(token.kind == "letter" and token.text.isupper() for token in held):
            return Node("symbol", name="".join(token.text for token in held))
        raise NotUnderstood("words")

    def _decorated(self, mark: str) -> Node:
        """A symbol with an accent, an arrow or a bar. The bar over a sum is what the bar is over."""
        inner = self.argument() if not self.is_sign("{") else self._points_or_group()
        if inner == Node("symbol", name="x") and mark in ("dot", "ddot"):
            return Node("symbol", name="x'" if mark == "dot" else "x''")
        return Node("symbol", name=f"{mark} {inner.name}") if inner.op == "symbol" else Node(mark, (inner,))

    def _points_or_group(self) -> Node:
        start, points = self.at, ""
        self.take()
        while (token := self.peek()) is not None and token.kind == "letter" and token.text.isupper():
            points += self.take().text
        if len(points) > 1 and self.is_sign("}"):
            self.take()
            return Node("symbol", name=points)
        self.at = start
        return self._group("{", "}")

    def _fraction(self) -> Node:
        derivative = self._derivative()
        if derivative is not None:
            return derivative
        top = self.argument()
        bottom = self.argument()
        if top.op == bottom.op == "number" and top.places is None and bottom.places is None:
            assert top.value is not None and bottom.value is not None
            return number(top.value / bottom.value)
        return Node("quotient", (top, bottom))

    def _root(self) -> Node:
        index = number(2)
        if self.is_sign("["):
            index = self._group("[", "]")
        token = self.peek()
        if token is not None and token.kind == "number":
            radicand = self.primary()
        elif self.is_sign("("):
            radicand = self._group("(", ")")
        else:
            radicand = self.argument()
        return Node("root", (radicand, index))

    def _function(self, name: str) -> Node:
        base: Node | None = None
        exponent: Node | None = None
        while self.is_sign("_", "^"):
            if self.take().text == "_":
                base = self._script()
            else:
                exponent = self._script()
        braced = name == "exp" and self.is_sign("{")
        inner = self._group("{", "}") if braced else self._function_argument()
        if base is not None:
            if name != "log":
                raise NotUnderstood(f"a base of {name}")
            found = Node("log", (inner, base))
        elif exponent is not None and exponent.op == "minus" and exponent.args[0] == number(1):
            inverse = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}.get(name)
            if inverse is None:
                raise NotUnderstood(f"the inverse of {name}")
            return Node(inverse, (inner,))
        else:
            found = Node("log10" if name == "lg" else name, (inner,))
        return Node("power", (found, exponent)) if exponent is not None else found

    def _function_argument(self) -> Node:
        r"""\sin(x), or the factors without a sign between them: \sin 2x, \cos\omega t, \cos\pi/3."""
        if self.is_sign("(", "["):
            closing = {"(": ")", "[": "]"}
            opening = self.peek()
            assert opening is not None
            inner = self._group(opening.text, closing[opening.text])
            if not self.is_sign("^"):
                return inner
            raise NotUnderstood("a power of an argument")
        if self.is_sign("{") or self.is_sign("|"):
            inner = self.primary()
            return self._after_power(inner)
        negative = self._signs()
        inner = self.power()
        while (token := self.peek()) is not None and self._begins_factor(inner):
            if token.kind == "command" and (token.text in FUNCTIONS or token.text in ("sum", "prod")):
                break
            if token.text in "([|":
                break
            inner = Node("product", (inner, self.power()))
        following = self.peek(1)
        if self.is_sign("/") and following is not None and following.kind == "number" and _has_pi(inner):
            self.take()
            inner = Node("quotient", (inner, self.power()))
        return Node("minus", (inner,)) if negative else inner

    def _after_power(self, inner: Node) -> Node:
        if self.is_sign("^"):
            self.take()
            return self._raised(inner)
        return inner


def _has_pi(tree: Node) -> bool:
    return tree.op == "pi" or any(map(_has_pi, tree.args))
