"""The committed results as a picture: the last line of each cell, for README and docs.

    python eval/perf/plot.py [--results eval/perf/results.csv] [--out eval/perf/results.svg]

Above: seconds of the streamed loss by rows and vocabulary, a bar for each contender, and its extra memory; tokens a
second of packed and padded passes. Below: a whole step beside TRL's and the floor, and its memory; starts by the number
of prompts. Bars are medians, whiskers go from the 20th to the 80th percentile.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval.perf.record import RESULTS, add_results_option

COLOURS = {
    "ours": "#1b7f5c",
    "ours_vllm": "#7cc4a4",
    "naive": "#b0b0b0",
    "trl": "#c2543d",
    "liger": "#d9a441",
    "floor": "#888888",
    "packed": "#1b7f5c",
    "padded": "#b0b0b0",
    "first start": "#b0b0b0",
    "second start": "#1b7f5c",
}
_LOSS = re.compile(r"(\w+), (\d+) rows, (\d+) columns, .*: (time|extra memory)")
_STEP = re.compile(r"(\w+), (\d+ x \d+) new tokens, .*: (step|peak resident memory)")
_PACKING = re.compile(r"(padded|packed), up to (\d+) tokens, .*: (tokens/s)")  # its unit stands in for a last word
_STARTUP = re.compile(r"arrow, (\d+) prompts, (first start|second start): (start|anonymous)")


Lines = dict[tuple[str, str, str], dict[str, str]]  # by benchmark, cell and unit


def latest(path: str | Path) -> Lines:
    """The last line of each."""
    with open(path, newline="") as file:
        return {(line["benchmark"], line["cell"], line["unit"]): line for line in csv.DictReader(file)}


def found(lines: Lines, benchmark: str, pattern: Any, what: str) -> Any:
    """{group: {contender: (p20, p50, p80)}} in the order of the file."""
    groups: dict[str, dict[str, tuple[float, float, float]]] = {}
    for (name, cell, _), line in lines.items():
        match = pattern.fullmatch(cell) if name == benchmark else None
        if match is None or match.group(match.lastindex) != what:
            continue
        group = f"{int(match[3]) // 1000}k, {match[2]} rows" if benchmark == "loss" else match[2].replace(" ", "")
        groups.setdefault(group, {})[match[1]] = quantiles(line)
    return groups


def of_packing(lines: Lines) -> Any:
    groups: dict[str, dict[str, tuple[float, float, float]]] = {}
    for (name, cell, unit), line in lines.items():
        match = _PACKING.fullmatch(f"{cell}: {unit}") if name == "packing" else None
        if match:
            groups.setdefault(match[2], {})[match[1]] = quantiles(line)
    return groups


def of_startup(lines: Lines) -> Any:
    groups: dict[int, dict[str, tuple[float, float, float]]] = {}
    for (name, cell, _), line in lines.items():
        match = _STARTUP.fullmatch(cell) if name == "startup" else None
        if match and match[3] == "start":
            groups.setdefault(int(match[1]), {})[match[2]] = quantiles(line)
    return {f"{count:,}": groups[count] for count in sorted(groups)}


def quantiles(line: dict[str, str]) -> tuple[float, float, float]:
    return float(line["p20"]), float(line["p50"]), float(line["p80"])


def bars(axes: Any, groups: Any, title: str, unit: str) -> None:
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / max(len(names), 1)
    for k, name in enumerate(names):
        at = [(i, group[name]) for i, group in enumerate(groups.values()) if name in group]
        places = [i + (k - (len(names) - 1) / 2) * width for i, _ in at]
        whiskers = [[v[1] - v[0] for _, v in at], [v[2] - v[1] for _, v in at]]
        axes.bar(places, [v[1] for _, v in at], width, yerr=whiskers, label=name, color=COLOURS.get(name), capsize=1.5)
    axes.set_xticks(range(len(groups)), list(groups), rotation=35, ha="right", fontsize=7)
    axes.set_title(title, fontsize=9)
    axes.set_ylabel(unit, fontsize=8)
    axes.tick_params(axis="y", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    if names:
        axes.legend(fontsize=7, frameon=False)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(RESULTS.with_name("results.svg")))
    add_results_option(parser)
    options = parser.parse_args(words)
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "llmdistill"  # the same file from the same numbers
    from matplotlib import pyplot

    lines = latest(options.results)
    figure, ((a, b, c), (d, e, f)) = pyplot.subplots(2, 3, figsize=(13, 7))
    bars(a, found(lines, "loss", _LOSS, "time"), "loss and gradients", "seconds")
    bars(b, found(lines, "loss", _LOSS, "extra memory"), "its extra memory", "GiB")
    bars(c, of_packing(lines), "a training pass, by the longest text", "tokens/s")
    bars(d, found(lines, "step", _STEP, "step"), "a whole step", "seconds")
    bars(e, found(lines, "step", _STEP, "peak resident memory"), "peak resident memory of a run", "GiB")
    bars(f, of_startup(lines), "start of a run, by prompts", "seconds")
    f.set_yscale("log")
    figure.tight_layout()
    figure.savefig(options.out, metadata={"Date": None})
    print(options.out)


if __name__ == "__main__":
    main()
