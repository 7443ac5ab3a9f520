"""The tokens of LaTeX and plain arithmetic."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmdistill.verify.answers.vocabulary import word_set


class NotUnderstood(Exception):
    """A text that is no expression of the grammar."""


GREEK = word_set(
    """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega
    Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega hbar ell nabla partial odot oplus aleph imath jmath"""
)
FUNCTIONS = word_set(
    """sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan arccot arcsec arccsc arcsinh arccosh arctanh
    ln log lg exp"""
)
LISTED = word_set("max min gcd lcm")
_WORDS = FUNCTIONS | LISTED | word_set("sqrt pi infinity inf infty theta alpha beta gamma lambda omega abs floor ceil")
_PROSE = word_set("""and or not no if is the for to of when where mod odd even true none yes all any some each per than
    from with only but both left more less half time zero four five nine""")
TEXTS = word_set("text textbf textit textrm textnormal mathrm mathit mathsf mbox hbox operatorname rm bf")
_TOKEN = re.compile(
    r"(?P<number>\d+\.(?![\d.])|\d+(?:\.\d+)?(?:[eE][-+]?\d{1,4}(?![\w.]))?|\.\d+)|(?P<command>\\[A-Za-z]+)|(?P<escaped>\\[|])"
    r"|(?P<letters>[A-Za-z]+)|(?P<sign>[-+*/^_()\[\]{}|!'=,])|(?P<blank>\s+)|(?P<other>.)",
    re.S,
)


@dataclass(frozen=True, slots=True)
class Token:
    kind: str
    text: str
    blank: bool  # before it


def tokens(text: str) -> list[Token]:
    found: list[Token] = []
    blank = False
    for match in _TOKEN.finditer(text):
        kind, word = match.lastgroup or "other", match.group()
        if kind == "blank":
            blank = True
            continue
        if kind == "other":
            raise NotUnderstood(f"{word!r}")
        if kind == "letters" and word not in _WORDS:
            if word in _PROSE or (len(word) > 4 and not word.isupper()):
                raise NotUnderstood(word)
            for letter in word:
                found.append(Token("letter", letter, blank))
                blank = False
            continue
        if kind == "letters":
            kind, word = "command", "\\" + word
        found.append(Token(kind, word.lstrip("\\") if kind == "command" else word, blank))
        blank = False
    return found


class Cursor:
    """Tokens and where we are in them; ``bars`` is how many absolute values are open."""

    def __init__(self, found: list[Token]) -> None:
        self.tokens, self.at, self.bars, self.depth = found, 0, 0, 0

    def peek(self, ahead: int = 0) -> Token | None:
        at = self.at + ahead
        return self.tokens[at] if at < len(self.tokens) else None

    def is_sign(self, *signs: str) -> bool:
        token = self.peek()
        return token is not None and token.kind in ("sign", "escaped") and token.text in signs

    def is_command(self, *names: str) -> bool:
        token = self.peek()
        return token is not None and token.kind == "command" and token.text in names

    def take(self) -> Token:
        token = self.peek()
        if token is None:
            raise NotUnderstood("it ends too early")
        self.at += 1
        return token

    def expect(self, sign: str) -> None:
        if not self.is_sign(sign):
            raise NotUnderstood(f"no {sign}")
        self.at += 1
