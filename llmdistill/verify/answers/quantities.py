r"""Quantities: where the number ends and its unit begins.

The head must be an expression and the tail a unit, or the text is no quantity: nothing is dropped.
"""

from __future__ import annotations

import re
from fractions import Fraction

from llmdistill.verify.answers.algebra import rational
from llmdistill.verify.answers.expression import parse
from llmdistill.verify.answers.notation import MONEY, TEXT, WRAPPED, unwrap
from llmdistill.verify.answers.numerals import in_figures, other_spellings, scaled, words_number
from llmdistill.verify.answers.tree import Node, number, symbols
from llmdistill.verify.answers.unit_tables import COUNTS
from llmdistill.verify.answers.units import Unit, parse_unit
from llmdistill.verify.answers.values import Quantity, Sizes, Value

_CURRENCY = re.compile(
    rf"^(?P<sign>[-+]?) ?(?:(?:US ?|USD ?|EUR ?|Rs\.? ?)?(?P<mark>[{MONEY}€£¥₹])"
    r"|(?P<code>USD|EUR|GBP|INR)(?= ?\d)) ?(?P<rest>.*)$",
    re.S,
)
_BOUNDARY = re.compile(
    rf"(?={TEXT}\{{)|(?=\^ ?\{{? ?\\circ)|(?= ?%)|(?= ?[€£¥₹¢{MONEY}])|(?<=[\d)}}\]]) (?=[A-Za-z(/\\μ\u3400-\u9fff])"
    r"|(?<=[\d)}])(?=[A-Za-zμ°\u3400-\u9fff])|(?<=\\pi) ?(?=[a-zA-Z(\u3400-\u9fff])|(?<=[A-Za-z!]) (?=[a-zA-Z(])"
    r"|(?<=\d)\\ ?(?=[A-Za-z])"
)
_INFINITE = {
    "minus infinity": Node("minus", (Node("infinity"),)),
    "infinity": Node("infinity"),
    "positive infinity": Node("infinity"),
    "negative infinity": Node("minus", (Node("infinity"),)),
}
_PART = re.compile(
    r"\s*,?\s*(?:and )?(?P<value>\d+(?:\.\d+)?(?: \d+/\d+)?) ?(?P<unit>[A-Za-z]+(?:\^\d)?\.?|\^ ?\{? ?\\circ ?\}?|''?)"
)
_CHANCE = re.compile(
    r"(?:an? )?(?P<top>\d+|[a-z]+)[ -]?(?:in|out[ -]of|of|chances? in)[ -]?(?:every |a )?(?P<bottom>\d[\d,]*|[a-z-]+?)"
    r"(?: chance)?",
    re.I,
)
_OUTCOME = re.compile(
    r"(?:an? )?(?P<word>profit|gain|loss|increase|decrease|rise|drop|fall|decline|surplus|deficit|discount|markup)"
    r" of (?P<rest>.{1,60})",
    re.I,
)
_SAID_TWICE = re.compile(r"(?P<words>[A-Za-z -]{3,60}) \((?P<figures>\d{1,9})\)")
_AND_PART = re.compile(r"(?P<whole>\d{1,6}) and (?P<part>\d{1,3}/\d{1,3})(?P<rest>(?: [A-Za-z]+)*)")


def read_quantities(text: str) -> list[Value]:
    """The readings of a tidy text as a number with or without a unit."""
    money = _CURRENCY.match(text)
    if money:
        inner = money["rest"]
        found = [q for q in read_quantities(money["sign"] + inner) if isinstance(q, Quantity)]
        unit = parse_unit(money["mark"] or money["code"], wrapped=True)
        return [Quantity(q.tree, _with_currency(unit, q.unit), q.totals) for q in found if _fits(unit, q.unit)]
    negative = re.match(r"(?:minus|negative) (?=[\d.\\]|[a-z](?![a-z])|" + MONEY + ")", plain := unwrap(text), re.I)
    if negative:
        return read_quantities("-" + plain[negative.end() :])
    outcome = _OUTCOME.fullmatch(plain)
    if outcome:
        return read_quantities(f"{outcome['rest']} {outcome['word']}")
    twice = _SAID_TWICE.fullmatch(plain)
    if twice and words_number(twice["words"]) == Fraction(twice["figures"]):
        return [Quantity(number(Fraction(twice["figures"])))]
    figures_and_part = _AND_PART.fullmatch(plain)
    if figures_and_part:
        return read_quantities(f"{figures_and_part['whole']} {figures_and_part['part']}{figures_and_part['rest']}")
    if plain.lower() in _INFINITE:
        return [Quantity(_INFINITE[plain.lower()])]
    if WRAPPED.fullmatch(text) and re.search(r"\d", plain):
        return read_quantities(plain)  # \text{17 people}
    compound = _compound(text)
    if compound is not None:
        return [compound]
    if words_number(plain) is not None:
        return list(_numbers(text))
    whole = _numbers(text)
    with_unit = _with_unit(text)
    angle = bool(with_unit) and with_unit[0].unit == parse_unit("degree", wrapped=True)
    if whole and angle and whole[0].unit is None and not symbols(whole[0].tree):
        with_unit = []  # the tangent of 45 degrees is no angle
    if with_unit and not any(q.unit is not None and q.unit.weak for q in with_unit):
        whole = []  # 36 kJ is no product of letters
    sizes = _sizes(text)
    return sizes or [*whole, *with_unit]


def _fits(currency: Unit | None, unit: Unit | None) -> bool:
    """Whether words behind "$5" go with it: "per week" and "dollars" do, "cm" does not."""
    if currency is None or unit is None or not unit.dimensions or unit.dimensions == currency.dimensions:
        return currency is not None
    return all(power < 0 for _, power in unit.dimensions)


def _with_currency(currency: Unit | None, unit: Unit | None) -> Unit | None:
    if currency is None or unit is None or unit.percent:
        return currency
    if unit.dimensions and unit.dimensions != currency.dimensions:
        dimensions = tuple(sorted((*currency.dimensions, *unit.dimensions)))
        return Unit(dimensions, currency.factor * unit.factor, unit.words, unit.polarity)
    return Unit(currency.dimensions, currency.factor, unit.words, unit.polarity, count=unit.count)


def _numbers(text: str) -> list[Quantity]:
    """A text that is a number or an expression and nothing else."""
    plain = unwrap(text)
    spelt = words_number(plain)
    if spelt is not None:
        return [Quantity(number(spelt))]
    chance = _CHANCE.fullmatch(plain)
    if chance:
        parts = [_figure(chance[name]) for name in ("top", "bottom")]
        if parts[0] is not None and parts[1]:
            return [Quantity(number(parts[0] / parts[1]))]
    found = [Quantity(tree, comma=comma) for tree, comma in other_spellings(text)]
    tree = None if _is_prose(text) else parse(text)
    if tree is not None and not (found and text.strip().lstrip("+-").startswith("0") and tree.op == "number"):
        if tree.op == "degrees":
            found.append(Quantity(tree.args[0], parse_unit("degree", wrapped=True)))
        elif tree.op == "minus" and tree.args[0].op == "degrees":
            found.append(Quantity(Node("minus", tree.args[0].args), parse_unit("degree", wrapped=True)))
        else:
            found.append(Quantity(tree))
    return found


def _is_prose(text: str) -> bool:
    """Letters with a run that is longer than a product of variables usually is: "east", but not "abc"."""
    return bool(re.fullmatch(r"[A-Za-z ]*[A-Za-z]{4,}[A-Za-z ]*", text)) and not text.replace(" ", "").isupper()


def _figure(text: str) -> Fraction | None:
    return Fraction(text.replace(",", "")) if re.fullmatch(r"\d[\d,]*", text) else words_number(text)


def _with_unit(text: str) -> list[Quantity]:
    if len(text) > 300:
        return []
    for match in _BOUNDARY.finditer(text):
        at = match.start()
        head, tail = text[:at].strip(), text[at:]
        if not head or text[:at].count("{") != text[:at].count("}") or text[:at].count("(") != text[:at].count(")"):
            continue
        found = _head_and_tail(head, tail)
        if found:
            return found
    first, _, rest = unwrap(text).partition(" ")
    words = unwrap(text).split()
    if words[:1] in (["a"], ["an"]) and words[1:2] and words[1] in COUNTS:
        words[0] = "one"
    for size in range(min(len(words) - 1, 6), 0, -1):
        spelt = words_number(" ".join(words[:size]))
        unit = parse_unit(" ".join(words[size:]), wrapped=True) if spelt is not None else None
        if spelt is not None and unit is not None:
            return [Quantity(number(spelt), unit)]
    return []


def _head_and_tail(head: str, tail: str) -> list[Quantity]:
    heads = [q.tree for q in _numbers(head)]
    if not heads:
        return []
    closed = not symbols(heads[-1])
    wrapped = bool(re.match(rf"\s*{TEXT}\{{|\s*\(", tail)) or bool(re.match(r"\s*\^", tail))
    plain = re.sub(r"\s+", " ", unwrap(tail)).strip()
    if not plain or plain in ("{}", "()"):
        return [Quantity(tree) for tree in heads]
    one = heads[-1].op != "sum"  # 7 - 2\pi is not 5\pi, nor are 3 + 2 million five
    factor = scaled(plain.split()[0]) if closed and one else None
    if factor is not None:
        heads = [Node("product", (tree, number(factor))) for tree in heads]
        rest = plain.split(" ", 1)[1] if " " in plain else ""
        if not rest:
            return [Quantity(tree) for tree in heads]
        plain, wrapped = re.sub(r"^of (?:an?|the) ", "", rest), True
    plain = plain[1:-1].strip() if plain.startswith("(") and plain.endswith(")") and plain.count("(") == 1 else plain
    if plain in ("pi", r"\pi") and one:
        return [Quantity(Node("product", (tree, Node("pi")))) for tree in heads]
    again = words_number(plain)
    if again is not None and again == rational(heads[-1]):
        return [Quantity(tree) for tree in heads]  # 45 (forty-five)
    unit = parse_unit(plain, wrapped=wrapped, glued=not tail.startswith((" ", "\\", "^")), head_is_number=closed)
    if unit is None or (not closed and unit.words and not wrapped) or (unit.percent and not one and head[-1] != ")"):
        return []
    return [Quantity(tree, unit) for tree in heads]


def _compound(text: str) -> Quantity | None:
    r"""5 feet 6 inches, 18 h 48 min, 45 dollars and 50 cents, 36^\circ 30'."""
    plain = unwrap(text) if len(text) < 120 else ""
    sign = -1 if plain.startswith("-") else 1
    parts, at, plain = [], 0, in_figures(plain.lstrip("-").strip())
    while match := _PART.match(plain, at):
        parts.append((match["value"], match["unit"]))
        at = match.end()
    if len(parts) < 2 or plain[at:].strip(" .,"):
        return None
    angle = "circ" in parts[0][1] or parts[0][1].lower().startswith("deg")
    values: list[Fraction] = []
    units: list[tuple[tuple[tuple[str, int], ...], Fraction] | None] = []
    for value, name in parts:
        whole, _, fraction = value.partition(" ")
        values.append(Fraction(whole) + (Fraction(fraction) if fraction else 0))
        units.append(_part_unit(name, angle, len(units)))
    factors = [unit[1] for unit in units if unit is not None]
    if (
        len(factors) < len(units)
        or len({unit[0] for unit in units if unit}) > 1
        or factors != sorted(factors, reverse=True)
    ):
        return None
    if len(set(factors)) < len(factors):
        return None
    total = sign * sum((v * f for v, f in zip(values, factors, strict=True)), Fraction(0))
    dimensions = units[0][0] if units[0] is not None else ()
    return Quantity(number(total), Unit(dimensions), tuple(number(total / factor) for factor in factors))


_SIXTIETHS = {"'": 1, "minute": 1, "minutes": 1, "min": 1, "''": 2, "second": 2, "seconds": 2}


def _part_unit(name: str, angle: bool, position: int) -> tuple[tuple[tuple[str, int], ...], Fraction] | None:
    name = name.strip(". ")
    if angle:
        degrees = "circ" in name or name.lower().startswith("deg")
        at = 0 if degrees else _SIXTIETHS.get(name)
        return None if at is None else ((("angle", 1),), Fraction(1, 60**at))
    name = {"'": "ft", "''": "in", "m": "m" if position == 0 else "min", "d": "day"}.get(name, name)
    unit = parse_unit(name, wrapped=True)
    if unit is None or not unit.dimensions or unit.words:
        return None
    return unit.dimensions, unit.factor


def _sizes(text: str) -> list[Value]:
    """Factors that are plain numbers with crosses between them, 12 x 18 x 11, with a unit behind each or the last."""
    if r"\times" not in text or len(text) > 200:
        return []
    factors: list[Node] = []
    unit: Unit | None = None
    for part in text.split(r"\times"):
        found = [q for q in (*_numbers(part.strip()), *_with_unit(part.strip())) if isinstance(q, Quantity)]
        if not found or found[0].tree.op != "number" or re.match(r"\s*10\s*\^", part):
            return []
        value = rational(found[0].tree)
        if value is None or value <= 0:
            return []
        factors.append(found[0].tree)
        unit = found[0].unit or unit
    return [Sizes(tuple(factors), unit)]
