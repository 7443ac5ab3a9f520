"""The guide of docs/methods.md: of each method when it pays, when it does not, and the cells that show it.

What is said is written here by hand; the figures behind it are paired differences of the committed cells, written by
``python eval/arena/run.py --table`` between two marks of the page.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

HEAD = ("method", "recipe, settings", "pays", "does not", "shown here, points at equal tokens", "published")

READ = {"exact": "", "exact_t1": ", sampled", "best_way": ", share on the way it knows best"}  # how a metric is said


@dataclass(frozen=True)
class Shown:
    """A difference between two methods of a track at equal tokens, in points of ``metric``."""

    track: str
    method: str
    against: str
    metric: str = "exact"


@dataclass(frozen=True)
class Entry:
    """A line of the guide. ``published``: what the paper reports, as METHODS or the paper has it."""

    method: str
    recipe: str
    pays: str
    does_not: str
    shown: tuple[Shown, ...] = ()
    published: str = ""


def guide_rows(
    entries: tuple[Entry, ...], found: Callable[[Shown], Any], title: Callable[[str], str]
) -> list[list[str]]:
    """A row per line. ``found`` gives the difference with its interval, or None where a cell was not run."""
    rows = []
    for entry in entries:
        parts = []
        for shown in entry.shown:
            difference = found(shown)
            value = "not run yet" if difference is None else difference.percent(sign=True)
            parts.append(
                f"{shown.track}{READ[shown.metric]}: {title(shown.method)} {value} against {title(shown.against)}"
            )
        shown_here = "; ".join(parts) or "no cell"
        rows.append([entry.method, entry.recipe, entry.pays, entry.does_not, shown_here, entry.published])
    return rows


def decision_lines(lines: Sequence[tuple[str, tuple[Shown, ...]]], found: Callable[[Shown], Any]) -> str:
    """A numbered list, the differences put into the words."""
    made = []
    for number, (words, shown) in enumerate(lines, 1):
        values = [found(one) for one in shown]
        text = words.format(*("not run yet" if v is None else v.percent(sign=True) for v in values))
        made.append(textwrap.fill(f"{number}. {text}", 126, subsequent_indent="   ", break_on_hyphens=False))
    return "\n".join(made)


def put_in(text: str, mark: str, made: str) -> str:
    """A page's text with what was made between the marks of that name.

    Raises:
        ValueError: the page has not got the marks.
    """
    begin, end = f"<!-- {mark}: written by eval/arena/run.py --table -->", f"<!-- end of the {mark} -->"
    if begin not in text or end not in text:
        raise ValueError(f"the page has no lines {begin!r} and {end!r} to put the {mark} between.")
    return text[: text.index(begin) + len(begin)] + f"\n\n{made}\n\n" + text[text.index(end) :]
