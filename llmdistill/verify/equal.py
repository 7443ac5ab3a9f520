"""Whether two answers are the same.

Plain kinds (numbers with units, times, option letters, words) are compared by rules that need no algebra and are
bounded in time; `quickly` decides those. The rest goes to math-verify, which may take for ever on hostile input:
`thoroughly` runs in worker processes only (workers.py).

math-verify is given both sides wrapped in \\boxed, the gold first, with float_rounding 6, as EVALUATION section 10
found best. What it lets pass and our rules do not: numbers below 1e-6 count as zero there, words are products of
letters ("east" = "seat"), and the subscripts of bases are dropped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from llmdistill.errors import UserError
from llmdistill.verify import answer_text as read
from llmdistill.verify.extract import Extraction, extract

Kind = Literal["math", "choice"]
SHORT = 200
ROUNDING = 6


@dataclass(frozen=True)
class Decision:
    """Whether two answers are equal, and the rule that said so."""

    equal: bool
    rule: str


def gold_answer(gold: str) -> str:
    """The answer in a gold: the gold itself, or what a worked solution given in its place states."""
    prose = len(gold) > SHORT and re.search(r"\b[A-Za-z]{3,20} [A-Za-z]{2,20} [A-Za-z]", gold[:2000])
    if prose or "boxed" in gold or "####" in gold:
        return extract(gold).answer or gold
    return gold


def word_in_conclusion(prediction: str, gold: str) -> str | None:
    """A gold that is one word, as the last sentence of an unmarked completion names it; None where it does not.

    The sentence must name no other candidate: no second proper noun, no negation, no comparison.
    """
    word = read.unwrap(read.tidy(gold))
    if not re.fullmatch(r"[^\W\d_]{3,30}", word):
        return None
    sentences = [s for s in re.split(r"(?<=[.!?])\s+|\n+", prediction[-4000:].strip()) if s.strip()]
    if not sentences:
        return None
    last = re.sub(r"[*_`$\\]", "", sentences[-1])
    words = re.findall(r"[^\W\d_]+(?:['’]\w+)?", last)
    if sum(w.lower() == word.lower() for w in words) != 1:
        return None
    if re.search(
        r"\b(?:not|no|nor|neither|rather|instead|unless|whether|either|or|than|but|if|cannot)\b|n['’]t\b", last, re.I
    ):
        return None
    # "Navin from Mauritius": the place is no other candidate.
    named = re.sub(r"\b(?:from|of|in|at)\s+[^\W\d_]+", "", last)
    others = [
        w for w in re.findall(r"[^\W\d_]+", named)[1:] if w.istitle() and len(w) > 1 and w.lower() != word.lower()
    ]
    kin = next((kin for kin in _KIN if word.lower() in kin), frozenset())
    if others or any(w.lower() in kin and w.lower() != word.lower() for w in words) or (not kin and not word.istitle()):
        return None
    return word


_KIN = [
    frozenset(words.split())
    for words in (
        "north south east west northeast northwest southeast southwest",
        "monday tuesday wednesday thursday friday saturday sunday",
        "january february march april may june july august september october november december",
        "red orange yellow green blue purple violet black white brown pink gray grey",
        "even odd neither both", "yes no", "true false", "increasing decreasing constant",
        "circle ellipse parabola hyperbola line point plane sphere cone cylinder", "left right up down",
    )
]  # fmt: skip


def quickly(gold: str, answer: str, *, kind: Kind = "math", tolerance: float | None = None) -> Decision | None:
    """The verdict on two answers by rules that are bounded in time; None where algebra must decide."""
    if len(gold) > SHORT or len(answer) > SHORT:
        return Decision(True, "same text") if gold.strip() == answer.strip() != "" else None
    return _plainly(read.tidy(gold), read.tidy(answer), kind, tolerance)


def _plainly(gold: str, answer: str, kind: Kind, tolerance: float | None) -> Decision | None:
    if not answer or not gold:
        return Decision(False, "nothing to compare")
    if kind == "choice":
        letters = read.read_letter(gold.upper()), read.read_letter(answer.upper() if len(answer) < 5 else answer)
        if letters[0] and letters[1]:
            return Decision(letters[0] == letters[1], "option letter")
    if read.compact(gold) == read.compact(answer):
        return Decision(True, "same text")
    gold, answer = _without_assignment(gold, answer)
    times = read.read_time(gold), read.read_time(answer)
    if times[0] and times[1] and (times[0][1] or times[1][1]):
        return Decision(_same_time(times[0], times[1]), "time of day")
    numbers = read.read_number(gold), read.read_number(answer)
    if numbers[0] and numbers[1]:
        return Decision(same_number(numbers[0], numbers[1], tolerance), "number")
    hours = (times[0], numbers[1]) if times[0] else (times[1], numbers[0])
    if hours[0] and hours[1] and not hours[1].unit and not hours[1].percent:
        # "2:00 pm" for 2: the hour of a twelve-hour clock.
        return Decision(hours[0][0] % 60 == 0 and hours[1].value == (hours[0][0] // 60 - 1) % 12 + 1, "hour")
    if numbers[0] and "=" in answer and "=" not in gold:
        result = read.read_number(answer.rpartition("=")[2].strip())  # what a chain of equations comes to
        if result and same_number(numbers[0], result, tolerance):
            return Decision(True, "number")
    durations = read.read_duration(gold), read.read_duration(answer)
    if (durations[0] and (durations[1] or numbers[1])) or (durations[1] and numbers[0]):
        return Decision(_same_duration(*durations, *numbers), "duration")
    if (numbers[0] and _decimal_comma(answer, numbers[0])) or (numbers[1] and _decimal_comma(gold, numbers[1])):
        return Decision(True, "decimal comma")
    bases = _with_base(gold), _with_base(answer)
    if bases[0] and bases[1] and (bases[0][1] or bases[1][1]):
        same = bases[0][0] == bases[1][0] and (not bases[0][1] or not bases[1][1] or bases[0][1] == bases[1][1])
        return Decision(same, "digits in a base")
    letters = read.read_letter(gold), read.read_letter(answer)
    if letters[0] and letters[1]:
        return Decision(letters[0] == letters[1], "option letter")
    words = _DIRECTIONS.get(gold, read.read_words(gold)), _DIRECTIONS.get(answer, read.read_words(answer))
    if words[0] and words[0] == words[1]:
        return Decision(True, "same words")
    if words[0] and words[1] and _is_word(words[0]) and _is_word(words[1]):
        return Decision(False, "other words")
    return None


def _is_word(text: str) -> bool:
    return bool(re.fullmatch(r"[^\W\d_]{4,}(?: [^\W\d_]+)*", text)) and not re.search(r"\b(?:and|or)\b", text)


_DIRECTIONS = {"N": "north", "S": "south", "E": "east", "W": "west"}
_ASSIGNMENT = re.compile(r"[A-Za-z](?:_(?:\{\w{1,8}\}|\w))?(?: ?\([a-z0-9]{1,3}\))? ?= ?(?P<value>[^=<>]+)")


def _without_assignment(gold: str, answer: str) -> tuple[str, str]:
    """The two without "x =", where only one of them has it, or where they name a function as y and as f(x)."""
    found = _ASSIGNMENT.fullmatch(gold), _ASSIGNMENT.fullmatch(answer)
    if found[0] and found[1]:
        names = gold.split("=")[0], answer.split("=")[0]
        if ("(" in names[0]) != ("(" in names[1]) and "y" in (names[0].strip(), names[1].strip()):
            return found[0]["value"].strip(), found[1]["value"].strip()
    elif found[0] and not re.search(r"[=<>]", answer):
        return (found[0]["value"].strip(), answer) if "," not in found[0]["value"] else (gold, answer)
    elif found[1] and not re.search(r"[=<>]", gold):
        return (gold, found[1]["value"].strip()) if "," not in found[1]["value"] else (gold, answer)
    return gold, answer


def same_number(gold: read.Number, answer: read.Number, tolerance: float | None = None) -> bool:
    """Whether two numbers are equal, what units and percent signs they carry taken into account.

    A unit that one side leaves out is no difference; two units of one dimension are converted; a percent sign that one
    side leaves out may mean 28 or 0.28. Decimals agree if they do to 6 places and in 5 digits.
    """
    units = read.known_unit(gold.unit), read.known_unit(answer.unit)
    values = [gold.value], [answer.value]
    if gold.percent != answer.percent:
        side = values[0] if gold.percent else values[1]
        side.append(side[0] / 100)
    if units[0] and units[1]:
        if units[0][0] != units[1][0]:
            return False
        values = [gold.value * units[0][1]], [answer.value * units[1][1]]
    elif bool(gold.unit) != bool(answer.unit):
        for unit, side in zip(units, values, strict=True):
            if unit and unit[0] == "count":
                side.append(side[0] * unit[1])  # 3 dozen are 36
    return any(_close(a, b, gold.decimal or answer.decimal, tolerance) for a in values[0] for b in values[1])


def _close(gold: Fraction, answer: Fraction, decimal: bool, tolerance: float | None) -> bool:
    difference = abs(gold - answer)
    if difference == 0 or (tolerance is not None and difference <= Fraction(tolerance)):
        return True
    if not decimal or difference > Fraction(1, 10**ROUNDING):
        return False
    return difference <= Fraction(1, 10**5) * max(abs(gold), abs(answer)) and round(gold, ROUNDING) == round(
        answer, ROUNDING
    )


def _same_time(gold: tuple[int, bool], answer: tuple[int, bool]) -> bool:
    """am and pm are a unit: who leaves them out has said the same time of a twelve-hour clock."""
    if gold[1] and answer[1]:
        return gold[0] == answer[0]
    return gold[0] % 720 == answer[0] % 720


def _same_duration(
    gold: dict[str, Fraction] | None,
    answer: dict[str, Fraction] | None,
    number: read.Number | None,
    other: read.Number | None,
) -> bool:
    """18 h 48 min is 1128 in minutes and 18.8 in hours."""
    if gold and answer:
        shared = set(gold) & set(answer)
        return any(gold[u] == answer[u] for u in shared)
    duration, plain = (gold, other) if gold else (answer, number)
    assert duration and plain
    unit = read.known_unit(plain.unit)
    if unit and unit[0] == "time":
        key = next(iter(duration))
        seconds = duration[key] * {"d": 86400, "h": 3600, "m": 60, "s": 1}[key]
        return seconds == plain.value * unit[1]
    return not plain.percent and not unit and plain.value in duration.values()


def _decimal_comma(text: str, other: read.Number) -> bool:
    """Whether "1,22" is the decimal 1.22 that the other side wrote. "1,222" is a thousand and more."""
    match = re.fullmatch(r"(\d+),(\d+)", text)
    if not match or not other.decimal or (len(match[2]) == 3 and match[1] != "0"):
        return False
    return Fraction(f"{match[1]}.{match[2]}") == other.value


def _with_base(text: str) -> tuple[str, str] | None:
    match = re.fullmatch(r"\(?([0-9A-F]{1,40})\)?(?: ?_ ?\{? ?(?:\\text ?\{)?(\d{1,2})\}{0,2})?", text)
    return (match[1], match[2] or "") if match else None


# The library ----------------------------------------------------------------------------------------------------------

_library: Any = None


def library() -> Any:
    """math-verify, quiet. UserError without it."""
    global _library
    if _library is None:
        try:
            import math_verify
        except ImportError as error:
            raise missing_library() from error
        import logging

        for name in ("math_verify", "latex2sympy2_extended"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        _library = math_verify
    return _library


def missing_library() -> UserError:
    return UserError(
        "judging maths answers needs the package math-verify, which is not installed: pip install 'llmdistill[eval]'"
    )


def thoroughly(gold: str, answer: str, *, kind: Kind = "math", tolerance: float | None = None) -> Decision:
    """The verdict on two answers by every rule there is. May hang: for worker processes only."""
    decided = quickly(gold, answer, kind=kind, tolerance=tolerance)
    if decided is not None:
        return decided
    gold, answer = read.tidy(gold), read.tidy(answer)
    decided = _plainly(gold, answer, kind, tolerance) if max(len(gold), len(answer)) <= SHORT else None
    if decided is not None:
        return decided
    gold, answer = _without_assignment(gold, answer)
    shapes = _shape(gold), _shape(answer)
    if {shapes[0][0], shapes[1][0]} == {"set", "tuple"}:
        return Decision(False, "a set is no tuple")
    if shapes[0][0] == shapes[1][0] == "list" and shapes[0][1] != shapes[1][1]:
        return Decision(False, "lists of different lengths")  # math-verify makes sets of them: 5, 3, 3 would be 5, 3
    return Decision(_algebra(gold, answer), "math-verify")


def _shape(text: str) -> tuple[str, int]:
    """("set", n) of \\{...\\}, ("tuple", n) of (...), ("list", n) of bare elements, ("", 0) of anything else."""
    if re.fullmatch(r"\\\{[^{}()\[\]]*,[^{}()\[\]]*\\\}", text):
        return "set", text.count(",") + 1
    if re.fullmatch(r"\([^()\[\]]*,[^()\[\]]*\)", text):
        return "tuple", text.count(",") + 1
    elements = re.split(r",|\band\b|\bor\b", read.unwrap(text))
    if len(elements) > 1 and all(read.read_number(element.strip()) for element in elements if element.strip()):
        return "list", sum(bool(element.strip()) for element in elements)
    return "", 0


def _for_library(text: str) -> str:
    text = re.sub(r"\\(?:text|mathrm|textnormal)\s*\{\s*,?\s*(?:and|or)\s*\}|\b(?:and|or)\b", ",", text)
    text = re.sub(r",(\s*,)+", ",", text)
    if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])", text):
        # The library drops degree signs, which is right of an angle by itself and wrong inside of a sine.
        text = re.sub(r"(\d+(?:\.\d+)?) ?\^ ?(?:\{ ?\\circ ?\}|\\circ)", r"(\\frac{\1 \\pi}{180})", text)
    text = re.sub(r"(?<=[\d)}])i(?![A-Za-z])", " i", text)  # "2i" is read as a variable, "2 i" as the imaginary unit
    text = re.sub(r"(?<![A-Za-z\\])i ?\(", r"i \\cdot (", text)  # nor is i a function
    text = re.sub(r"(?<![A-Za-z\\])i ?\(", r"i \\cdot (", text)  # nor is i a function
    text = _both_signs(read.without_unit(text))
    # Braces alone group in LaTeX; around a list they were meant as a set.
    if re.fullmatch(r"\{[^{}]*,[^{}]*\}", text):
        text = "\\" + text[:-1] + "\\}"
    return text


def _both_signs(text: str) -> str:
    """ "(1 \\pm x)/2" as the two that it stands for. math-verify expands the sign only where it stands outside."""
    if text.count(r"\pm") != 1 or r"\mp" in text or "," in text:
        return text
    return ", ".join(text.replace(r"\pm", sign) for sign in "+-")


def _algebra(gold: str, answer: str) -> bool:
    lib = library()
    parsed = [_parse(text) for text in (gold, answer)]
    for this, other, text in ((0, 1, gold), (1, 0, answer)):
        pieces = re.split(r"\\text ?\{ ?or ?\}|\bor\b", text)
        if (
            len(pieces) > 1
            and r"\cup" in (gold, answer)[other]
            and all(re.search(r"[<>]|\\[lg]e\b", p) for p in pieces)
        ):
            # "x < 1 or x > 2" against a union of intervals
            sets = [piece[0].as_set() for piece in map(_parse, pieces) if piece and hasattr(piece[0], "as_set")]
            if len(sets) == len(pieces):
                parsed[this] = [sets[0].union(*sets[1:])]
    options = {"float_rounding": ROUNDING, "allow_set_relation_comp": True, "timeout_seconds": None}
    if lib.verify(*parsed, **options):
        return True
    imaginary = [[_with_imaginary_unit(found) for found in side] for side in parsed]
    return imaginary != parsed and bool(lib.verify(*imaginary, **options))


def _with_imaginary_unit(found: Any) -> Any:
    """What was parsed, with i for the imaginary unit: to math-verify it is a variable, and i(2 - i) not 1 + 2i."""
    from sympy import Expr, I

    # Expressions only: relations and sets evaluate to true, false or something else when they are touched.
    symbols = [symbol for symbol in found.free_symbols if str(symbol) == "i"] if isinstance(found, Expr) else []
    return found.subs({symbol: I for symbol in symbols}).doit() if symbols else found


def _parse(text: str) -> list[Any]:
    lib = library()
    rules = [lib.LatexExtractionConfig(boxed_match_priority=0), lib.ExprExtractionConfig()]
    return list(lib.parse(f"$\\boxed{{{_for_library(text)}}}$", rules, parsing_timeout=None))


@dataclass(frozen=True)
class Found:
    """What judging one completion came to. The decision is None where there was no answer to decide on."""

    extraction: Extraction
    decision: Decision | None


def find(prediction: str, gold: str, *, kind: Kind, last_number: bool) -> Extraction:
    """The answer of a completion. The gold matters only where it is a word and the completion has no marked answer."""
    extraction = extract(prediction, kind=kind, last_number=last_number)
    if last_number and extraction.stage in ("last_number", "last_math", "conclusion", "none"):
        word = word_in_conclusion(prediction, gold_answer(gold))
        if word is not None:
            return Extraction(word, "concluding_word")
    return extraction


def judge_quickly(
    prediction: str, gold: str, *, kind: Kind, last_number: bool, tolerance: float | None
) -> Found | None:
    """Extraction and, where the rules that are bounded suffice, the verdict; None where they do not."""
    extraction = find(prediction, gold, kind=kind, last_number=last_number)
    if extraction.answer is None:
        return Found(extraction, None)
    if extraction.parts:
        return None
    decision = quickly(gold_answer(gold), extraction.answer, kind=kind, tolerance=tolerance)
    return None if decision is None else Found(extraction, decision)


def compare_all(
    gold: str,
    answer: str,
    parts: tuple[str, ...] = (),
    *,
    kind: Kind = "math",
    tolerance: float | None = None,
    both_ways: bool = False,
) -> Decision:
    """The verdict on an answer that may have stood in several boxes. May hang: for worker processes only.

    Boxes in a row are the elements of one answer, or one answer said twice ("\\boxed{9 6/7} or \\boxed{69/7}").
    """
    gold = gold_answer(gold)
    decision = thoroughly(gold, answer, kind=kind, tolerance=tolerance)
    if not decision.equal and both_ways:
        decision = thoroughly(answer, gold, kind=kind, tolerance=tolerance)
    if not decision.equal and parts:
        each = [thoroughly(gold, part, kind=kind, tolerance=tolerance) for part in parts]
        if all(one.equal for one in each):
            return each[-1]
    return decision
