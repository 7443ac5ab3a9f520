"""The tables of real_model.json as Markdown; real_model.md has them word for word (tests/test_sums.py)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmdistill.record.intervals import paired_bootstrap, t_half_width

RESULTS = Path(__file__).with_name("real_model.json")
ARMS = {
    "start": "the start",
    "sft": "SFT on the teacher's text",
    "repairs": "SFT on right workings behind wrong guesses",
    "opd": "OPD, reverse KL",
}
SHARES = {  # of the texts, all of them
    "form": "terms copied",
    "guess_right": "guess right",
    "ends_at_its_guess": "ends at its guess",
    "first_right": "first sum right",
    "second_right": "second",
}
COMPARED = (("start", "sft"), ("start", "repairs"), ("start", "opd"), ("sft", "opd"), ("repairs", "opd"))
Run = dict[str, Any]


def tables(stored: dict[str, Any]) -> str:
    """Every run, then the differences."""
    runs = {arm: sorted((r for r in stored["runs"].values() if r["arm"] == arm), key=_seed) for arm in ARMS}
    lines = [f"| | seed | right | steps | CPU s | {' | '.join(SHARES.values())} |", "|---" * (5 + len(SHARES)) + "|"]
    lines += [one_run(run) for rows in runs.values() for run in rows]
    differences = [difference(runs, a, b) for a, b in COMPARED if runs[a] and runs[b]]
    head = "| difference in points | each seed | mean over seeds, ± 95 % t | over problems, 95 % |"
    return "\n".join([*lines, "", head, "|---|---|---|---|", *differences])


def one_run(run: Run) -> str:
    a, seed = run["accuracy"], "" if run["arm"] == "start" else run["seed"]
    right = f"{100 * a['value']:.1f} % [{100 * a['low']:.1f}, {100 * a['high']:.1f}]"
    shares = " | ".join(f"{100 * run[key]:.0f} %" for key in SHARES)
    return (
        f"| {ARMS[run['arm']]} | {seed} | {right} | {run.get('steps', '')} | {run.get('cpu_seconds', '')} | {shares} |"
    )


def difference(runs: dict[str, list[Run]], a: str, b: str) -> str:
    """``b`` over ``a``: seed by seed, and over problems with the seeds averaged. There is one start for all seeds."""
    before = {run["seed"]: run for run in runs[a]}
    both = [
        (runs[a][0] if a == "start" else before[r["seed"]], r) for r in runs[b] if a == "start" or r["seed"] in before
    ]
    each = [100 * (y["accuracy"]["value"] - x["accuracy"]["value"]) for x, y in both]
    over_seeds = f"{statistics.mean(each):+.1f}"
    if len(each) > 1:
        over_seeds += f" ± {t_half_width(each):.1f}"
    d = paired_bootstrap(means([y for _, y in both]), means([x for x, _ in both]))
    points = ", ".join(f"{points:+.1f}" for points in each)
    return f"| {ARMS[b]}, over {ARMS[a]} | {points} | {over_seeds} | [{100 * d.low:+.1f}, {100 * d.high:+.1f}] |"


def means(runs: Sequence[Run]) -> list[float]:
    """Each problem's share of right answers over the seeds."""
    return [statistics.mean(run["right"][key] for run in runs) for key in sorted(runs[0]["right"])]


def _seed(run: Run) -> int:
    return int(run["seed"])


if __name__ == "__main__":
    print(tables(json.loads(RESULTS.read_text())))
