"""Numbers with their intervals, as the doors' tables print them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.table import Table

from llmdistill.record.page.paired import Change, change


def interval(values: Mapping[str, float], metric: str) -> str:
    """A mean and its 95 % interval."""
    return f"{values[metric]:.3f} [{values[metric + '_low']:.3f}, {values[metric + '_high']:.3f}]"


def difference(paired: Change | None) -> str:
    """A paired change and its 95 % interval; "-" where nothing is paired."""
    return "-" if paired is None else f"{paired.difference:+.3f} [{paired.low:+.3f}, {paired.high:+.3f}]"


def stages_table(title: str, stations: Mapping[str, Mapping[str, Any]], text: str, metrics: Sequence[str]) -> Table:
    """A column for every station (``before.json`` and ``after.json`` of the stages), and after each but the first one
    for its change from the station before, paired by sequence.

    The means have no interval here: most of it is that some sequences are hard at every station, and two of them
    overlap where every single sequence got better.

    Args:
        text: the key that has the means of a station, and its values by sequence.
        metrics: rows, those that every station has.
    """
    table = Table(title=title)
    table.add_column("")
    for i, station in enumerate(stations):
        table.add_column(station, justify="right")
        if i:
            table.add_column("change", justify="right")
    found = list(stations.values())
    for metric in (m for m in metrics if all(m in station[text] for station in found)):
        cells = [f"{found[0][text][metric]:.3f}"]
        for before, after in pairwise(found):
            cells += [f"{after[text][metric]:.3f}", difference(change(before, after, text, metric))]
        table.add_row(metric, *cells)
    return table
