"""Reading an extracted answer: tidying its notation, and the plain kinds of answer that need no algebra.

Every function here is bounded: no reading evaluates a power, and numbers longer than 60 characters are left to the
worker processes.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

LONGEST_NUMBER = 60
LARGEST_EXPONENT = 400

_UNICODE = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "π": r"\pi ", "∞": r"\infty ", "±": r"\pm ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "°": r"^\circ ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
    "∅": r"\emptyset ", "⁄": "/", "∕": "/", "’": "'", "“": '"', "”": '"', "…": r"\ldots ", "ℝ": r"\mathbb{R}",
    "√": r"\sqrt ", "％": "%", "，": ",", "（": "(", "）": ")", "：": ":", "\u200b": "", "\ufeff": "", "\x00": "",
}  # fmt: skip
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_VULGAR = {c: f"\\frac{{{n}}}{{{d}}}" for c, n, d in (
    ("½", 1, 2), ("⅓", 1, 3), ("⅔", 2, 3), ("¼", 1, 4), ("¾", 3, 4), ("⅕", 1, 5), ("⅖", 2, 5), ("⅗", 3, 5), ("⅘", 4, 5),
    ("⅙", 1, 6), ("⅚", 5, 6), ("⅛", 1, 8), ("⅜", 3, 8), ("⅝", 5, 8), ("⅞", 7, 8),
)}  # fmt: skip
_TABLE = {ord(k): v for k, v in (_UNICODE | _VULGAR).items()}
_TEXT = r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mbox|hbox|operatorname|rm|bf)\s*"
_WRAPPED = re.compile(_TEXT + r"\{([^{}]*)\}")
_DOUBLED = re.compile(
    r"\\\\(?=(?:frac|dfrac|tfrac|left|right|sqrt|text|begin|end|pi|le|ge|circ|times|cdot|boxed|pm)\b)"
)


def tidy(text: str) -> str:
    """One spelling for what is written in many: Unicode signs, Markdown, math delimiters, spacing commands."""
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda m: "^{" + m.group().translate(_SUPERSCRIPT) + "}", text)
    text = re.sub(r"√\s*\(([^()]*)\)|√\s*(\d+|[A-Za-z])", lambda m: r"\sqrt{" + (m.group(1) or m.group(2)) + "}", text)
    text = unicodedata.normalize("NFKC", text.translate(_TABLE))
    if _DOUBLED.search(text) and not re.search(r"(?<!\\)\\[A-Za-z]", text):
        text = text.replace("\\\\", "\\")  # a LaTeX string that was escaped once too often
    text = text.replace("**", "").replace("`", "").strip().strip("*_").strip()
    text = re.sub(r"(?<!\\)\\[\[\]()]", " ", text)
    text = re.sub(r"\\+(?:boxed|fbox|framebox)\s*\{", "{", text)
    text = re.sub(r"\\text\{ ?([:;,./%-]) ?\}", r"\1", text).replace(r"\varnothing", r"\emptyset ")
    text = re.sub(r"\\(?:mathbf|textbf|boldsymbol|bm)\s*\{([^{}]*)\}", _unbold, text)
    text = re.sub(r"\\\$|\$", "", text)
    text = text.replace(r"\%", "%").replace("{,}", ",")
    text = re.sub(r"(?<=\d),? ?\\[!,] ?(?=\d{3}(?!\d))", ",", text).replace(r"\!", "")
    text = re.sub(
        r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~|\\(?:displaystyle|limits|bigl?|bigr|Bigl?|Bigr)(?![A-Za-z])", " ", text
    )
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\(?:left|right)(?![A-Za-z.])", "", text)
    text = re.sub(r"\\(?:geq|geqslant)(?![A-Za-z])", r"\\ge", text)
    text = re.sub(r"\\(?:leq|leqslant)(?![A-Za-z])", r"\\le", text)
    text = re.sub(r"\\%", "%", text)
    text = re.sub(r"\s+", " ", text).strip()
    while len(text) > 1 and text[-1] in ".,;:" and not text.endswith(".."):
        text = text[:-1].rstrip()
    return _unbrace(text)


def _unbold(match: re.Match[str]) -> str:
    """What stood in bold. Typesetters space digits out, \\mathbf{1 0 2 , 0 1 8}."""
    held = match.group(1)
    spaced = re.fullmatch(r"\d(?: ?[\d,.])+", held.strip()) and not re.search(r"\d\d", held)
    return held.replace(" ", "") if spaced else f" {held} "


def _unbrace(text: str) -> str:
    """Without the braces around all of it."""
    while len(text) > 2 and text[0] == "{" and text[-1] == "}" and "{" not in text[1:-1] and "," not in text:
        text = text[1:-1].strip()
    return text


def compact(text: str) -> str:
    """A tidy text without blanks, for comparing as strings. Blanks that end a command stay."""
    return re.sub(r"(\\[A-Za-z]+) (?=[A-Za-z])|\s", lambda m: m.group(1) + " " if m.group(1) else "", text)


def unwrap(text: str) -> str:
    """A tidy text with \\text{...} and its kin replaced by what they hold."""
    return re.sub(r"\s+", " ", _WRAPPED.sub(r" \1 ", text)).strip()


# Numbers ------------------------------------------------------------------------------------------------------------

_INTEGER = r"\d+"
_GROUPED = r"[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+)(?!\d)"
_DECIMAL = rf"(?:(?:{_GROUPED}|{_INTEGER})(?:\.\d*)?|\.\d+)"
_PLAIN = re.compile(rf"(?P<plain>{_DECIMAL})(?![\d.])")
_REPEATING = re.compile(r"(?P<whole>\d*)\.(?P<fixed>\d*)\\overline\s*\{?(?P<cycle>\d+)\}?")
_SLASH = re.compile(rf"(?:(?P<whole>\d+) )?\(?(?P<top>-?{_DECIMAL})\)? ?/ ?\(?(?P<bottom>{_DECIMAL})\)?(?![\d.])")
_FRAC = re.compile(
    rf"(?P<whole>{_INTEGER})? ?\\frac ?(?:\{{ ?(?P<top>-?{_DECIMAL}) ?\}}|(?P<top1>\d)) ?"
    rf"(?:\{{ ?(?P<bottom>-?{_DECIMAL}) ?\}}|(?P<bottom1>\d))"
)
_SCIENTIFIC = re.compile(
    rf"(?:(?P<head>{_DECIMAL}) ?(?:\\times|\\cdot|\*|x) ?)?10 ?(?:\^|\*\*) ?"
    r"(?:\{ ?(?P<e1>[-+]?\d{1,4}) ?\}|\(?(?P<e2>[-+]?\d{1,4})\)?)"
)
_E_NOTATION = re.compile(rf"(?P<head>{_DECIMAL})[eE](?P<e>[-+]?\d{{1,4}})(?![\d.])")
_CURRENCY = re.compile(r"^(?:US ?|USD ?|EUR ?)?[$€£¥₹]? ?")


@dataclass(frozen=True)
class Number:
    """A number as it was written.

    Attributes:
        value: its value, percent sign and unit left aside.
        decimal: written with a decimal point, so perhaps rounded.
        percent: followed by a percent sign.
        unit: the words after it, lower case; "" without.
    """

    value: Fraction
    decimal: bool = False
    percent: bool = False
    unit: str = ""


def read_number(tidied: str) -> Number | None:
    """The number, with its currency, percent sign or unit, that a tidy text is; None if it is anything else."""
    if not tidied or len(tidied) > 2 * LONGEST_NUMBER:
        return None
    text = unwrap_unit(tidied)
    sign = 1
    if re.fullmatch(r"\([^()]*\)", text):
        text = text[1:-1].strip()
    text = _CURRENCY.sub("", text)
    if text[:1] in "+-":
        sign = -1 if text[0] == "-" else 1
        text = _CURRENCY.sub("", text[1:].lstrip())
    text = text.replace("€", " €").replace("£", " £").strip()
    found = _head(text)
    if found is None:
        spelt = words_number(text)
        if spelt is not None:
            return Number(sign * Fraction(spelt))
        first, _, after = text.partition(" ")
        spelt = words_number(first)
        if spelt is None:
            return None
        value, decimal, rest = Fraction(spelt), False, f" {after}"
    else:
        value, decimal, rest = found
    percent = False
    marked = re.match(r" ?(?:%|percent(?:age)?s?\b|pct\b|per cent\b)", rest, re.I)
    if marked:
        percent, rest = True, rest[marked.end() :]
    unit = _unit(rest)
    return None if unit is None else Number(sign * value, decimal, percent, unit)


def _head(text: str) -> tuple[Fraction, bool, str] | None:
    """(value, written as a decimal, what follows) of the number at the beginning of a text."""
    if len(text) > 3 * LONGEST_NUMBER:
        return None
    for pattern in (_REPEATING, _FRAC, _SLASH, _SCIENTIFIC, _E_NOTATION, _PLAIN):
        match = pattern.match(text)
        if not match or len(match.group()) > LONGEST_NUMBER:
            continue
        parts, rest = match.groupdict(), text[match.end() :]
        if pattern is _REPEATING:
            fixed, cycle = parts["fixed"], parts["cycle"]
            value = Fraction(int((parts["whole"] or "0") + fixed or "0"), 10 ** len(fixed))
            return value + Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(fixed)), False, rest
        if pattern in (_FRAC, _SLASH):
            top, bottom = parts["top"] or parts.get("top1"), parts["bottom"] or parts.get("bottom1")
            assert top and bottom
            below = _decimal(bottom)
            if below == 0:
                return None
            value = _decimal(top) / below
            if parts["whole"]:
                if value < 0:
                    return None
                value += int(parts["whole"])
            return value, "." in top + bottom, rest
        if pattern in (_SCIENTIFIC, _E_NOTATION):
            exponent = int(parts.get("e") or parts.get("e1") or parts.get("e2") or "0")
            if abs(exponent) > LARGEST_EXPONENT:
                return None
            head = parts["head"] or "1"
            return _decimal(head) * Fraction(10) ** exponent, "." in head or exponent < 0, rest
        return _decimal(parts["plain"]), "." in parts["plain"], rest
    return None


def _decimal(text: str) -> Fraction:
    text = text.replace(",", "").replace(" ", "")
    return Fraction(text + "0" if text.endswith(".") else text)


_SMALL = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_NUMBER_WORDS = {word: value for value, word in enumerate(re.findall(r"\w+", _SMALL))}
_NUMBER_WORDS |= {word: 20 + 10 * i for i, word in enumerate(re.findall(r"\w+", _TENS))}


def words_number(text: str) -> int | None:
    """The value of a number in English words, below a million: "twenty-five", "three hundred and two"."""
    total = part = 0
    tokens = [t for t in re.split(r"[\s-]+", text.lower().strip()) if t and t != "and"]
    if not tokens or len(tokens) > 8:
        return None
    for token in tokens:
        if token in _NUMBER_WORDS:
            part += _NUMBER_WORDS[token]
        elif token == "hundred" and 0 < part < 10:
            part *= 100
        elif token == "thousand" and part:
            total, part = total + 1000 * part, 0
        else:
            return None
    return total + part


# Units --------------------------------------------------------------------------------------------------------------

# unit: (dimension, factor to the dimension's base). A multiplier's dimension is "count".
_UNITS: dict[str, tuple[str, Fraction]] = {}
for _dimension, _names in {
    "length": {"mm": "1/1000", "cm": "1/100", "km": "1000", "m": "1", "millimeter": "1/1000", "centimeter": "1/100",
               "meter": "1", "kilometer": "1000", "inch": "127/5000", "in": "127/5000", "foot": "381/1250",
               "feet": "381/1250", "ft": "381/1250", "yard": "1143/1250", "yd": "1143/1250", "mile": "201168/125"},
    "mass": {"g": "1", "gram": "1", "kg": "1000", "kilogram": "1000", "mg": "1/1000", "milligram": "1/1000"},
    "time": {"s": "1", "sec": "1", "second": "1", "min": "60", "minute": "60", "h": "3600", "hr": "3600",
             "hour": "3600", "day": "86400", "week": "604800"},
    "money": {"cent": "1/100", "dollar": "1", "usd": "1"},
    "angle": {"degree": "1", "deg": "1"},
    "count": {"dozen": "12", "hundred": "100", "thousand": "1000", "million": "1000000", "billion": "1000000000"},
}.items():  # fmt: skip
    for _name, _factor in _names.items():
        _UNITS[_name] = (_dimension, Fraction(_factor))

_NOT_UNITS = frozenset(
    re.findall(
        r"\w+",
        """and or to plus minus times over pi sqrt sin cos tan log ln mod sec csc cot exp if for all is not no i e x y z
        n k t theta alpha beta frac than where a b c d r""",
    )
)
_SINGLE = frozenset("mgshlnjkvwacft")


def unwrap_unit(tidied: str) -> str:
    """A tidy text with its unit in plain words; a unit in \\text{} or \\mathrm{} is set off by a vertical bar."""
    text = re.sub(
        r"\^ ?(?:\{ ?\\circ ?\}|\\circ)(?![A-Za-z])|\\degree(?![A-Za-z])|\\circ(?![A-Za-z])", " |degrees", tidied
    )
    text = re.sub(
        r"(?:\{)?" + _TEXT + r"\{([^{}]*)\}\}?",
        lambda m: f" |{m.group(1).strip()} " if m.group(1).strip() else " ",
        text,
    )
    return re.sub(r"\s+", " ", text).strip(" |") if text.startswith(" |") else re.sub(r"\s+", " ", text).strip()


def _unit(rest: str) -> str | None:
    """What follows a number, as a unit: "" where nothing does, None where it is no unit but algebra."""
    if not rest.strip():
        return ""
    wrapped = "|" in rest
    text = re.sub(r"[|()]", " ", rest)
    text = (
        re.sub(r"\^ ?\{?[23]\}?", "", text).replace("^", "").replace("°", " degrees").replace("€", "").replace("£", "")
    )
    text = re.sub(r"\s+", " ", text.replace("\\", " ").replace("{", " ").replace("}", " ")).strip(" .,").lower()
    if not text:
        return ""
    if re.search(r"[^a-z ./'-]", text) or len(text) > LONGEST_NUMBER:
        return None
    words = [w for w in re.split(r"[ ./-]+", text) if w]
    if words == ["times"]:
        return "times"
    if not words or len(words) > 6 or (words[0] in _NOT_UNITS and not (wrapped and words[0] in _SINGLE)):
        return None
    if any(w in ("and", "or", "plus", "minus", "than") for w in words):
        return None
    if not wrapped and not rest.startswith(" ") and words[0] not in _UNITS:
        return None  # 2x and 3ab are products
    if not wrapped and (len(words[0]) < 3 and (words[0] not in _UNITS or len(words[0]) == 1)):
        return None
    return " ".join(words)


def without_unit(tidied: str) -> str:
    """An expression without the unit in words that follows it, "6\\sqrt{2} centimeters"."""
    match = re.fullmatch(r"(?P<head>.*[\w})]) (?:(?:square|cubic|sq) )?(?P<unit>[a-z]{2,20})\.?", tidied)
    if not match or (match["unit"] != "units" and (len(match["unit"]) < 3 or not known_unit(match["unit"]))):
        return tidied
    return match["head"]


def known_unit(unit: str) -> tuple[str, Fraction] | None:
    """(dimension, factor) of a unit of one word; None for those we do not know or that are composed."""
    if unit in _UNITS:
        return _UNITS[unit]
    for ending in ("s", "es"):
        if unit.endswith(ending) and len(unit) > 3 and unit[: -len(ending)] in _UNITS:
            return _UNITS[unit[: -len(ending)]]
    return None


# Times, letters, words ----------------------------------------------------------------------------------------------

_TIME = re.compile(r"(?P<h>\d{1,2})(?::(?P<m>\d{2}))? ?(?P<half>[ap] ?\.? ?m\.?|noon|midnight)?", re.I)
_DURATION = re.compile(
    r"(?:(?P<d>\d+) ?d(?:ays?)?,? ?(?:and )?)?(?:(?P<h>\d+) ?h(?:ours?|rs?)?\.?,? ?(?:and )?)?"
    r"(?:(?P<m>\d+) ?m(?:in(?:ute)?s?)?\.?,? ?(?:and )?)?(?:(?P<s>\d+) ?s(?:ec(?:ond)?s?)?\.?)?",
    re.I,
)


def read_time(tidied: str) -> tuple[int, bool] | None:
    """(minutes after midnight, whether am or pm was said) of a time of day; None for other texts."""
    match = _TIME.fullmatch(unwrap(tidied).replace("{", "").replace("}", "").strip()) if len(tidied) < 40 else None
    if not match or not (match["m"] or match["half"]):
        return None
    hours, minutes, half = int(match["h"]), int(match["m"] or 0), (match["half"] or "").lower()
    if hours > 24 or minutes > 59 or (half and not 1 <= hours <= 12):
        return None
    if half:
        hours = hours % 12 + (12 if half[0] in "pn" else 0)
    return 60 * hours + minutes, bool(half) or hours > 12


def read_duration(tidied: str) -> dict[str, Fraction] | None:
    """A duration of two parts or more in each unit it names, {"hour": 18.8, "minute": 1128}; None for other texts."""
    match = _DURATION.fullmatch(unwrap(tidied)) if len(tidied) < 80 else None
    named = {k: int(v) for k, v in match.groupdict().items() if v} if match else {}
    if len(named) < 2:
        return None
    seconds = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    total = sum(seconds[k] * v for k, v in named.items())
    return {k: Fraction(total, seconds[k]) for k in named}


def read_letter(tidied: str) -> str | None:
    """The option that a tidy text names: "B", "(B)", "B.", "(B) 42"; None for other texts."""
    match = re.fullmatch(
        r"(?:option |choice )?(?:\(([A-J])\)|([A-J])[.):]|([A-J]))(?P<rest> .{0,200})?", unwrap(tidied)
    )
    if not match or (match["rest"] and match.group(3)):
        return None  # "B 42" is not how options are written
    return match.group(1) or match.group(2) or match.group(3)


def read_words(tidied: str) -> str | None:
    """A text of words, lower case, without articles and punctuation; None if it holds anything but words."""
    if len(tidied) > 300:
        return None
    text = unwrap(tidied)
    if re.search(r"[\\^_=<>{}+*/|]", text) or not re.search(r"[^\W\d_]{3,}", text):
        return None
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower())
    while len(words) > 1 and words[0] in ("the", "a", "an"):
        words = words[1:]
    return " ".join(words)
