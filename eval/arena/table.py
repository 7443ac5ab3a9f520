"""From the cells' curves to RESULTS.md: means over seeds with 95 % intervals, and differences within a seed.

The intervals are Student t intervals over seeds: mean ± t(n-1) s/√n. With three seeds t is 4.3: they are wide, and say
so. Differences are taken seed by seed (same start, same prompts) and then averaged, which takes the seed's share out.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claims import Claim, claims_table
from clock import at
from decision import DECISION
from entries import METHODS
from guide import HEAD, Shown, decision_lines, guide_rows, put_in
from guide_entries import GUIDE
from methods import Method
from plot import write_plot
from tracks import TRACKS, Cell, Track, rate

from llmdistill.record.intervals import MOST_SEEDS, t_half_width

REFERENCE = {
    **{"main": "fkl_teacher", "capacity": "fkl_teacher", "negatives": "sft_right", "experts": "sft_teacher"},
    **{"digits": "sft_teacher", "groups": "sft_teacher"},
    **dict.fromkeys(("recovery", "recovery_long", "recovery_six"), "fkl_teacher"),
    **{"recovery_negatives": "sft_right", "ways": "opd", "direction": "opd", "told": "sft_labels"},
}

CONTROL = "opsa"  # hears of no teacher

Point = dict[str, float]
Curves = dict[str, dict[int, list[Point]]]  # method -> seed -> points


@dataclass(frozen=True)
class Mean:
    """A mean over ``n`` seeds and half the width of its 95 % interval (nan for one seed)."""

    value: float
    half: float
    n: int

    def percent(self, sign: bool = False) -> str:
        plus = "+" if sign else ""
        return f"{100 * self.value:{plus}.1f}" + ("" if math.isnan(self.half) else f" ± {100 * self.half:.1f}")

    def plain(self) -> str:
        return f"{self.value:.3g}" + ("" if math.isnan(self.half) else f" ± {self.half:.2g}")


def mean(values: Sequence[float]) -> Mean:
    """Raises ValueError for no value, or more than ten (the table of quantiles ends there)."""
    n = len(values)
    if not 1 <= n <= MOST_SEEDS:
        raise ValueError(f"{n} seeds; 1 to {MOST_SEEDS} can be averaged")
    return Mean(statistics.fmean(values), t_half_width(values) if n > 1 else math.nan, n)


def paired(a: dict[int, float], b: dict[int, float]) -> Mean | None:
    """Mean of a - b over the seeds both have; None where there is none."""
    shared = sorted(a.keys() & b.keys())
    return mean([a[s] - b[s] for s in shared]) if shared else None


def track_of(name: str, share: float = 1.0) -> Track:
    return TRACKS[name].smaller(share) if share < 1 else TRACKS[name]


def load(folder: Path, cell: Cell) -> dict[str, Any] | None:
    file = folder / f"{cell.name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def current(folder: Path, cell: Cell, share: float = 1.0, lr: float = 0.0) -> bool:
    """Whether the cell has a result under the settings of today, or with another learning rate in a sweep."""
    result = load(folder, cell)
    if result is None:
        return False
    track = track_of(cell.track, share)
    return result["key"] == track.key() and result.get("lr", track.lr) == (lr or rate(track, cell.method))


def curves(folder: Path, name: str, share: float = 1.0) -> Curves:
    """The results of a track.

    Raises:
        ValueError: cells of a seed that began elsewhere, as on two machines, which train two starts.
    """
    track, found, starts = track_of(name, share), Curves(), dict[int, tuple[str, float]]()
    for method in track.methods:
        for seed in range(MOST_SEEDS):
            result = load(folder, Cell(name, method, seed))
            if result and result["key"] == track.key():
                found.setdefault(method, {})[seed] = result["points"]
                first, score = starts.setdefault(seed, (method, result["points"][0][track.metric]))
                if result["points"][0][track.metric] != score:
                    raise ValueError(
                        f"{name}, seed {seed}: {method} and {first} began at {result['points'][0][track.metric]} and "
                        f"{score}. Fix: run.py --tracks {name} --seeds {seed} --again, on one machine."
                    )
    return found


def all_curves(folder: Path) -> dict[str, Curves]:
    return {name: curves(folder, name) for name in TRACKS}


def whole(found: Curves) -> Curves:
    """The methods that have all the seeds which any has: others began at other starts, and are not put beside these."""
    most = max(map(len, found.values()), default=0)
    return {method: by_seed for method, by_seed in found.items() if len(by_seed) == most}


def read(found: Curves, method: str, axis: str, budget: float, metric: str) -> dict[int, float]:
    """Seed -> score at the first point that has used the budget."""
    return {seed: at(points, axis, budget)[metric] for seed, points in found.get(method, {}).items()}


def difference(found: dict[str, Curves], name: str, a: str, b: str, metric: str, axis: str = "tokens") -> Mean | None:
    """Of methods ``a`` and ``b`` of the track, at its budget; None where they share no seed."""
    budget = TRACKS[name].budget
    used = budget.tokens if axis == "tokens" else budget.cpu_seconds
    return paired(*(read(found[name], method, axis, used, metric) for method in (a, b)))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], column: str = "---:|") -> str:
    """``column``: of all but the first; figures stand on the right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + column * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def described(method: Method) -> tuple[str, str, str, str]:
    """Prompts, text, needs more labels?, on-policy?"""
    named = {"fixed": "few", "pairs": "few", "mistakes": "fresh", "noised": "fresh"}
    prompts = named.get(method.prompts, method.prompts)
    text = {"labels": "truth", "teacher": "teacher", "student": "student", "verified": "teacher, verified"}[method.text]
    labels = "yes" if method.text == "labels" else "answers only" if method.text == "verified" else "no"
    return prompts, text, labels, "yes" if method.on_policy else "no"


def said(metric: str) -> str:
    """A share as the head of its column says it."""
    return metric.removeprefix("exact").replace("_t", "sampled at ").replace("_", " ")


def table_of(name: str, found: Curves, share: float = 1.0) -> str:
    """The table of a track whose metric is exact match."""
    track = track_of(name, share)
    tokens, seconds = track.budget.tokens, track.budget.cpu_seconds
    reference = REFERENCE[name]
    extra = [f"exact{o}" for o in track.operations] if len(track.operations) > 1 else []
    extra += ["exact_t0.6", "exact_t1"] if name == "negatives" else []
    extra += ["exact_t1", *(["best_way", "right_on_best"] if name == "ways" else ["steps_right", "corrected"])] * bool(
        track.size
    )
    extra += ["exact_t1"] if name in ("direction", "told") else []
    kl = ["forward_kl", "reverse_kl"] if name in ("main", "capacity", "direction") or track.size else []
    kl = kl[1:] if name == "ways" else kl
    header = ["method", "prompts", "text", "labels?", "on-policy?", f"at {tokens // 1000}k tokens, %"]
    header += [f"at {seconds:g} CPU-s, %", f"minus {METHODS[reference].title}, tokens", "tokens/CPU-s"]
    header += [f"{said(e)} at tokens, %" for e in extra]
    header += [f"{k.replace('_kl', ' KL')} at tokens" for k in kl] + ["aligned, %"] * bool(track.group)
    rows, base = [], read(found, reference, "tokens", tokens, "exact")
    starts = {seed: points[0]["exact"] for by_seed in found.values() for seed, points in by_seed.items()}
    if starts:
        rows.append(["(start)", "", "", "", "", mean(list(starts.values())).percent(), "", "", ""])
        rows[0] += [""] * (len(header) - len(rows[0]))
    for method in found:
        by_tokens = read(found, method, "tokens", tokens, "exact")
        by_time = read(found, method, "cpu_seconds", seconds, "exact")
        less = None if method == reference else paired(by_tokens, base)
        speed = mean(
            [at(p, "tokens", tokens)["tokens"] / at(p, "tokens", tokens)["cpu_seconds"] for p in found[method].values()]
        )
        few = "" if method in whole(found) else f" ({len(found[method])} seeds)"
        row = [METHODS[method].title + few, *described(METHODS[method])]
        row += [mean(list(by_tokens.values())).percent(), mean(list(by_time.values())).percent()]
        row += [less.percent(sign=True) if less else "", f"{speed.value:,.0f}"]
        row += [mean(list(read(found, method, "tokens", tokens, e).values())).percent() for e in extra]
        row += [mean(list(read(found, method, "tokens", tokens, k).values())).plain() for k in kl]
        if track.group:  # the share of the text that heard of the teacher; of some there is none
            shares = [points[-1]["aligned"] for points in found[method].values() if "aligned" in points[-1]]
            row.append(mean(shares).percent() if shares else "")
        rows.append(row)
    return markdown(header, rows)


def best_of_both(name: str, found: Curves) -> str:
    """The best on the student's own text less the best on given text, at equal tokens and at equal CPU time."""
    track, found, said = TRACKS[name], whole(found), list[str]()
    for metric in dict.fromkeys((track.metric, *["exact_t1"] * bool(track.size))):
        for axis, words in (("tokens", "tokens"), ("cpu_seconds", "CPU time")):
            scores = {m: read(found, m, axis, getattr(track.budget, axis), metric) for m in found}
            by_text = [[m for m in found if METHODS[m].on_policy == own and m != CONTROL] for own in (True, False)]
            if not all(by_text):
                return ""
            own, given = (max(of_it, key=lambda m: mean(list(scores[m].values())).value) for of_it in by_text)
            if less := paired(scores[own], scores[given]):
                titles = f"{METHODS[own].title} − {METHODS[given].title}"
                sampled = "sampled, " if metric == "exact_t1" else ""
                said.append(f"{titles} {less.percent(sign=True)} ({sampled}at equal {words})")
    return f"Best on the student's text less best on given text, each picked by these very seeds: {'; '.join(said)}."


def claims(found: dict[str, Curves]) -> str:
    """The papers' claims against the differences measured, in points of exact match."""

    def measured(claim: Claim, axis: str) -> Mean | None:
        return difference(found, claim.track, claim.better, claim.worse, claim.metric, axis)

    rows = claims_table(measured, lambda m: METHODS[m].title, lambda t: TRACKS[t].title)
    header = ["said", "difference", "at equal tokens, points", "at equal CPU time, points", "so here, by tokens"]
    return markdown(header, rows) if rows else ""


def golden(point: Point) -> float:
    return point["golden"]


def hacking_table(found: Curves) -> str:
    """Distances to teacher and oracle: at the start, the smallest golden one and where, and at the end."""
    header = ["text", "tokens", "proxy, trained-on prompts", "proxy, held-out", "golden", "exact, %"]
    rows = []
    for method, by_seed in found.items():
        moments = {
            "start": [points[0] for points in by_seed.values()],
            "golden smallest": [min(points, key=golden) for points in by_seed.values()],
            "end": [points[-1] for points in by_seed.values()],
        }
        for moment, picked in moments.items():
            row = [f"{METHODS[method].title}, {moment}", f"{statistics.fmean(p['tokens'] for p in picked) / 1000:.0f}k"]
            row += [mean([p[k] for p in picked]).plain() for k in ("proxy_train", "proxy", "golden")]
            rows.append([*row, mean([p["exact"] for p in picked]).percent()])
    return markdown(header, rows)


def sweep_table(folder: Path, name: str) -> str:
    """Greedy / sampled scores of seed 0 at the track's budget, by learning rate; the best of both together is bold."""
    track = TRACKS[name]
    rates = sorted(float(rate.name) for rate in folder.glob("*") if (rate / name).is_dir())
    rows = []
    for method in track.methods:
        of_rates = [load(folder / f"{rate:g}", Cell(name, method, 0)) for rate in rates]
        points = [r and at(r["points"], "tokens", track.budget.tokens) for r in of_rates]
        if not any(points):
            continue
        scores = [[p[k] for k in ("exact", "exact_t1") if k in p] if p else [] for p in points]
        best = max(map(sum, scores), default=0.0)
        cells = [" / ".join(f"{100 * score:.1f}" for score in of_both) for of_both in scores]
        bold = [sum(of_both) == best > 0 for of_both in scores]
        marked = [f"**{cell}**" if of_best else cell for cell, of_best in zip(cells, bold, strict=True)]
        rows.append([METHODS[method].title, *marked, f"{rate(track, method):g}"])
    return markdown(["method", *(f"{rate:g}" for rate in rates), "taken"], rows) if rows else ""


def with_figures(found: dict[str, Curves], page: str, *, guide: bool) -> str:
    """A page's text with the differences as the results have them: the decision's, and the guide's if it has one."""

    def measured(shown: Shown) -> Mean | None:
        return difference(found, shown.track, shown.method, shown.against, shown.metric)

    page = put_in(page, "decision", decision_lines(DECISION, measured))
    rows = guide_rows(GUIDE, measured, lambda m: METHODS[m].title)
    return put_in(page, "guide", markdown(HEAD, rows, "---|")) if guide else page


def report(folder: Path, here: Path, every: dict[str, Curves]) -> None:
    """Writes RESULTS.md (the figures, and around them the hand-written notes.md) and accuracy.svg.

    ``every``: the results in ``folder``, as :func:`all_curves` reads them.
    """
    notes = (here / "notes.md").read_text() if (here / "notes.md").exists() else ""
    results = [(f.parent.name, json.loads(f.read_text())) for f in sorted(folder.glob("*/*.json"))]
    if not results:
        return
    parts = [
        "# Arena: results",
        "Generated by `python eval/arena/run.py`; what is written by hand is in notes.md, and put in below.",
        f"{len(results)} cells; two workers, one thread each. Every track names its machine and commit.",
        "Means over seeds with 95 % t intervals. CPU seconds are those of the cell's process from its first step, with "
        "the teacher and all sampling in them and scoring left out; text sampled beforehand is charged when first "
        "used. `labels?` is what a method needs beyond the common start.",
        "![exact match against tokens](accuracy.svg)",
        "## Claims\n\nDifferences are taken within a seed (same start, same prompts) and averaged over seeds, with "
        "95 % t intervals. An interval that holds zero says nothing either way; of so many, one leaves it out by "
        "chance.",
        claims(every),
        notes.strip(),
    ]
    for name, track in TRACKS.items():
        if not (found := every[name]):
            continue
        seeds = max(map(len, found.values()))
        said = f"{track.labels} labels, " if track.labels else ""
        of_it = [r for place, r in results if place == name and r["key"] == track.key()]
        places = [", ".join(sorted({r[what] for r in of_it})) for what in ("machine", "commit")]
        rates = f"learning rate {track.lr:g}{' or what the sweep says' if track.swept else ''}"
        teachers = ", ".join(track.needs) or "the start itself, told the solution"
        parts.append(
            f"## {track.title}\n\n{said}teachers: {teachers}; {rates}, batch {track.batch}, {seeds} seeds. "
            f"{places[0]}, commit {places[1]}."
        )
        parts += [hacking_table(found)] if name == "hacking" else [table_of(name, found), best_of_both(name, found)]
        if swept := sweep_table(here / "sweeps", name):
            parts.append(f"Learning rates, seed 0, exact match greedily / sampled, %:\n\n{swept}")
    (here / "RESULTS.md").write_text("\n\n".join(p for p in parts if p) + "\n")
    write_plot(here / "accuracy.svg", {name: whole(found) for name, found in every.items()})
