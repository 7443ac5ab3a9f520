"""The guide of docs/methods.md: of each method when it pays, when it does not, and the cells that show it.

What is said is written here by hand; the figures behind it are paired differences of the committed cells, written by
``python eval/arena/run.py --table`` between two marks of the page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- guide: written by eval/arena/run.py --table -->", "<!-- end of the guide -->"
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


def put_in(page: Path, table: str) -> str:
    """The page's text with the table between the marks.

    Raises:
        ValueError: the page has not got the marks.
    """
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} has no lines {BEGIN!r} and {END!r} to put the guide between.")
    return text[: text.index(BEGIN) + len(BEGIN)] + f"\n\n{table}\n\n" + text[text.index(END) :]
