"""Each type of answer: it is read as such, equals itself and its other spellings, and nothing planted in it."""

from __future__ import annotations

import random

import pytest

from llmdistill.verify.answers import values
from llmdistill.verify.answers.equality import decide
from llmdistill.verify.answers.reading import read
from tests.verify import mutations
from tests.verify.test_properties import identical

# Per type: the class of its reading, then golds, each with another spelling of it.
TYPES: dict[str, tuple[type, list[tuple[str, str]]]] = {
    "exact number": (
        values.Quantity,
        [
            ("12", "twelve"),
            (r"\frac{3}{4}", "3/4"),
            ("-7", "minus 7"),
            (r"2\sqrt{3}", r"\sqrt{12}"),
            (r"3^{-70}", r"\frac{1}{3^{70}}"),
            (r"\frac{22}{7}", r"3\frac{1}{7}"),
            ("1234", "1,234"),
        ],
    ),
    "decimal": (
        values.Quantity,
        [("0.25", ".25"), ("3.50", "3.5"), ("-1.75", "-1,75"),
         ("6.02e23", r"6.02\times10^{23}"), ("0.333333", r"\frac13")],
    ),
    "quantity": (
        values.Quantity,
        [
            (r"5\text{ cm}", "5 centimeters"),
            (r"24\text{ cm}^2", "24 square centimeters"),
            (r"36\text{ km/h}", r"10\text{ m/s}"),
            (r"2\text{ hours}", r"120\text{ minutes}"),
            (r"\$4.50", "450 cents"),
            (r"1\text{ m}^3", r"1000\text{ L}"),
        ],
    ),
    "percent": (values.Quantity, [(r"25\%", "25 percent"), (r"12.5\%", r"12.5 \text{ per cent}"), (r"-3\%", r"-3\%")]),
    "time": (
        values.Time,
        [(r"2:30\text{ pm}", "14:30"), ("3:45", "3:45 PM"), ("noon", "12:00 pm"), (r"7:15\text{ am}", "7:15 a.m.")],
    ),
    "ratio": (values.Ratio, [("3:4", "6:8"), ("2:3:5", "4:6:10"), ("1:7", "1 to 7"), ("5:2:4", "5 : 2 : 4")]),
    "tuple": (
        values.Sequence,
        [("(1,2)", r"\left( 1, 2 \right)"), ("(1,2,3)", r"\langle 1,2,3\rangle"),
         (r"(3,\frac12)", "(3, 0.5)"), ("(a,b)", "(a, b)")],
    ),
    "multiset": (values.Sequence, [("1,2,2", "2, 1, 2"), ("3,5,7", "7, 3 and 5"), (r"x=2,x=7", "x=7 or x=2")]),
    "set": (values.Sequence, [(r"\{1,2,3\}", "{3,2,1}"), (r"\{-1,4\}", "4, -1"), (r"\{a,b\}", r"\{b,a\}")]),
    "interval": (
        values.RealSet,
        [
            ("[2,5)", r"2\le x<5"),
            (r"(-\infty,2)\cup(3,\infty)", "x<2 or x>3"),
            ("(0,7]", "0 < t <= 7"),
            (r"(4,\infty)", r"\{x \mid x>4\}"),
        ],
    ),
    "function": (
        values.Assignment,
        [("f(x)=3x+2", "f(t)=2+3t"), ("g(n)=n^2", "g(x)=x^2"), ("h(x,y)=x+2y", "h(a,b)=a+2b"),
         ("P(x)=x^3-4", "P(t)=t^3-4")],
    ),
    "equation": (
        values.Equation,
        [("y=2x+1", "2x-y+1=0"), ("x^2+y^2=4", "x^2+y^2-4=0"),
         (r"\frac{x}{2}+\frac{y}{3}=1", "3x+2y=6"), ("xy=5", "y=5/x")],
    ),
    "inequality chain": (
        values.Chain,
        [("a<b<c", "c>b>a"), ("x+y<3", "3>x+y"), (r"a\le b<c", r"c>b\ge a"), (r"2x-y\ge 4", r"y\le 2x-4")],
    ),
    "matrix": (
        values.Matrix,
        [
            (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "[[1,2],[3,4]]"),
            (r"\begin{pmatrix}1\\7\end{pmatrix}", "(1,7)"),
            (r"\begin{bmatrix}0&-1\\5&2\end{bmatrix}", r"\begin{pmatrix}0&-1\\5&2\end{pmatrix}"),
        ],
    ),
    "system by name": (
        values.System,
        [("x=1,y=2", "y=2, x=1"), ("a=3,b=5,c=7", "c=7,a=3,b=5"), (r"p=\frac12, q=4", "q=4 and p=0.5")],
    ),
    "expression": (
        values.Quantity,
        [
            ("x^2+3x-1", "-1+3x+x^2"),
            (r"\frac{R}{r}", r"R \cdot \frac1r"),
            (r"\sin x+\cos y", r"\cos(y)+\sin(x)"),
            (r"e^{-2t}", r"\frac{1}{e^{2t}}"),
            (r"v_{1}+v_{2}", "v_2+v_1"),
            (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
            ("3ab^2", r"3b^2 \cdot a"),
        ],
    ),
    "option letter": (values.Option, [("B", "(B)"), (r"\text{(C)}", "Option C"), ("D", r"\textbf{(D)}"), ("(K)", "K")]),
    "words": (
        values.Words,
        [(r"\text{east}", "East"), ("Monday", "monday"), (r"\text{not prime}", "not prime"),
         ("necessary but not sufficient",) * 2],
    ),
}  # fmt: skip
WORDS = {"east": "west", "East": "West", "Monday": "Sunday", "not ": "", "necessary": "possible", "sufficient": "true"}


def other_words(gold: str, rng: random.Random) -> str | None:
    return next((gold.replace(old, new, 1) for old, new in WORDS.items() if old in gold), None)


def turned(gold: str, rng: random.Random) -> str | None:
    """am for pm, the parts of a ratio exchanged, what is named by the other's value."""
    for old, new in ((" pm", " am"), (" am", " pm"), ("noon", "midnight")):
        if old in gold:
            return gold.replace(old, new)
    numbers = gold.split(":") if ":" in gold and "\\" not in gold else []
    return ":".join(numbers[::-1]) if len(set(numbers)) > 1 and len(numbers) > 2 else None


PLANTED = (*mutations.ALL, other_words, turned)
SEEDS = 6


@pytest.mark.parametrize("kind", TYPES)
def test_a_type_equals_its_spellings_and_nothing_planted(kind: str) -> None:
    reading, golds = TYPES[kind]
    rng, tried = random.Random(kind), set()
    for gold, spelling in golds:
        assert any(isinstance(value, reading) for value in read(gold)), f"{gold} is read as no {reading.__name__}"
        assert decide(gold, gold).equal and decide(spelling, spelling).equal, gold
        assert decide(gold, spelling).equal and decide(spelling, gold).equal, (gold, spelling)
        tried |= {(gold, change(gold, rng), change.__name__) for change in PLANTED for _ in range(SEEDS)}
    planted = sorted((g, c, what) for g, c, what in tried if c is not None and c != g and not identical(g, c))
    accepted = [row for row in planted if decide(row[0], row[1]).equal or decide(row[1], row[0]).equal]
    assert len(planted) > len(golds), "changes were planted"
    assert [row for row in accepted if row[:2] not in SAID_WITHOUT] == []


# A name's letter or a function's may be left out.
SAID_WITHOUT = {("x=2,x=7", "=2,x=7"), ("y=2x+1", "=2x+1"), ("x=1,y=2", "=1,y=2")}
