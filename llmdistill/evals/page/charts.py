"""Plots of an evaluation, in the style of the run page's: intervals of groups, lengths, calibration."""

from __future__ import annotations

from collections.abc import Sequence

from llmdistill.record.page.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, drawing, label_at, tick_label

LONGEST_LABEL = 22


def group_bars(title: str, rows: Sequence[tuple[str, float, float, float]]) -> str:
    """Horizontal bars with intervals, rows of (label, value, low, high) in percent, on a scale from 0 to 100."""
    step, left, right = 26, 142, WIDTH - 58
    height = step * len(rows) + BOTTOM + 4
    bottom = height - BOTTOM
    x = Axis(0, 100, left, right)
    parts = []
    for tick in (0, 25, 50, 75, 100):
        parts.append(f'<path class="{"grid" if tick else "axis"}" d="M{x.at(tick):.1f} 4V{bottom}"/>')
        parts.append(label_at(x.at(tick), bottom + 15, str(tick), "middle"))
    parts.append(label_at((left + right) / 2, height - 4, "% of samples right", "middle"))
    for i, (label, value, low, high) in enumerate(rows):
        middle = 4 + step * i + step / 2
        shown = label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"
        parts.append(label_at(left - 8, middle + 4, shown, "end", "name"))
        parts.append(
            f'<path class="bar c1" d="M{left} {middle - 6.5}H{x.at(value):.1f}v13H{left}z"/>'
            f'<path class="whisker" d="M{x.at(low):.1f} {middle}H{x.at(high):.1f}M{x.at(low):.1f} {middle - 4}v8'
            f'M{x.at(high):.1f} {middle - 4}v8"/>'
        )
        parts.append(label_at(right + 8, middle + 4, f"{value:.1f}", "start", "name"))
    said = "; ".join(f"{label}: {value:.1f}, interval {low:.1f} to {high:.1f}" for label, value, low, high in rows)
    return drawing(title, f"{title}, per cent of samples right. {said}.", "".join(parts), height)


def length_panels(title: str, edges: Sequence[float], groups: Sequence[tuple[str, str, Sequence[int], str]]) -> str:
    """Histograms above one axis of tokens, one panel per group of (label, CSS class, counts, facts in words)."""
    drawn = [g for g in groups if sum(g[2])]
    if not drawn or len(edges) < 2 or not edges[-1] > edges[0]:
        return ""
    panel = 72
    bottom = TOP + panel * len(drawn)
    height = bottom + BOTTOM
    x = Axis(edges[0], edges[-1], LEFT, WIDTH - RIGHT)
    parts = []
    for tick in x.ticks():
        parts.append(f'<path class="grid" d="M{x.at(tick):.1f} {TOP}V{bottom}"/>')
        parts.append(label_at(x.at(tick), bottom + 15, tick_label(tick), "middle"))
    parts.append(label_at((x.start + x.end) / 2, height - 4, "tokens", "middle"))
    most = max(max(counts) for _, _, counts, _ in drawn)  # one scale, so that heights can be compared
    for i, (label, colour, counts, _) in enumerate(drawn):
        base = TOP + panel * (i + 1)
        up = Axis(0, most, base, base - panel + 24)
        bars = "".join(
            f"M{x.at(a) + 0.5:.1f} {base}V{up.at(count):.1f}H{x.at(b) - 0.5:.1f}V{base}z"
            for a, b, count in zip(edges, edges[1:], counts, strict=False)
            if count
        )
        parts.append(f'<path class="bar {colour}" d="{bars}"/><path class="axis" d="M{x.start} {base}H{x.end}"/>')
        parts.append(label_at(x.start - 6, up.at(max(counts)) + 4, f"{max(counts):,}", "end"))
        parts.append(label_at(x.end, base - panel + 16, f"{label}, {sum(counts):,} samples", "end", "name"))
    said = "; ".join(f"{label}: {facts}" for label, _, _, facts in drawn)
    return drawing(title, f"{title} in tokens. {said}.", "".join(parts), height)


def calibration_plot(title: str, bins: Sequence[tuple[float, float, int]]) -> str:
    """Accuracy over agreement, bins of (confidence, accuracy, problems); a dot's area is its number of problems."""
    if not bins:
        return ""
    x, y = Axis(0, 1, LEFT, WIDTH - RIGHT), Axis(0, 1, HEIGHT - BOTTOM, TOP)
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<path class="grid" d="M{x.start} {y.at(tick):.1f}H{x.end}M{x.at(tick):.1f} {y.start}V{y.end}"/>')
        parts.append(label_at(x.start - 6, y.at(tick) + 4, f"{tick:.0%}".replace("%", ""), "end"))
        parts.append(label_at(x.at(tick), y.start + 15, f"{tick:.0%}".replace("%", ""), "middle"))
    parts.append(label_at(x.start + 6, y.end + 14, "% right", "start"))
    parts.append(f'<path class="diagonal" d="M{x.start} {y.start}L{x.end} {y.end}"/>')
    parts.append(label_at((x.start + x.end) / 2, HEIGHT - 3, "% of samples that agree", "middle"))
    most = max(count for _, _, count in bins)
    dots = "".join(
        f'<circle cx="{x.at(confidence):.1f}" cy="{y.at(accuracy):.1f}" r="{3 + 8 * (count / most) ** 0.5:.1f}"/>'
        for confidence, accuracy, count in bins
    )
    parts.append(f'<g class="dot c1">{dots}</g>')
    said = "; ".join(f"{count} problems with {c:.0%} agreement: {a:.0%} right" for c, a, count in bins)
    return drawing(title, f"{title}. {said}.", "".join(parts))


def share_bar(share: float, colour: str) -> str:
    """A small bar for a table's cell; the number is next to it."""
    return (
        f'<svg class="share {colour}" viewBox="0 0 72 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="72" height="8"/><rect width="{72 * min(max(share, 0.0), 1.0):.1f}" height="8"/></svg>'
    )
