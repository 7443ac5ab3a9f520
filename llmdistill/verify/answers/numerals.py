"""Numbers in words and in other people's spellings: "three quarters", "two million", 1,50,000, 3,75, 413_5, 2:30 pm."""

from __future__ import annotations

import re
from fractions import Fraction

from llmdistill.verify.answers.notation import unwrap
from llmdistill.verify.answers.tree import Node, number
from llmdistill.verify.answers.values import Digits, Time
from llmdistill.verify.answers.vocabulary import words

_SMALL = words("""zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen""")
_TENS = words("twenty thirty forty fifty sixty seventy eighty ninety")
_VALUES = {w: i for i, w in enumerate(_SMALL)} | {w: 20 + 10 * i for i, w in enumerate(_TENS)}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "quadrillion": 10**15} | {
    "lakh": 10**5,
    "crore": 10**7,
}
_PART_TABLE = """2 half halves; 3 third thirds; 4 quarter quarters fourth fourths; 5 fifth fifths; 6 sixth sixths;
7 seventh sevenths; 8 eighth eighths; 9 ninth ninths; 10 tenth tenths; 11 eleventh elevenths; 12 twelfth twelfths;
15 fifteenth fifteenths; 16 sixteenth sixteenths; 20 twentieth twentieths; 100 hundredth hundredths;
1000 thousandth thousandths; 1000000 millionth millionths"""
_PARTS = {word: int(entry.split()[0]) for entry in _PART_TABLE.split(";") for word in entry.split()[1:]}
_ORDINALS = words("first second third fourth fifth sixth seventh eighth ninth")
_PARTS |= {f"{tens}{word}{end}": 10 * n + i for n, tens in enumerate(_TENS, 2) for i, word in enumerate(_ORDINALS, 1)
           for end in ("", "s")}  # fmt: skip
# The hyphen of a denominator: thirty-sixths, where thirty sixths are five.
_TENS_AND_PART = re.compile(rf"(?:^|[ -])({'|'.join(_TENS)})-((?:{'|'.join(_ORDINALS)})s?)$")


def words_number(text: str) -> Fraction | None:
    """The value of a number in English words: "minus twenty-five", "one and a half", "two thirds", "two million"."""
    text = text.lower().strip(" .")
    if text.startswith("-"):
        return None if (found := words_number(text[1:])) is None else -found
    text = _TENS_AND_PART.sub(lambda m: f" {m[1]}{m[2]}", text)
    tokens = [t for t in re.split(r"[\s-]+", text) if t]
    if not tokens or len(tokens) > 14:
        return None
    if tokens[0] in ("minus", "negative"):
        found = words_number(" ".join(tokens[1:]))
        return None if found is None else -found
    if tokens[-1] in _PARTS:
        return _with_fraction(tokens)
    if "point" in tokens:
        return _with_point(tokens)
    if tokens == ["a", "dozen"]:
        return Fraction(12)
    return _whole([t for t in tokens if t != "and"] if tokens[0] != "and" != tokens[-1] else [])


def _with_fraction(tokens: list[str]) -> Fraction | None:
    part = Fraction(1, _PARTS[tokens[-1]])
    head = tokens[:-1]
    if not head or head in (["a"], ["an"]):
        return part
    if "and" in head:  # "one and a half", "two and three quarters"
        at = len(head) - 1 - head[::-1].index("and")
        figures = len(head[:at]) == 1 and re.fullmatch(r"\d{1,9}", head[0])  # "1 and a half"
        whole, top = Fraction(head[0]) if figures else _whole(head[:at]), head[at + 1 :]
        above = Fraction(1) if top in (["a"], ["an"], []) else _whole(top)
        return None if whole is None or above is None else whole + above * part
    above = _whole(head)
    return None if above is None else above * part


def _with_point(tokens: list[str]) -> Fraction | None:
    """Three point one four."""
    at = tokens.index("point")
    whole, digits = _whole(tokens[:at]), [_VALUES.get(token, 10) for token in tokens[at + 1 :]]
    if whole is None or not digits or max(digits) > 9:
        return None
    return whole + sum((Fraction(digit, 10**place) for place, digit in enumerate(digits, 1)), Fraction(0))


def _whole(tokens: list[str]) -> Fraction | None:
    total = current = 0
    if not tokens:
        return None
    if tokens[0] == "a" and len(tokens) > 1:
        tokens = ["one", *tokens[1:]]
    last = 0
    for token in tokens:
        if token in _VALUES:
            value = _VALUES[token]
            if (last and not (last >= 20 > value > 0 and value < 10) and last < 100) or (
                value == 0 and len(tokens) > 1
            ):
                return None  # "two three" is no number
            current += value
            last = value
        elif token == "hundred" and 0 < current < 100 and current % 10:
            current, last = current * 100, 100
        elif token in _SCALES and current:
            total, current, last = total + current * _SCALES[token], 0, 0
        else:
            return None
    return Fraction(total + current)


_NUMBER_WORD = "|".join([*_VALUES, *_SCALES, "hundred"])
_NUMBER_WORDS = re.compile(rf"\b(?:{_NUMBER_WORD})(?:[- ](?:{_NUMBER_WORD}))*\b", re.I)


def in_figures(text: str) -> str:
    """A text with its numbers in words written in figures."""
    return _NUMBER_WORDS.sub(
        lambda m: str(found) if (found := words_number(m.group())) is not None else m.group(), text
    )


def scaled(text: str) -> Fraction | None:
    """The factor in words behind figures: "hundred", "million", "tenths"; None for other words."""
    word = text.lower().strip(" .-")
    if word in _PARTS and word not in ("second", "seconds"):
        return Fraction(1, _PARTS[word])
    if word == "hundred":
        return Fraction(100)
    return Fraction(_SCALES[word]) if word in _SCALES else None


def other_spellings(text: str) -> list[tuple[Node, bool]]:
    """Figures with grouping or a decimal comma, and whether it is the latter. That 1,234 may be a list is not said."""
    bare = text.lstrip("+-").strip()
    sign = -1 if text.lstrip().startswith("-") else 1
    found = []
    if re.fullmatch(
        r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?|[1-9]\d?(?:,\d\d)+,\d{3}(?:\.\d+)?|[1-9]\d{0,2}(?: \d{3})+(?:[.,]\d+)?",
        bare,
    ):
        figures = bare.replace(" ", "")
        figures = figures.replace(",", "") if "." in figures or " " not in bare else figures.replace(",", ".")
        places = len(figures.partition(".")[2])
        found.append((number(sign * Fraction(figures), places or None), False))
    if re.fullmatch(r"\d{1,3}(?:\.\d{3})+,\d{1,2}", bare):
        figures = bare.replace(".", "").replace(",", ".")
        found.append((number(sign * Fraction(figures), len(figures.partition(".")[2])), False))
    if re.fullmatch(r"\d+,\d+", bare) and (not re.search(r",\d{3}$", bare) or bare.startswith("0,")):
        figures = bare.replace(",", ".")
        found.append((number(sign * Fraction(figures), len(figures.partition(".")[2])), True))
    goes_on = len(bare) < 60 and bare.endswith((")", "...", r"\dots"))
    cycle = goes_on and re.fullmatch(r"(\d*\.\d*?)(?:\((\d+)\)|(\d+?)\3{2,}(?:\.\.\.| ?\\dots))", bare)
    if cycle:  # 0.(3), 0.333...
        fixed, digits = cycle[1], cycle[2] or cycle[3]
        places = len(fixed.partition(".")[2])
        whole = Fraction((fixed if fixed[0] != "." else "0" + fixed) + "0")
        found.append((number(sign * (whole + Fraction(int(digits), (10 ** len(digits) - 1) * 10**places))), False))
    if re.fullmatch(r"0\d+", bare):
        found.append((number(sign * Fraction(bare)), False))
    return found


_SPOKEN_TIMES = {"noon": "12:00 pm", "midnight": "12:00 am", "12 noon": "12:00 pm", "12 midnight": "12:00 am"}
_TIME = re.compile(r"(?P<h>\d{1,2})(?::(?P<m>\d{2}))?(?P<blank> ?)(?P<half>[ap] ?\.? ?m\.?|noon|midnight)?", re.I)


def read_time(text: str) -> Time | None:
    """A time of day; None for other texts. 5am without a blank is a product, and no time."""
    if len(text) > 40:
        return None
    plain = unwrap(text).replace("{", "").replace("}", "").strip(" .").removeprefix("at ")
    plain = re.sub(r"^(\d{1,2}) ?o'? ?clock\b", r"\1:00", _SPOKEN_TIMES.get(plain.lower(), plain), flags=re.I)
    past = _PAST.fullmatch(plain.lower())
    if past:
        hour, minutes = words_number(past["h"]), {"half": 30, "quarter": 15, "a quarter": 15}[past["part"]]
        sign = 1 if past["side"] == "past" else -1
        return None if hour is None or not 1 <= hour <= 12 else Time(int(60 * hour + sign * minutes), False)
    match = _TIME.fullmatch(plain)
    if not match or not (match["m"] or match["half"]):
        return None
    hours, minutes, half = int(match["h"]), int(match["m"] or 0), (match["half"] or "").lower()
    if hours > 24 or minutes > 59 or (half and not 1 <= hours <= 12):
        return None
    if half and not match["m"] and not match["blank"]:
        return None
    if half:
        hours = hours % 12 + (12 if half[0] == "p" or half == "noon" else 0)
    return Time(60 * hours + minutes, bool(half) or hours > 12)


_PAST = re.compile(r"(?P<part>half|(?:a )?quarter) (?P<side>past|to) (?P<h>[a-z]+|\d{1,2})")
_BASES = {w: str(i) for i, w in enumerate(_SMALL) if i > 1} | {
    "sixteen": "16",
    "binary": "2",
    "octal": "8",
    "hexadecimal": "16",
}
_BASED = re.compile(
    r"\(?(?P<digits>[0-9A-F]{1,200}|\d[\da-f]{0,199})\)?(?: ?_ ?\{? ?(?:base ?|\()?(?P<sub>\w+)\)? ?\}?"
    r"| ?\(? ?(?:in )?(?:base[ -]?(?P<word>\w+)|(?P<name>binary|octal|hexadecimal)) ?\)?)"
)
_PREFIXED = re.compile(r"0(?P<base>[xbo])(?P<digits>[0-9A-Fa-f]{1,200})")


def read_digits(text: str) -> Digits | None:
    """413_5, 413_{five}, 413 (base 5); None of digits without a base."""
    plain = unwrap(text)
    prefixed = _PREFIXED.fullmatch(plain)
    match = prefixed or _BASED.fullmatch(plain)
    if not match:
        return None
    base = (match["base"] if prefixed else match["sub"] or match["word"] or match["name"]).lower()
    base = {"x": "16", "b": "2", "o": "8"}[base] if prefixed else base
    base = _BASES.get(base, base)
    if not base.isdigit() or not 2 <= int(base) <= 36 or any(int(d, 36) >= int(base) for d in match["digits"]):
        return None
    return Digits(match["digits"].upper().lstrip("0") or "0", base)
