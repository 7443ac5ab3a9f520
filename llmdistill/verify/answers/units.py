r"""What stands behind a number: units with their dimensions, currencies, counts, and the words of a sentence.

A unit that is known has a vector of dimensions and a factor, so powers convert as powers: 1 m^2 is 10,000 cm^2. Words
that are no unit are the thing that was counted ("9 apples"). Words that make another statement of the number ("5
factorial", "5 or more", "not 5") make the text no quantity at all, and words that turn its direction (profit and loss,
north and south, AD and BC) are kept as its polarity.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from llmdistill.verify.answers.unit_tables import (
    COUNTS,
    CURRENCIES,
    FILLER,
    GLUED,
    HAN,
    NO_UNIT,
    POLARITIES,
    TURNED,
    UNITS,
    WEAK,
    Dimensions,
)


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit.

    Attributes:
        dimensions: base dimension and its exponent, sorted; () of words that are no known unit.
        factor: to the base units. Of an angle in degrees, that of a degree.
        words: the words that are no unit, in their singular, lower case.
        polarity: words that turn the meaning.
        percent: a percent sign.
        weak: a bare letter behind a blank, "5 m", which may be a variable.
        count: 12 of a dozen, which may be the unit or part of the number.
    """

    dimensions: Dimensions = ()
    factor: Fraction = Fraction(1)
    words: frozenset[str] = frozenset()
    polarity: frozenset[str] = frozenset()
    percent: bool = False
    weak: bool = False
    count: int = 0


def parse_unit(text: str, *, wrapped: bool = False, glued: bool = False, head_is_number: bool = True) -> Unit | None:
    r"""A unit's text, in plain words; None where it is no unit.

    Args:
        text: what stands behind the number, without \text and its kin.
        wrapped: whether it stood in \text or \mathrm, which says that it is no product of variables.
        glued: whether it follows the number without a blank.
        head_is_number: whether what it stands behind has no symbols of its own.
    """
    text = re.sub(r"\\frac ?\{([^{}]*)\} ?\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"\b(above|below) (?:zero|freezing)\b", r"\1", text)
    if re.search(r"\\(?!mu\b|cdot\b|circ\b|Omega\b|text|mathrm|times\b)[A-Za-z]", text):
        return None  # \hbar, \lambda and \infty are no units
    text = re.sub(r"\\Omega\b", "Ω", text).replace("\\", " ").replace("~", " ").strip(" .,")
    text = re.sub(r" (?=\^)", "", text)
    percent = re.fullmatch(r"(?:%|percent(?:age)?(?: points?)?|per ?cent|pct)\b ?(?P<rest>.*)", text, re.I) or (
        re.fullmatch(r"%(?P<rest>.*)", text)
    )
    if percent:
        rest = parse_unit(percent["rest"], wrapped=True) if percent["rest"].strip() else Unit()
        return None if rest is None else Unit(rest.dimensions, rest.factor, rest.words, rest.polarity, percent=True)
    if text in CURRENCIES:
        text = CURRENCIES[text]
    text = re.sub(r"^ ?\^ ?\{? ?circ ?\}?", "degree ", text).strip()
    text = re.sub(r"^degree ?(?=[CF]$)", "°", text)
    text = re.sub(r"(?<![A-Za-z])degrees? ?(?:C|celsius|centigrade)\b", "celsius", text, flags=re.I)
    text = re.sub(r"(?<![A-Za-z])degrees? ?(?:F|fahrenheit)\b", "fahrenheit", text, flags=re.I)
    if not text or len(text) > 80:
        return None
    han = re.fullmatch(r"[\u3400-\u9fff]+", text)
    if han:
        text = HAN.get(text, text)
    unnamed = re.fullmatch(r"(?P<power>sq(?:uare)?\.?|cu(?:bic)?\.?) units?\.?", text)
    if unnamed:
        return Unit((("unit", 2 if unnamed["power"].startswith("s") else 3),))
    known = _known(text)
    if known is not None:
        return _careful(known, text, wrapped, glued, head_is_number)
    return _words(text, wrapped, glued)


def _careful(unit: Unit, text: str, wrapped: bool, glued: bool, head_is_number: bool) -> Unit | None:
    """A known unit that is bare: letters that may be variables are none, or weak."""
    names = re.findall(r"[A-Za-z]+", text.replace("cdot", " "))
    if wrapped or not names or re.search(r"[^\x00-\x7f]", text) or text in ("m/s", "m/s^2", "N/m", "J/K", "V/m"):
        return unit
    if max(map(len, names)) > 1:
        sure = head_is_number and (not glued or names[0] in GLUED)
        return unit if sure or max(map(len, names)) > 3 else Unit(unit.dimensions, unit.factor, weak=True)
    if glued or not head_is_number or not set(names) <= WEAK:
        return None
    return Unit(unit.dimensions, unit.factor, weak=not re.search(r"\^|/", text))


def _known(text: str) -> Unit | None:
    """A product or quotient of known units."""
    text = re.sub(r"\b(?:squared?|sq\.?) (?=[a-z])", "square ", text, flags=re.I)
    text = re.sub(r"\bcu\.? (?=[a-z])", "cubic ", text, flags=re.I)
    text = re.sub(
        r"\s*(?:\bper\b|\ba\b(?= (?:day|week|hour|minute|second|month|year)\b)|\ban\b(?= hour))\s*", "/", text
    )
    text = re.sub(r"\bcdot\b|·|\*|-(?=[A-Za-z])", " ", text)
    text = re.sub(r"\^ ?\{ ?([-+]?\d) ?\}|\^ ?([-+]?\d)", lambda m: "^" + (m.group(1) or m.group(2)), text)
    text = re.sub(r"(?<![A-Za-z])mu ?(?=[a-zA-Z]\b)", "μ", text).replace("{", " ").replace("}", " ")
    total: dict[str, int] = {}
    factor = Fraction(1)
    sign, power, inside = 1, 1, False
    for word in re.findall(r"[A-Za-zμΩÅ°¢€£¥₹\u3400-\u9fff]+(?:\^[-+]?\d)?|[/()]|\S", text):
        if word == "/":
            sign = -1
        elif word == "(":
            inside = True
        elif word == ")":
            inside, sign = False, 1
        elif word in ("square", "cubic"):
            power = 2 if word == "square" else 3
        else:
            name, _, exponent = word.partition("^")
            found = _lookup(name)
            if found is None or exponent.strip("+-") == "0":
                return None
            times = sign * power * int(exponent or 1)
            for dimension, e in found[0]:
                total[dimension] = total.get(dimension, 0) + e * times
            factor *= found[1] ** times
            power, sign = 1, sign if inside else 1
    dims = tuple(sorted((d, e) for d, e in total.items() if e))
    return Unit(dims, factor) if dims and power == 1 else None


def _lookup(name: str) -> tuple[Dimensions, Fraction] | None:
    for form in (name, name.lower() if len(name) > 3 else name):
        if form in UNITS:
            return UNITS[form]
        if len(form) > 3 and form.endswith("s") and form[:-1] in UNITS and len(form) > 4:
            return UNITS[form[:-1]]
    return None


def _words(text: str, wrapped: bool, glued: bool) -> Unit | None:
    """The counted thing, in words."""
    if re.search(r"[^\w\s./'()°-]|[_\d]", text):
        return None
    text = re.sub(r"^(?:sq|cu)\b\.? ?(?=[a-z])", "square ", text)
    words = [w for w in re.split(r"[\s./()-]+", text) if w]
    lower = [w.lower() for w in words]
    if lower == ["times"]:
        return Unit(words=frozenset({"time"}))
    if not words or len(words) > 12 or set(lower) & NO_UNIT or any(w.endswith("n't") for w in lower):
        return None
    ascii_word = words[0].isascii()
    of_it = lower[0] == "of" and len(lower) > 1 and not glued  # "1/2 of the pizza"
    short = len(words[0]) < 3 and not of_it
    if not wrapped and ascii_word and (glued or short) and (words[0] not in UNITS or len(words[0]) < 2):
        return None
    if wrapped and len(words) == 1 and len(words[0]) == 1 and words[0] not in UNITS:
        return None
    known, rest = _leading_unit(words)
    polarity = frozenset(POLARITIES[w] for w in lower if w in POLARITIES) | _side(lower)
    count = next((COUNTS[w] for w in lower if w in COUNTS), 0)
    things = frozenset(
        _singular(w) for w in (r.lower() for r in rest) if w not in FILLER and w not in POLARITIES and w not in COUNTS
    )
    base = known or Unit()
    return Unit(base.dimensions, base.factor, things, polarity, count=count)


_OBLIQUE = re.compile(r"\b(north|south|east|west) (?:of|by) (?:due )?(north|south|east|west)\b")


def _side(words: list[str]) -> frozenset[str]:
    """Left, where it is a side and not what remains; and which of two directions is turned towards which."""
    text = " ".join(words)
    oblique = _OBLIQUE.search(text)
    if oblique:
        return frozenset({oblique.group(), "compass"})
    return (
        frozenset({"left"})
        if re.search(r"\b(?:the|units?|steps?|spaces?|squares?|blocks?) left\b", text)
        else frozenset()
    )


def _leading_unit(words: list[str]) -> tuple[Unit | None, list[str]]:
    """A known unit in front of other words, "5 inches of rain"."""
    for size in range(min(4, len(words)), 0, -1):
        head = " ".join(words[:size])
        found = _known(head) if len(head) > 1 else None
        if found is not None:
            return found, words[size:]
    return None, words


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if re.search(r"(?:s|x|z|ch|sh)es$", word):
        return word[:-2]
    return {"people": "person", "men": "man", "women": "woman", "children": "child", "feet": "foot"}.get(
        word, word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word
    )


def turned(polarity: frozenset[str]) -> bool:
    """Whether a direction is not the one that a bare number has."""
    return bool(polarity & TURNED)
