r"""Texts with a relation in them: assignments, equations, inequalities, memberships, set-builders, residues."""

from __future__ import annotations

import re
from collections.abc import Callable

from llmdistill.verify.answers.algebra import decimal_places, rational, same, within
from llmdistill.verify.answers.expression import parse
from llmdistill.verify.answers.notation import split_top, unwrap
from llmdistill.verify.answers.realsets import ALL, from_inequality, intersection, merged, read_set
from llmdistill.verify.answers.tree import CONSTANTS, Node, number, substituted, symbols
from llmdistill.verify.answers.values import (
    Assignment,
    Chain,
    Equation,
    Family,
    Quantity,
    Readings,
    RealSet,
    Residue,
    Value,
)

_RELATION = re.compile(
    r"(?P<le>\\le(?![A-Za-z])|<=|=<)|(?P<ge>\\ge(?![A-Za-z])|>=)|(?P<ne>\\ne(?![A-Za-z])|!=)|(?P<about>\\approx(?![A-Za-z])|\\simeq(?![A-Za-z])|≈)"
    r"|(?P<same>\\equiv(?![A-Za-z]))|(?P<element>\\in(?![A-Za-z]))|(?P<lt><)|(?P<gt>>)|(?P<eq>:?=)"
)
_SIGNS = {
    "le": "<=",
    "ge": ">=",
    "ne": "!=",
    "lt": "<",
    "gt": ">",
    "eq": "=",
    "about": "~",
    "same": "===",
    "element": "in",
}
_LABEL = re.compile(
    r"(?:\\?[A-Za-z]+(?:_(?:\{[^{}]*\}|\w))?'*(?:\^ ?\{ ?-1 ?\})?(?:\([^()]{1,20}\))?"
    r"|\\(?:angle|triangle) ?[A-Z]{1,4}|[A-Z]{2,6}"
    r"|\\(?:vec|overline|hat|bar|mathbf)\{?\w{1,3}\}?|\\(?:text|mathrm)\{[^{}]{1,30}\}|\[[A-Z]{3,6}\]"
    r"|\|[A-Za-z]\||\|[A-Z]{2}\||P ?\([^()]{1,40}\)"
    r"|\([A-Za-z](?:_\d)?(?:, ?[A-Za-z](?:_\d)?)*\))"
)
_APPLIED = re.compile(
    r"(?P<name>[A-Za-z](?:_(?:\{\w+\}|\w))?'{0,3}(?:\^\{?-1\}?)?)\((?P<argument>[A-Za-z](?:,[A-Za-z]){0,3})\)"
)
Reader = Callable[[str], Readings]


def sides(text: str) -> tuple[list[str], list[str]]:
    """The sides of a chain of relations that stand in no brackets, and the signs between them."""
    pieces = split_top(text, _RELATION.pattern.replace("(?P<", "(?P<r_"))
    if len(pieces) < 2:
        return pieces, []
    signs, at = [], 0
    for piece in pieces[:-1]:
        at = text.index(piece, at) + len(piece)
        match = _RELATION.search(text, at)
        assert match is not None and match.lastgroup is not None
        signs.append(_SIGNS[match.lastgroup])
        at = match.end()
    return pieces, signs


def read_relation(text: str, read: Reader) -> list[Value]:
    """The readings of a text with a relation; [] of one without."""
    residue = _residue(text)
    if residue is not None:
        return [residue]
    parts, signs = sides(text)
    if not signs or len(parts) > 12:
        return []
    if signs == ["in"]:
        return _membership(parts[0], parts[1], read)
    if "in" in signs or "===" in signs:
        return []
    if all(sign in "=~" for sign in signs):
        return _equalities(parts, signs, read)
    if "~" in signs:
        return []
    trees = [parse(part) for part in parts]
    if any(tree is None for tree in trees):
        return []
    known = [tree for tree in trees if tree is not None]
    if not any(symbols(tree) or tree.op == "unknown" for tree in known):
        # 4 > 3 says nothing of a variable, and numbers in their order are an answer from three on.
        return [Chain(tuple(known), tuple(signs))] if len(known) > 2 else []
    found = from_inequality(known, signs)
    return [Chain(tuple(known), tuple(signs)), *([found] if found is not None else [])]


def _residue(text: str) -> Residue | None:
    match = re.fullmatch(
        r"(?:[A-Za-z]\w* ?(?:\\equiv|=) ?)?(?P<value>[^=<>]+?) ?(?:\\pmod|\\bmod|\\mod|\(? ?\\?mod) ?"
        r"\{?(?P<modulus>[^{}()]+)\}?\)?",
        text,
    )
    if not match:
        return None
    value, modulus = parse(match["value"].strip(" (")), parse(match["modulus"])
    return Residue(value, modulus) if value is not None and modulus is not None else None


def _membership(name: str, domain: str, read: Reader) -> list[Value]:
    if not re.fullmatch(_LABEL, name.strip()):
        return []
    found = read_set(domain)
    if found is not None and domain.strip().startswith(r"\{"):
        return [RealSet(found.intervals, name.strip()), Assignment(name.strip(), tuple(read(domain)), True)]
    return [RealSet(found.intervals, name.strip())] if found is not None else []


def _equalities(parts: list[str], signs: list[str], read: Reader) -> list[Value]:
    trees = [parse(part) or _number_of(part, read) for part in parts]
    closed = [tree is not None and not symbols(tree) and tree.op != "unknown" for tree in trees]
    if parts[0].strip() in CONSTANTS and len(parts) == 2:
        closed[0] = False  # e = c/a names an eccentricity
    exact_end = signs.index("~") if "~" in signs else len(parts) - 1
    value = _chain_value(parts, trees, closed, exact_end, read)
    if all(closed):
        # 17 + 14 = 31 is 31, if it is; 1 = 1 says nothing, and 2 = 3 nothing that is right.
        near = [tree for tree in trees[exact_end + 1 :] if tree is not None]
        last = trees[exact_end]
        if last is None or not _consistent(trees[: exact_end + 1]) or not all(_about(tree, last) for tree in near):
            return []
        return value if parts[0].strip() != parts[-1].strip() else []
    if not value:
        return []
    name = parts[0].strip()
    found: list[Value] = []
    applied = _APPLIED.fullmatch(name.replace(" ", ""))
    label = bool(_LABEL.fullmatch(name)) or _geometric(name)
    if not closed[0] and (label or not (_is_multiple(trees[0]) or (len(parts) == 2 and _is_curve(trees[0])))):
        compact = re.sub(r"\\(?:text|mathrm)\b|[{}\\ ]", "", name) if label else name.replace(" ", "")
        if trees[0] is not None and trees[0].op == "symbol":
            compact, label = trees[0].name, True
        found.append(
            Assignment(
                applied["name"] if applied else compact, tuple(value), label, applied["argument"] if applied else ""
            )
        )
    elif len(parts) > 2:
        found += value
    if len(parts) == 2 and signs == ["="] and trees[0] is not None and trees[1] is not None and name not in CONSTANTS:
        found.append(Equation(Node("sum", (trees[0], Node("minus", (trees[1],))))))
        flipped = trees[1].op == "symbol" and not label
        if flipped:
            found.append(Assignment(parts[1].strip(), tuple(read(parts[0])), True))
    return found


def _number_of(part: str, read: Reader) -> Node | None:
    """The number of "45 apples", 1/4 of "25%"."""
    found = [value for value in read(part) if isinstance(value, Quantity)] if re.search(r"\d[^\uff04]*$", part) else []
    if not found:
        return None
    percent = found[0].unit is not None and found[0].unit.percent
    return Node("quotient", (found[0].tree, number(100))) if percent else found[0].tree


def _geometric(name: str) -> bool:
    r"""A quotient, ratio or measure of what capital letters name: \frac{NO}{BO}, S_{ABC}:S."""
    plain = re.sub(r"\\(?:frac|angle|triangle|text|mathrm|overline|cdot)|_\{?\w+\}?", "", name)
    return bool(re.fullmatch(r"[A-Z{}/: |()^2]+", plain)) or bool(
        re.fullmatch(r"[A-Za-z](?:_\{?\w+\}?)?(?: ?: ?[A-Za-z](?:_\{?\w+\}?)?)+", name)
    )


def _is_multiple(tree: Node | None) -> bool:
    """2x of 2x = 10: not what was asked for."""
    return (
        tree is not None
        and tree.op in ("product", "minus", "quotient")
        and any(rational(arg) is not None for arg in tree.args)
    )


def _is_curve(tree: Node | None) -> bool:
    """x^2 + y^2 of x^2 + y^2 = 1, where p + q of p + q = 122 is what was asked for."""
    return tree is not None and bool(symbols(tree) & {"x", "y", "z"})


def _consistent(trees: list[Node | None]) -> bool:
    known = [tree for tree in trees if tree is not None]
    return all(same(known[0], tree, may_be_long=True) for tree in known[1:])


def _chain_value(
    parts: list[str], trees: list[Node | None], closed: list[bool], exact_end: int, read: Reader
) -> list[Value]:
    """The readings of what a chain comes to: its last side, and a decimal that rounds it."""
    value = list(read(parts[exact_end]))
    for part, tree in zip(parts[exact_end + 1 :], trees[exact_end + 1 :], strict=True):
        last = trees[exact_end]
        if tree is None or last is None or not closed[exact_end]:
            continue
        if _rounds(tree, last):
            value += [v for v in read(part) if isinstance(v, Quantity)]
    return value


def _about(near: Node, exact: Node) -> bool:
    """Whether "22/7 = 3.14, about" may be said: one unit of the last place, or some percent, apart at most."""
    return any(within(exact, near, most) for most in (0.99 * 10.0 ** -(decimal_places(near) or 0), 0.05 * _size(near)))


def _size(tree: Node) -> float:
    value = rational(tree)
    return abs(float(value)) if value is not None and abs(value) < 10**300 else 0.0


def _rounds(decimal: Node, exact: Node) -> bool:
    """Whether a decimal of any length is a number rounded."""
    places = decimal_places(decimal)
    return within(exact, decimal, 0.5001 * 10.0 ** -(places or 0))


def read_builder(text: str, read: Reader) -> list[Value]:
    r"""\{x | condition\} and \{3k | k \in Z\}, and "x = 3k, k \in Z" without braces; [] of other texts."""
    text = re.sub(r"(?<=[\w}) ]) ?\( ?([A-Za-z] ?\\in ?\\mathbb ?\{?[ZN]\}?) ?\)$", r", \1", text)
    braced = re.fullmatch(r"\\\{(?P<inside>.*)\\\}", text, re.S)
    if not braced:
        text = re.sub(r"(?<![,\s]),? ?(?:\\(?:text|mathrm)\{ ?,? ?)?\b(where|for|with) ", r", \1 ", unwrap(text))
        return _parametrised(split_top(text), read)
    pieces = split_top(braced["inside"], r"\|| : |:(?![=\d])")
    if len(pieces) < 2:
        return []
    head = pieces[0].strip()
    condition = re.sub(
        r"^ ?(?:\|| : |:)", "", braced["inside"].strip()[len(head) :]
    ).strip()  # |x| < 1 has bars of its own
    within_reals = re.fullmatch(r"(?P<name>\w+) ?\\in ?\\math(?:bb|bf) ?\{?R\}?", head)
    head = within_reals["name"] if within_reals else head
    conditions = [
        c for c in split_top(condition) if not re.fullmatch(rf"{re.escape(head)} ?\\in ?\\math(?:bb|bf) ?\{{?R\}}?", c)
    ]
    domain = next((_domain(c) for c in conditions if _domain(c)), None)
    if domain is not None:
        rest = [c for c in conditions if _domain(c) is None]
        tree_text = head
        if rest:
            match = re.fullmatch(rf"{re.escape(head)} ?= ?(?P<value>[^=<>]+)", rest[0])
            if len(rest) > 1 or not match:
                return []
            tree_text = match["value"]
        tree = parse(tree_text)
        return [Family(tree, *domain)] if tree is not None and domain[0] in symbols(tree) else []
    if not conditions:
        return [RealSet((ALL,), "")]
    if r"\ne" in conditions[0]:  # x \ne 1, 2
        conditions = [
            c if c is conditions[0] or re.search(r"[<>=]|\\[lgn]e\b", c) else rf"{head} \ne {c}" for c in conditions
        ]
    found = read_union(
        re.sub(r"(?<=\d) ?, ?", " and ", ",".join(conditions)) if len(conditions) > 1 else conditions[0], read
    )
    real: list[Value] = [RealSet(value.intervals, "") for value in found if isinstance(value, RealSet)]
    return real or (_bound_condition(head, conditions[0], read) if len(conditions) == 1 else [])


def _bound_condition(head: str, condition: str, read: Reader) -> list[Value]:
    """What x^2 < 4 says of x in {x : x^2 < 4}, y = 2x of (x, y): with the bound variables called x, y, z in turn."""
    names = [name.strip() for name in head.strip("() ").split(",")]
    if len(names) > 3 or len(set(names)) < len(names) or not all(re.fullmatch(r"[A-Za-z](?:_\w)?", n) for n in names):
        return []
    found: list[Value] = []
    for value in read_relation(condition, read):
        if isinstance(value, Chain):
            found.append(Chain(tuple(_renamed(side, names) for side in value.sides), value.signs))
        elif isinstance(value, Equation) and len(names) > 1:
            found.append(Equation(_renamed(value.difference, names)))
    return found


def _renamed(tree: Node, names: list[str]) -> Node:
    axes = "xyz"[: len(names)]
    for name in set(axes) - set(names):
        tree = substituted(tree, name, Node("symbol", name=f"{name} elsewhere"))
    for at, name in enumerate(names):
        tree = substituted(tree, name, Node("symbol", name=f"variable {at}"))
    for at, axis in enumerate(axes):
        tree = substituted(tree, f"variable {at}", Node("symbol", name=axis))
    return tree


_SPELT_DOMAIN = re.compile(
    r"(?:where |with |for )?(?:(?P<name>[a-z]) (?:is )?(?:an|any|some) (?:arbitrary )?integer"
    r"|(?:all|any|every|each|an|some)? ?integers? (?P<last>[a-z]))"
)


def _domain(text: str) -> tuple[str, str] | None:
    match = re.fullmatch(
        r"\(? ?(?P<name>[A-Za-z]) ?\\in ?\\math(?:bb|bf) ?\{?(?P<set>[NZQ](?:\^?[*+]|_\+)?)\}?(?:\^?\{?[*+]\}?)? ?\)?",
        text.strip(),
    )
    if match:
        return match["name"], match["set"]
    spelt = _SPELT_DOMAIN.fullmatch(unwrap(text).strip())
    return (spelt["name"] or spelt["last"], "Z") if spelt else None


def _parametrised(pieces: list[str], read: Reader) -> list[Value]:
    """x = 3k, k in Z."""
    if len(pieces) != 2 or (domain := _domain(pieces[1])) is None:
        return []
    match = re.fullmatch(r"(?:[A-Za-z] ?= ?)?(?P<value>[^=<>]+)", pieces[0])
    tree = parse(match["value"]) if match else None
    return [Family(tree, *domain)] if tree is not None and domain[0] in symbols(tree) else []


def read_union(text: str, read: Reader) -> list[Value]:
    """x < 1 or x > 2, x > 1 and x < 3: the union or the intersection of what the parts say; [] of other texts."""
    plain = re.sub(r"\\(?:text|mathrm|textnormal|mbox)\s*\{\s*,?\s*(or|and)\s*\}|\\(lor|land)(?![A-Za-z])",
                   lambda m: f" {m.group(1) or {'lor': 'or', 'land': 'and'}[m.group(2)]} ", text)  # fmt: skip
    several = re.fullmatch(r"(?P<name>[A-Za-z]) ?\\ne ?(?P<values>[^<>=]+,[^<>=]+)", plain)
    if several:  # x \ne 1, 2
        plain = " and ".join(rf"{several['name']} \ne {value}" for value in split_top(several["values"]))
    words = set(re.findall(r"\b(?:or|and)\b", plain))
    pieces = [piece.strip(" ,") for piece in re.split(r"\b(?:or|and)\b", plain)]
    found: list[RealSet] = []
    for piece in pieces:
        sets = [value for value in read_relation(piece, read) if isinstance(value, RealSet)]
        if not sets:
            return []
        found.append(sets[0])
    if len(found) == 1:
        return [found[0]]
    if len(words) != 1 or len({f.variable for f in found}) > 1:
        return []
    total: RealSet | None = found[0]
    for other in found[1:]:
        if total is None:
            return []
        total = merged([*total.intervals, *other.intervals]) if words == {"or"} else intersection(total, other)
    return [RealSet(total.intervals, found[0].variable)] if total is not None else []
