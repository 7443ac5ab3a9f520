"""Rules of curation that look at one row: why it is left out, in a few words, or None.

A rule is used by its name in a recipe (``- no_loops``, ``- tokens: {most: 16384}``); one of your own, of the same
shape, by where it is ("package.module:function"). Rules that compare rows: ``llmdistill.datagen.rules_over_rows``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmdistill.datagen import structure
from llmdistill.datagen.schema import as_messages

Row = Mapping[str, Any]


def finished(row: Row) -> str | None:
    """Traces that ended by themselves."""
    return structure.unfinished(row.get("finish"))


def structured(row: Row, *, thinking: bool | None = None) -> str | None:
    """Thinking, where there is any (``thinking: true``: there must be), opened and closed once, then an answer."""
    return structure.unstructured(_text(row), thinking=thinking)


def no_loops(row: Row, *, most: float = 0.2) -> str | None:
    """Traces that do not go round in circles; at most a share ``most`` of the words is said again in runs of 8."""
    return structure.looping(_text(row), most=most)


def one_writing_system(row: Row, *, most: float = 0.05) -> str | None:
    """Traces in one writing system: at most a share ``most`` of the letters is in others that the prompt has not."""
    prompt = " ".join(m["content"] for m in as_messages(row["prompt"]) if isinstance(m.get("content"), str))
    return structure.mixed(_text(row), prompt=prompt, most=most)


def language(row: Row, *, allowed: Sequence[str] = ("en",)) -> str | None:
    """Traces in one of the languages ``allowed`` (two letters: en, de, zh)."""
    return structure.other_language(_text(row), allowed)


def tokens(row: Row, *, least: int = 1, most: int | None = None) -> str | None:
    """Traces of ``least`` to ``most`` tokens, counted by who wrote them.

    Raises:
        ValueError: the row does not say how many it has.
    """
    if not row.get("tokens"):
        raise ValueError("the row has no number of tokens. Fix: the rule characters")
    return structure.outside(int(row["tokens"]), least=least, most=most)


def characters(row: Row, *, least: int = 1, most: int | None = None) -> str | None:
    """Traces of ``least`` to ``most`` characters."""
    return structure.outside(len(_text(row)), least=least, most=most)


def right(row: Row) -> str | None:
    """Traces that a verifier called right."""
    return _verdict(row, wanted=True)


def wrong(row: Row) -> str | None:
    """Traces that a verifier called wrong: for the other side of pairs."""
    return _verdict(row, wanted=False)


def _verdict(row: Row, wanted: bool) -> str | None:
    if "passed" not in row:
        raise ValueError("the row has no verdict (column passed). Fix: verify the traces first")
    if row["passed"] is None:
        return "not judged"
    return None if bool(row["passed"]) == wanted else ("wrong" if wanted else "right")


def _text(row: Row) -> str:
    return str(row["completion"])
