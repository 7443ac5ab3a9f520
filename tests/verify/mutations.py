"""Golds with one thing changed that makes another answer of them, or none of another kind."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

LETTERS = "abcdefghjkmnpqrstuvwxyz"
Mutation = Callable[[str, random.Random], str | None]


def digit(gold: str, rng: random.Random) -> str | None:
    at = [m.start() for m in re.finditer(r"\d", gold)]
    if not at:
        return None
    i = rng.choice(at)
    return gold[:i] + rng.choice([c for c in "0123456789" if c != gold[i]]) + gold[i + 1 :]


def letter(gold: str, rng: random.Random) -> str | None:
    at = _letters(gold)
    if not at:
        return None
    i = rng.choice(at)
    other = rng.choice([c for c in LETTERS if c != gold[i].lower()])
    return gold[:i] + (other.upper() if gold[i].isupper() else other) + gold[i + 1 :]


def case(gold: str, rng: random.Random) -> str | None:
    at = [i for i in _letters(gold) if gold[i - 1 : i] != "{"]
    if not at:
        return None
    i = rng.choice(at)
    return gold[:i] + gold[i].swapcase() + gold[i + 1 :]


def _letters(gold: str) -> list[int]:
    return [m.start() for m in re.finditer(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])", gold)]


def sign(gold: str, rng: random.Random) -> str | None:
    at = [m.start() for m in re.finditer(r"[-+](?=[\d\\ a-z])", gold)]
    if not at:
        return "-" + gold if re.match(r"[\d\\]", gold) else None
    i = rng.choice(at)
    return gold[:i] + ("+" if gold[i] == "-" else "-") + gold[i + 1 :]


def order(gold: str, rng: random.Random) -> str | None:
    match = re.fullmatch(r"(\(|\\left ?\()(.*?)(\)|\\right ?\))", gold)
    parts = match[2].split(",") if match and "(" not in match[2] else []
    if not match or len(parts) < 2:
        return None
    i, j = rng.sample(range(len(parts)), 2)
    parts[i], parts[j] = parts[j], parts[i]
    return match[1] + ",".join(parts) + match[3]


def bracket(gold: str, rng: random.Random) -> str | None:
    plain = gold.replace("\\left", "").replace("\\right", "")
    match = re.fullmatch(r"([\[(])([^()\[\]]*,[^()\[\]]*)([\])])", plain)
    if not match or match[2].count(",") > 1:
        return None
    return {"[": "(", "(": "["}[match[1]] + match[2] + match[3]


UNITS = [
    ("cm", "m"), ("inches", "feet"), ("feet", "inches"), ("hours", "minutes"), ("minutes", "hours"), ("dollars",
    "cents"),
    ("cents", "dollars"), ("pounds", "ounces"), ("^2", "^3"), ("square", "cubic"), ("meters", "centimeters"),
    ("days", "weeks"),
]  # fmt: skip


def unit(gold: str, rng: random.Random) -> str | None:
    if "\\text" not in gold and "\\mbox" not in gold:
        return None
    return next((gold.replace(a, b, 1) for a, b in UNITS if a in gold), None)


COMMANDS = [
    (r"\leq", r"\geq"), (r"\le ", r"\ge "), ("<", ">"), (">", "<"), (r"\cup", r"\cap"), (r"\sin", r"\cos"), (r"\cos",
    r"\sin"),
    (r"\ln", r"\log_2"), (r"\sqrt{", r"\sqrt[3]{"), (r"\pi", "e"), (r"\infty", "0"), ("^{", "_{"), (r"\lceil",
    r"\lfloor"),
]  # fmt: skip


def command(gold: str, rng: random.Random) -> str | None:
    for a, b in COMMANDS:
        if a in gold:
            changed = gold.replace(a, b, 1)
            return changed.replace(r"\rceil", r"\rfloor", 1) if "ceil" in a else changed
    return None


def drop(gold: str, rng: random.Random) -> str | None:
    """One letter or digit less; not the zeros that say nothing."""
    at = [m.start() for m in re.finditer(r"(?<![A-Za-z0-9.\\{_^])[A-Za-z1-9](?![A-Za-z0-9.])", gold)]
    if not at or len(gold) < 3:
        return None
    i = rng.choice(at)
    return gold[:i] + gold[i + 1 :]


def unit_word(gold: str, rng: random.Random) -> str | None:
    """A command or a word behind a number that makes another statement of it."""
    if not re.fullmatch(r"\d+", gold):
        return None
    added = (
        r"\lambda",
        r"\infty",
        r"\text{ factorial}",
        r"\text{ squared}",
        r"\text{ thirds}",
        r"\text{ or more}",
        "t",
        "x",
    )
    return f"{gold} {rng.choice(added)}"


ALL: tuple[Mutation, ...] = (digit, letter, case, sign, order, bracket, unit, command, drop, unit_word)
