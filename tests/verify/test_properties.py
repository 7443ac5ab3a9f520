"""What holds of every answer: it equals itself, equality has no direction, and one thing changed makes it wrong."""

from __future__ import annotations

import json
import os
import random
import re
from math import gcd
from pathlib import Path

import pytest
import sympy
from sympy.parsing.sympy_parser import parse_expr

from llmdistill.verify.answers.equality import decide
from llmdistill.verify.answers.expression import parse
from llmdistill.verify.answers.reading import read
from llmdistill.verify.answers.tree import Node
from tests.verify import mutations

DATA = Path(os.environ.get("LLMDISTILL_DATA") or Path(__file__).parents[3] / "shared" / "data")
FILES = [
    *(
        DATA / "benchmarks" / f"{name}.jsonl"
        for name in ("math500", "minerva_math", "olympiadbench", "amc23", "aime24")
    ),
    DATA / "train" / "math_train.jsonl",
]
# A few of each type, for where the benchmarks' files are not.
OWN = [
    "12", "-3", r"\frac{3}{4}", "0.25", "1.5e-7", r"25\%", r"\$4.50", r"5\text{ cm}", r"2\text{ hours}",
    r"6\text{ cm}^2",
    "(1,2)", "(1,2,3)", "[0,1)", r"(-\infty,2)\cup(3,\infty)", r"\{1,2,3\}", "1,2,3", r"x^2+3x-1", r"\frac{a+b}{c}",
    r"2\sqrt{3}", r"\sin x+\cos y", r"\ln(x+1)", r"e^{-2t}", "x=5", "y=2x+1", r"x\ge 3", "2<x<5", "3:4",
    r"2:30\text{ pm}",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\text{east}", r"\text{(B)}", "1011_2", r"v_{1}+v_{2}", r"\frac{R}{r}",
    r"\lceil n/2\rceil", "ABC", r"3\pmod 7", r"n!", r"\binom{n}{2}", r"1+2i", r"f(x)=3x+2", r"x=1, y=2",
    r"\{3k \mid k\in\mathbb{Z}\}", r"12\times18\times11", r"(1\ 3\ 2)",
]  # fmt: skip


def golds() -> list[str]:
    found = set(OWN)
    for file in FILES:
        if file.is_file():
            found |= {str(json.loads(line)["answer"]) for line in file.open()}
    return sorted(gold for gold in found if len(gold) < 200)


def mutated(count: int) -> list[tuple[str, str, str]]:
    """(gold, changed gold, what was changed), the changes in turn."""
    rng = random.Random(0)
    chosen = golds()
    rng.shuffle(chosen)
    found: list[tuple[str, str, str]] = []
    for number in range(40 * count):
        gold, change = chosen[number // len(mutations.ALL) % len(chosen)], mutations.ALL[number % len(mutations.ALL)]
        changed = change(gold, rng)
        if changed is not None and changed != gold:
            found.append((gold, changed, change.__name__))
        if len(found) == count:
            break
    return found


def identical(gold: str, changed: str) -> bool:
    """Whether a change changed nothing, as sympy proves of expressions: -0 is 0, 6E23 is 6e23."""
    trees = [_sympy(text) for text in (gold, changed)]
    if all(tree is not None for tree in trees):
        return bool(sympy.simplify(trees[0] - trees[1]) == 0)
    spelt = [
        re.sub(r"\s|\\left|\\right|-(?=0(?![.\d])|\\begin\{pmatrix\}[0\\\s]*\\end)", "", text)
        for text in (gold, changed)
    ]
    return spelt[0] == spelt[1] or spelt[0].lower() == spelt[1].lower() and bool(re.search(r"\d[eE]-?\d|[ap]\.m", gold))


def _sympy(text: str) -> sympy.Expr | None:
    tree = parse(text.strip())
    return None if tree is None else _converted(tree)


def _converted(tree: Node) -> sympy.Expr | None:
    """Arithmetic and powers only: what goes beyond is not waved through."""
    args = [_converted(arg) for arg in tree.args]
    if any(arg is None for arg in args):
        return None
    if tree.op == "number":
        return sympy.Rational(tree.value.numerator, tree.value.denominator)
    if tree.op == "symbol":
        return sympy.Symbol(tree.name)
    make = {
        "sum": lambda *a: sympy.Add(*a),
        "product": lambda a, b: a * b,
        "quotient": lambda a, b: a / b,
        "power": lambda a, b: a**b,
        "minus": lambda a: -a,
        "root": lambda a, n: sympy.root(a, n),
    }.get(tree.op)
    return make(*args) if make else None


def check(count: int) -> None:
    pairs = mutated(count)
    assert len(pairs) == count
    accepted = [pair for pair in pairs if decide(pair[0], pair[1]).equal and not identical(pair[0], pair[1])]
    # A name's own letter may go ("x = 5" for "= 5"), and a function's variable may have any name.
    accepted = [(g, c, what) for g, c, what in accepted if not re.match(r" ?=|[a-zA-Z]\([a-zA-Z]\)", c)]
    assert accepted == []
    one_way = [p for p in pairs if decide(p[0], p[1]).equal != decide(p[1], p[0]).equal]
    assert [p for p in one_way if p[2] != "drop"] == [], "of golds that differ in one thing, neither is the other"


def test_one_thing_changed_is_another_answer() -> None:
    check(200)


@pytest.mark.proof
@pytest.mark.skipif(not FILES[0].is_file(), reason="the benchmarks' files are not here; set LLMDISTILL_DATA")
def test_one_thing_changed_is_another_answer_of_every_gold() -> None:
    check(8_000)


def test_every_type_equals_itself() -> None:
    assert len({type(value).__name__ for gold in OWN for value in read(gold)}) >= 15
    assert [gold for gold in OWN if not decide(gold, gold).equal] == []


def test_equality_of_the_documented_pairs_has_one_direction_only_where_that_is_documented() -> None:
    from tests.verify.test_answer_cases import PAIRS

    one_way = [(g, a) for sign, g, a in PAIRS if decide(g, a).equal != decide(a, g).equal]
    assert set(one_way) == ONE_WAY


# A product is an answer for the number that it comes to, but a number is none for the sides of a thing; a word that
# turns the meaning may be left out where the question asks for it, but not put in.
ONE_WAY = {
    (r"12\times18\times11", "2376"),
    (r"2 \times 3 \times 4", "24"),
    (r"12\%", r"12\% \text{ decrease}"),
    ("5", r"\text{loss of } 5"),
    (r"10\%", r"\text{decrease of } 10\%"),
    (r"\$20", r"\text{a loss of } \$20"),
    ("7pm", "7"),  # p, m; or picometres, where the gold has no unit
}


GUESSES = [
    *(str(n) for n in range(-5, 31)), "x", "n", "a", "x=x", "y=y", "1=1", "0=0", "x=0", "y=x", "", "{}", r"\text{}",
    r"\infty",
    r"-\infty", r"\emptyset", r"\{\}", "()", "[]", "(0,0)", "(0,1)", "[0,1]", r"(0,\infty)", r"(-\infty,\infty)",
    r"\mathbb{R}",
    r"\mathbb{Z}", r"\pi", "2\\pi", "e", "i", r"\sqrt{2}", r"\frac{1}{2}", r"\frac{1}{3}", "0.5", r"50\%", r"100\%",
    "true", "false",
    "yes", "no", "none", "even", "True", "x>0", r"x\ge 0", r"x \ne 0", "0<1", "n!", "2^n", "n^2", "n+1", "2n", "x^2",
    "-x", "f(x)",
    "f(x)=x", "f(x)=0", "y=2x", "x+y=1", "x^2+y^2=1", "ABC", "A,B", "A or B", "all of the above", "undefined", "1,2",
    "1,2,3", "-1,1",
    r"\pm 1", "1:2", "12:00", r"\begin{pmatrix}1\\0\end{pmatrix}", r"1,2,\ldots", r"\ldots", "?", "answer", "0 or 1",
    "at least 1",
    "nan", "None", "+", "=", r"\boxed{}", "1/0", "0/0", "0^0", "10^{100}", "1.0", "5 cm", r"90^\circ", "1000",
    *"ABCDEFGHIJ", "(A)",
]  # fmt: skip
# Five hundred in all, with small numbers in every form that a farmer would try.
GUESSES += [
    *(str(n) for n in (*range(31, 181), *range(-12, -5), *range(200, 2100, 100))),
    *(rf"\frac{{{a}}}{{{b}}}" for b in range(2, 11) for a in range(1, b) if gcd(a, b) == 1),
    *(f"0.{n}" for n in (1, 2, 3, 4, 6, 7, 8, 9, 25, 75, 125)), *(f"{n}.5" for n in range(1, 11)),
    *(rf"{n}\%" for n in range(5, 100, 5)), *(rf"\sqrt{{{n}}}" for n in range(3, 21)),
    *(rf"{n}\sqrt{{2}}" for n in range(2, 9)), *(rf"{n}\sqrt{{3}}" for n in range(1, 9)),
    *(rf"{n}\pi" for n in range(3, 13)), *(rf"\frac{{\pi}}{{{n}}}" for n in (2, 3, 4, 6)),
    *(f"2^{{{n}}}" for n in range(2, 21)), *(rf"x={n}" for n in range(1, 11)),
    *(f"({a},{b})" for a in range(-2, 3) for b in range(-2, 3)), *(rf"{n}\text{{ cm}}" for n in range(1, 11)),
    *(f"{n}:00" for n in range(1, 13)), *(rf"\${n}" for n in range(1, 11)), *(rf"\boxed{{{n}}}" for n in range(3)),
    *"tuvwyzkm", "abc", "x,y", "a+b", "ab", "x+y", "xy", "2x", "x+1", "x-1", "e^x", r"\sin x",
]  # fmt: skip


# Equal, and more than notation apart.
EQUAL = {
    (r"180^\circ", r"\pi"), ("f(n)=n", "f(x)=x"), ("f(z)=z", "f(x)=x"), (r"\text{east}", "E"), (r"(\text{H})", "H"),
    ("x=1, y=2", "1,2"), (r"\mbox{four}", "4"), (r"\frac12", r"\frac{1}{2}"), (r"\frac12", "0.5"),
    (r"\frac12", r"50\%"), (r"\frac12", "1:2"), (r"90^\circ", r"\frac{\pi}{2}"), (r"60^\circ", r"\frac{\pi}{3}"),
    (r"0.56 = 56\%", "56"), ("1,2", "(1,2)"), ("x=1, y=2", "(1,2)"),
}  # fmt: skip


def farmed(count: int) -> list[tuple[str, str]]:
    """(gold, guess) that is accepted, though the two are not the same when units, names and notation are left aside."""
    chosen = golds()
    random.Random(1).shuffle(chosen)
    found = []
    for gold in chosen[:count]:
        own = re.findall(r"\d+", gold)[:6]
        for guess in dict.fromkeys([*GUESSES, *own]):
            if decide(gold, guess).equal and not _alike(gold, guess) and (gold, guess) not in EQUAL:
                found.append((gold, guess))
    return found


def _alike(gold: str, guess: str) -> bool:
    values = [_plain(text) for text in (gold, guess)]
    if values[0] == values[1]:
        return True
    numbers = [_value(value) for value in values]
    if numbers[0] is None or numbers[1] is None:
        return False
    percents = ["%" in text for text in (gold, guess)]
    factors = {1} if percents[0] == percents[1] else {1, 100}
    return any(sympy.simplify(a * f - b) == 0 for f in factors for a, b in (numbers, numbers[::-1]))


def _plain(text: str) -> str:
    """A text without units, signs of money and percent, and the name of what it is the value of."""
    words = r"\\(?:text|mbox|mathrm|textnormal)\s*\{([^{}]*)\}(?:\^\{?\d\}?)?"
    text = re.sub(words, lambda m: m.group(1) if m.group() == text.strip() else "", text)
    text = re.sub(r"^(\d\d?):00$", r"\1", text)  # 7:00 for seven o'clock
    text = re.sub(r"_\{?\d+\}?\.?$", "", text)  # the base of digits
    text = re.sub(r"\\left|\\right|\\!|\\,|\\\$|\$|\\%|%|\^\{?\\circ\}?|,(?=\d{3}(?!\d))|\s|cm$", "", text)
    text = re.sub(r"\\[dt]?frac ?(\d) ?(\d)", r"\\frac{\1}{\2}", text).replace("four", "4")
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"^(-?)\.(?=\d)", r"\g<1>0.", text)
    text = re.sub(r"^(-?\d+),(\d+)$", r"\1.\2", text)  # a decimal comma
    return re.sub(r"^[A-Za-z]+(?:_\w)?(?:\([a-z]\))?=", "", text).strip(".").strip("()") or text


def _value(text: str) -> sympy.Expr | None:
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)
    text = re.sub(r"\\frac\{(-?\w+)\}\{(\w+)\}", r"(\1)/(\2)", text).replace(":", "/").replace("^", "**")
    text = re.sub(r"\*\*\{(\w+)\}", r"**\1", re.sub(r"\\boxed\{(\d+)\}", r"\1", text))
    text = re.sub(r"(?<=[\d)])\\(sqrt|pi)", r"*\\\1", text)
    text = re.sub(r"\\sqrt(?:\{(\d+)\}|(\d))", r"sqrt(\1\2)", text).replace("\\pi", "pi")
    text = re.sub(r"\\frac\{([^{}]+)\}\{([^{}]+)\}", r"(\1)/(\2)", text)
    if not re.fullmatch(r"(?:[-+*/().\d]|sqrt|pi)+", text):
        return None
    try:
        return sympy.radsimp(
            sympy.nsimplify(parse_expr(text), rational=None if "pi" in text or "sqrt" in text else True)
        )
    except Exception:
        return None


def test_cheap_guesses_are_right_only_where_they_are_equal() -> None:
    assert len(set(GUESSES)) > 500
    assert farmed(30) == []


@pytest.mark.slow
@pytest.mark.skipif(not FILES[0].is_file(), reason="the benchmarks' files are not here; set LLMDISTILL_DATA")
def test_cheap_guesses_over_a_thousand_golds() -> None:
    assert farmed(1_000) == []
