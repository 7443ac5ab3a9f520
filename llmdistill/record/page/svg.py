"""Small plots as inline SVG: lines, intervals, histograms, sparklines. Colours come from the page's CSS classes.

Every plot has a title and a description in words, which are what a screen reader gets.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from llmdistill.record.page.text import safe, show

WIDTH, HEIGHT = 380, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 34
MOST_POINTS = 300  # a line is as wide as this many pixels: more points would only make the file longer


@dataclass(frozen=True)
class Series:
    """One line (or, with ``dots``, one set of points with intervals) of a plot."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str = "c1"  # CSS class
    dots: bool = False
    low: Sequence[float] = field(default=())
    high: Sequence[float] = field(default=())


@dataclass(frozen=True)
class Axis:
    """A linear (or logarithmic) scale from values to pixels."""

    low: float
    high: float
    start: float  # pixels
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, v = (math.log(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (v - low) / ((high - low) or 1.0) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        if self.log:
            # 1, 2, 5 of every decade; every decade only where that is too many.
            powers = range(math.floor(math.log10(self.low)) - 1, math.ceil(math.log10(self.high)) + 1)
            for factors in ((1, 2, 5), (1, 3), (1,)):
                found = [f * 10.0**p for p in powers for f in factors if self.low <= f * 10.0**p <= self.high]
                if len(found) <= count + 3:
                    break
            return found
        step = nice_step(self.low, self.high, count)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def nice_step(low: float, high: float, count: int) -> float:
    """1, 2 or 5 times a power of ten, giving about ``count`` ticks."""
    raw = (high - low) / count
    if not raw > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    return min((f * power for f in (1, 2, 5, 10) if f * power >= raw * 0.8), default=10 * power)


def tick_label(value: float) -> str:
    """As short as it stays readable."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{round(value, 6):g}"


def span(values: Sequence[float]) -> tuple[float, float]:
    """Axis limits around ``values``: from zero where that does not flatten the curve, ending on a tick."""
    low, high = min(values), max(values)
    if low == high:
        pad = abs(low) * 0.1 or 1.0
        low, high = (0.0 if 0 <= low <= pad else low - pad), high + pad
    elif 0 < low < 0.6 * high:
        low = 0.0
    elif 0.6 * low < high < 0:
        high = 0.0
    for _ in range(2):  # rounding widens the range, which may widen the step
        step = nice_step(low, high, 5)
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return low, high


def line_plot(title: str, unit: str, series: Sequence[Series], x_label: str = "step") -> str:
    """Lines over x. Returns the empty string when there is no point at all."""
    drawn = [s for s in series if len(s.xs)]
    if not drawn:
        return ""
    xs = [x for s in drawn for x in s.xs]
    low, high = span([y for s in drawn for y in (*s.ys, *s.low, *s.high)])
    x_min, x_max = min(xs), max(xs)
    if x_min == x_max:
        x_min, x_max = x_min - 1, x_max + 1
    x, y = Axis(x_min, x_max, LEFT, WIDTH - RIGHT), Axis(low, high, HEIGHT - BOTTOM, TOP)
    parts = [_frame(x, y, x_label)]
    for s in drawn:
        parts.append(_points(s, x, y) if s.dots else _line(s, x, y))
    said = "; ".join(
        f"{s.label}: {show(s.ys[0])} at {x_label} {s.xs[0]:g}, {show(s.ys[-1])} at {x_label} {s.xs[-1]:g}, "
        f"between {show(min(s.ys))} and {show(max(s.ys))}"
        for s in drawn
    )
    return drawing(title, f"{title} in {unit}. {said}.", "".join(parts))


def interval_plot(title: str, unit: str, rows: Sequence[tuple[str, str, float, float, float]]) -> str:
    """Horizontal intervals: rows of (label, CSS class, value, low, high), on a scale from zero."""
    height, left = 34 * len(rows) + BOTTOM + 4, 132
    reach = [v for row in rows for v in row[2:]]
    low, high = span([0.0, *reach])
    x = Axis(low, high, left, WIDTH - 52)
    parts = [f'<path class="axis" d="M{left} 4V{height - BOTTOM}"/>' if low == 0 else ""]
    for tick in x.ticks(4):
        parts.append(f'<path class="grid" d="M{x.at(tick):.1f} 4V{height - BOTTOM}"/>')
        parts.append(label_at(x.at(tick), height - BOTTOM + 15, tick_label(tick), "middle"))
    parts.append(label_at((left + WIDTH - 52) / 2, height - 4, unit, "middle"))
    for i, (label, colour, value, a, b) in enumerate(rows):
        middle = 4 + 34 * i + 17
        parts.append(label_at(left - 8, middle + 4, label, "end", "name"))
        parts.append(
            f'<path class="bar {colour}" d="M{x.at(0):.1f} {middle - 9}H{x.at(value):.1f}v18H{x.at(0):.1f}z"/>'
            f'<path class="whisker" d="M{x.at(a):.1f} {middle}H{x.at(b):.1f}M{x.at(a):.1f} {middle - 5}v10'
            f'M{x.at(b):.1f} {middle - 5}v10"/>'
        )
        parts.append(label_at(max(x.at(b), x.at(value)) + 6, middle + 4, show(value), "start", "name"))
    said = "; ".join(f"{label}: {show(v)}, interval {show(a)} to {show(b)}" for label, _, v, a, b in rows)
    return drawing(title, f"{title} in {unit}. {said}.", "".join(parts), height)


Group = tuple[str, str, Sequence[float]]  # label, CSS class, values


def histogram(title: str, unit: str, groups: Sequence[Group], bins: int = 24, beside: Sequence[Group] = ()) -> str:
    """How values spread: one panel per group above a shared axis.

    The axis is logarithmic where all values are positive and the largest is over ten times the smallest. ``beside`` are
    groups of the plots that stand beside this one: all have one scale, or their bars could not be compared.
    """
    drawn = [g for g in groups if len(g[2])]
    if not drawn:
        return ""
    scaled = [*(g[2] for g in drawn), *(g[2] for g in beside)]
    values = [v for group in scaled for v in group]
    log = min(values) > 0 and max(values) > 10 * min(values)
    low, high = (min(values) / 1.1, max(values) * 1.1) if log else span(values)
    panel = 78
    height = panel * len(drawn) + BOTTOM + TOP
    x = Axis(low, high, LEFT, WIDTH - RIGHT, log)
    width = (x.end - x.start) / bins
    counts = [[0] * bins for _ in scaled]
    for row, group in zip(counts, scaled, strict=True):
        for v in group:
            row[min(bins - 1, max(0, int((x.at(v) - x.start) / width)))] += 1
    tallest = max(max(row) for row in counts)
    bottom = TOP + panel * len(drawn)
    parts, said = [], []
    for tick in x.ticks():
        parts.append(f'<path class="grid" d="M{x.at(tick):.1f} {TOP}V{bottom}"/>')
        parts.append(label_at(x.at(tick), bottom + 15, tick_label(tick), "middle"))
    parts.append(label_at((x.start + x.end) / 2, height - 4, f"{unit}{', log scale' if log else ''}", "middle"))
    for k, (row, (label, colour, group)) in enumerate(zip(counts, drawn, strict=False)):
        base = TOP + panel * (k + 1)
        up = Axis(0, tallest, base, base - panel + 22)
        bars = [
            f"M{x.start + i * width + 0.5:.1f} {base}V{up.at(n):.1f}h{width - 1:.1f}V{base}z"
            for i, n in enumerate(row)
            if n
        ]
        parts.append(
            f'<path class="bar {colour}" d="{"".join(bars)}"/><path class="axis" d="M{x.start} {base}H{x.end}"/>'
        )
        parts.append(
            label_at(x.start - 6, up.at(tallest) + 4, str(tallest), "end") + label_at(x.start - 6, base, "0", "end")
        )
        parts.append(label_at(x.end, base - panel + 14, f"{label}, {len(group)} sequences", "end", "name"))
        middle = sorted(group)[len(group) // 2]
        said.append(
            f"{label}: {len(group)} sequences from {show(min(group))} to {show(max(group))}, median {show(middle)}"
        )
    return drawing(title, f"{title} in {unit}. {'; '.join(said)}.", "".join(parts), height)


def sparkline(values: Sequence[float], low: float, high: float, label: str, width: int = 132, height: int = 22) -> str:
    """A bar per token (per group of tokens, showing the largest) between ``low`` and ``high``; the rest is clipped."""
    columns = min(len(values), width // 2)
    if not columns:
        return ""
    edges = [len(values) * i // columns for i in range(columns + 1)]
    peaks = [max(values[a:b], key=abs) for a, b in itertools.pairwise(edges)]
    y = Axis(min(low, 0.0), max(high, 0.0), height, 1)
    zero, step = y.at(0.0), width / columns
    path = "".join(
        f"M{(i + 0.5) * step:.4g} {zero:.3g}V{y.at(min(max(p, low), high)):.3g}" for i, p in enumerate(peaks)
    )
    return (
        f'<svg class="spark" viewBox="0 0 {width} {height}" role="img" aria-label="{safe(label)}">'
        f'<path d="{path}" stroke-width="{max(step - 0.6, 1.2):.3g}"/>'
        f'<path class="axis" d="M0 {zero:.3g}H{width}"/></svg>'
    )


def thinned(xs: Sequence[float], ys: Sequence[float], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most about ``most`` points: lowest and highest of each stretch, so that spikes stay."""
    points = list(zip(xs, ys, strict=True))
    if len(points) <= most:
        return points
    kept = []
    edges = [len(points) * i // (most // 2) for i in range(most // 2 + 1)]
    for a, b in itertools.pairwise(edges):
        stretch = range(a, b)
        kept += sorted({min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])})
    return [points[i] for i in sorted({0, *kept, len(points) - 1})]


def running_mean(ys: Sequence[float], reach: int) -> list[float]:
    """Centred mean of up to ``2 * reach + 1`` values; shorter at the ends."""
    sums = [0.0, *itertools.accumulate(ys)]
    spans = [(max(0, i - reach), min(len(ys), i + reach + 1)) for i in range(len(ys))]
    return [(sums[b] - sums[a]) / (b - a) for a, b in spans]


def _line(s: Series, x: Axis, y: Axis) -> str:
    if len(s.xs) == 1:
        return f'<circle class="dot {s.colour}" cx="{x.at(s.xs[0]):.1f}" cy="{y.at(s.ys[0]):.1f}" r="3.5"/>'
    points = "L".join(f"{x.at(a):.1f} {y.at(b):.1f}" for a, b in thinned(s.xs, s.ys))
    return f'<path class="line {s.colour}" d="M{points}"/>'


def _points(s: Series, x: Axis, y: Axis) -> str:
    parts = [f'<circle cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="3.5"/>' for a, b in zip(s.xs, s.ys, strict=True)]
    if s.low and s.high:
        ends = zip(s.xs, s.low, s.high, strict=True)
        bars = "".join(f"M{x.at(a):.1f} {y.at(low):.1f}V{y.at(high):.1f}" for a, low, high in ends)
        parts.insert(0, f'<path d="{bars}"/>')
    return f'<g class="dot {s.colour}">{"".join(parts)}</g>'


def _frame(x: Axis, y: Axis, x_label: str) -> str:
    parts = []
    for tick in y.ticks():
        parts.append(f'<path class="grid" d="M{x.start} {y.at(tick):.1f}H{x.end}"/>')
        parts.append(label_at(x.start - 6, y.at(tick) + 4, tick_label(tick), "end"))
    for tick in x.ticks(6):
        if tick == int(tick):  # steps are whole
            parts.append(f'<path class="axis" d="M{x.at(tick):.1f} {y.start}v4"/>')
            parts.append(label_at(x.at(tick), y.start + 17, tick_label(tick), "middle"))
    parts.append(label_at((x.start + x.end) / 2, HEIGHT - 3, x_label, "middle"))
    parts.append(f'<path class="axis" d="M{x.start} {y.start}H{x.end}"/>')
    return "".join(parts)


def label_at(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    """Text at a point, ``anchor`` being start, middle or end."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{safe(text)}</text>'


def drawing(title: str, description: str, body: str, height: int = HEIGHT) -> str:
    """The SVG element around what was drawn, with its title and its description in words."""
    key = "plot-" + re.sub(r"\W+", "-", title.lower()).strip("-")  # titles differ within a page
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{key}-title {key}-desc">'
        f'<title id="{key}-title">{safe(title)}</title><desc id="{key}-desc">{safe(description)}</desc>{body}</svg>'
    )
