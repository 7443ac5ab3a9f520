"""accuracy.svg: exact match against tokens, a panel per source of text and per track, and the hacking distances.

Drawn by hand on the report's axes: one file that any browser or repository page shows, and no library to install.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clock import Budget
from entries import METHODS
from tracks import TRACKS

from llmdistill.record.page.svg import Axis, label_at, tick_label
from llmdistill.record.page.text import safe

WIDTH, HEIGHT, COLUMNS = 560, 300, 3
LEFT, RIGHT, TOP, BOTTOM = 48, 222, 30, 40  # the legend stands on the right, where no curve is
# Told apart also without colour vision (Okabe and Ito), darker or lighter where a thin line would vanish on the page;
# when all have been used, again with dashes.
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a88400", "#56b4e9", "#000000", "#7a5195", "#8c564b")
DARK = ("#4aa8e0", "#f08030", "#2dc398", "#e0a0c4", "#d9b93b", "#8fd0f5", "#f2f2f2", "#b794d0", "#c99a8c")


def _colours(colours: Sequence[str]) -> str:
    return "".join(f".s{i}{{stroke:{colour}}}" for i, colour in enumerate(colours))


STYLE = (
    "text{font:12px sans-serif;fill:#222}.tick{font-size:11px;fill:#555}.title{font-size:13px;font-weight:600}"
    ".grid{stroke:#e4e4e4;fill:none}.axis{stroke:#777;fill:none}.line{fill:none;stroke-width:1.8}"
    f".again{{stroke-dasharray:4 3}}.page{{fill:#fff}}{_colours(LIGHT)}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.tick{fill:#aaa}.grid{stroke:#333}.axis{stroke:#888}"
    f".page{{fill:#15171a}}{_colours(DARK)}}}"
)

Points = list[dict[str, float]]


@dataclass
class Panel:
    """Lines (label -> [(x, y)]) on one pair of axes."""

    title: str
    lines: dict[str, list[tuple[float, float]]]
    x_label: str = "tokens"
    percent: bool = True


def averaged(by_seed: dict[int, Points], budget: Budget, metric: str) -> list[tuple[float, float]]:
    """Means over seeds at the marks of the token budget, from the start on; as far as every seed has come."""
    line = []
    for tokens in (0.0, *budget.shares(budget.tokens)):
        reached = [next((p for p in points if p["tokens"] >= tokens), None) for points in by_seed.values()]
        if any(p is None for p in reached):
            break
        line.append((tokens, statistics.fmean(p[metric] for p in reached if p is not None)))
    return line


def panels(found: dict[str, dict[str, dict[int, Points]]]) -> list[Panel]:
    made = []
    groups = {
        "labelled prompts": lambda m: m.prompts == "labelled",
        "the teacher's text, or truth": lambda m: m.prompts != "labelled" and m.text != "student",
        "the student's text": lambda m: m.prompts == "fresh" and m.text == "student",
    }
    for name, track in TRACKS.items():
        lines = {method: averaged(by_seed, track.budget, "exact") for method, by_seed in found[name].items()}
        if name == "hacking":
            made += hacking_panels(found[name])
        elif name in ("main", "recovery"):
            for title, belongs in groups.items():
                of_it = {METHODS[m].title: v for m, v in lines.items() if belongs(METHODS[m])}
                made.append(Panel(f"{track.title}: {title}", of_it))
        else:
            made.append(Panel(track.title, {METHODS[m].title: v for m, v in lines.items()}))
    return [p for p in made if any(p.lines.values())]


def hacking_panels(found: dict[str, dict[int, Points]]) -> list[Panel]:
    track = TRACKS["hacking"]
    names = {"proxy_train": "to the teacher, trained-on prompts", "golden": "to the oracle, held-out"}
    made = []
    for metric, said in names.items():
        lines = {METHODS[m].title: averaged(by_seed, track.budget, metric)[1:] for m, by_seed in found.items()}
        made.append(Panel(f"Teacher hacking: KL {said}, nats", lines, percent=False))
    return made


def drawn(panel: Panel) -> str:
    points = [p for line in panel.lines.values() for p in line]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x = Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    if panel.percent:
        low, high = math.floor(20 * min(ys) - 0.5) / 20, math.ceil(20 * max(ys) + 0.5) / 20
        y = Axis(max(low, 0.0), min(high, 1.0), HEIGHT - BOTTOM, TOP)
    else:
        y = Axis(0.0, 1.05 * max(ys), HEIGHT - BOTTOM, TOP)
    parts = [label_at(LEFT, 16, panel.title, "start", "title")]
    for tick in y.ticks():
        parts.append(f'<path class="grid" d="M{LEFT} {y.at(tick):.1f}H{WIDTH - RIGHT}"/>')
        shown = f"{100 * tick:.0f} %" if panel.percent else tick_label(tick)
        parts.append(label_at(LEFT - 5, y.at(tick) + 4, shown, "end"))
    for tick in x.ticks(4):
        parts.append(label_at(x.at(tick), HEIGHT - BOTTOM + 16, f"{tick / 1000:g}k", "middle"))
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    parts.append(label_at((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, panel.x_label, "middle"))
    # The legend: in the order of the curves' ends.
    order = sorted((k for k, v in panel.lines.items() if v), key=lambda k: -panel.lines[k][-1][1])
    for i, (name, line) in enumerate((k, panel.lines[k]) for k in order):
        again, of = divmod(sorted(panel.lines).index(name), len(LIGHT))
        drawn_as = f"line s{of}{' again' if again else ''}"
        path = "L".join(f"{x.at(a):.1f} {y.at(b):.1f}" for a, b in line)
        parts.append(f'<path class="{drawn_as}" d="M{path}"/>')
        height, x_legend = TOP + 8 + 15 * i, WIDTH - RIGHT + 10
        parts.append(f'<path class="{drawn_as}" d="M{x_legend} {height - 4}h14"/>')
        parts.append(label_at(x_legend + 19, height, name, "start", "tick"))
    return "".join(parts)


def write_plot(file: Path, found: dict[str, dict[str, dict[int, Points]]]) -> None:
    """Writes the plot of track -> method -> seed -> points; nothing when there are none."""
    made = panels(found)
    if not made:
        return
    rows = -(-len(made) // COLUMNS)
    body = "".join(
        f'<g transform="translate({WIDTH * (i % COLUMNS)} {HEIGHT * (i // COLUMNS)})">{drawn(panel)}</g>'
        for i, panel in enumerate(made)
    )
    title = "Exact match against tokens in the loss, by track and by who wrote the text"
    size = f'viewBox="0 0 {WIDTH * COLUMNS} {HEIGHT * rows}" width="{WIDTH * COLUMNS}" height="{HEIGHT * rows}"'
    file.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{safe(title)}</title>'
        f'<style>{STYLE}</style><rect class="page" width="100%" height="100%"/>{body}</svg>\n'
    )
