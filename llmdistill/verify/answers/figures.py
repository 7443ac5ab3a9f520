r"""Numbers in expressions: decimals, 2\frac{1}{3}, 0.1\overline{6}."""

from __future__ import annotations

from fractions import Fraction

from llmdistill.verify.answers.tokens import Cursor, NotUnderstood, Token
from llmdistill.verify.answers.tree import Node, number


class Figures(Cursor):
    """The part of the grammar that reads figures."""

    def argument(self) -> Node:
        """What a command takes."""
        raise NotImplementedError

    def _number(self, token: Token, one_digit: bool) -> Node:
        text = token.text
        if one_digit and len(text) > 1 and text.isdigit():
            self.at -= 1
            self.tokens[self.at] = Token("number", text[1:], False)
            return number(int(text[0]))
        mantissa, _, exponent = text.lower().partition("e")
        _, point, digits = mantissa.partition(".")
        if len(text) > 400:
            raise NotUnderstood("a very long number")
        if point and self.is_command("overline", "bar", "dot"):
            return self._repeating(text)
        value = Fraction(text + "0" if text.endswith(".") else text)
        mixed = self._mixed_part() if text.isdigit() else None
        return number(value + mixed) if mixed is not None else number(value, _places(digits, exponent))

    def _repeating(self, text: str) -> Node:
        r"""0.1\overline{6}, 0.\dot{3}, 0.\dot1 2\dot3."""
        fixed, cycle, start = text, "", self.at
        if self.is_command("overline", "bar"):
            self.take()
            cycle = self._digits()
        else:
            dotted = []
            while self.is_command("dot"):
                self.take()
                cycle += self._digits()
                dotted.append(len(cycle))
                following = self.peek()
                if following is not None and following.kind == "number" and following.text.isdigit():
                    cycle += self.take().text
            if (
                len(dotted) > 2
                or (len(dotted) == 2 and dotted[1] != len(cycle))
                or (len(dotted) == 1 and len(cycle) != 1)
            ):
                self.at = start
                raise NotUnderstood("a repeating decimal")
        places = len(fixed.partition(".")[2])
        whole = Fraction(fixed + "0" if fixed.endswith(".") else fixed)
        return number(whole + Fraction(int(cycle), (10 ** len(cycle) - 1) * 10**places))

    def _digits(self) -> str:
        braced = self.is_sign("{")
        if braced:
            self.take()
        token = self.take()
        if token.kind != "number" or not token.text.isdigit():
            raise NotUnderstood("digits")
        if not braced and len(token.text) > 1:
            self.at -= 1
            self.tokens[self.at] = Token("number", token.text[1:], False)
            return token.text[0]
        if braced:
            self.expect("}")
        return token.text

    def _mixed_part(self) -> Fraction | None:
        r"""The proper fraction behind an integer: 2\frac{1}{3}, 2 1/3. None where none follows."""
        start = self.at
        try:
            if self.is_command("frac"):
                self.take()
                top, bottom = self.argument(), self.argument()
            else:
                words = [self.peek(n) for n in range(4)]
                first, slash, last, after = words
                if not (
                    first
                    and slash
                    and last
                    and first.kind == last.kind == "number"
                    and slash.text == "/"
                    and first.blank
                ):
                    return None
                if after is not None and after.text in ("^", "!") or not (first.text + last.text).isdigit():
                    return None
                self.at += 3
                top, bottom = number(int(first.text)), number(int(last.text))
        except NotUnderstood:
            self.at = start
            return None
        if top.op == bottom.op == "number" and top.places is None and bottom.places is None:
            assert top.value is not None and bottom.value is not None
            if 0 < top.value < bottom.value and bottom.value.denominator == 1 and not self.is_sign("^", "!"):
                return top.value / bottom.value
        self.at = start
        return None


def _places(digits: str, exponent: str) -> int | None:
    """The digits after the point of a decimal, 10 of 3.2e-9; None of what was written without point and exponent."""
    return len(digits) - int(exponent or "0") if digits or exponent.startswith("-") else None
