"""The arena: methods of distillation against one another at equal tokens and equal CPU time.

    python eval/arena/run.py                       # the whole grid, hours; killed and started again, it goes on
    python eval/arena/run.py --quick               # a first look at three methods, under five minutes
    python eval/arena/run.py --tracks main --methods opd trl --seeds 0 1
    python eval/arena/run.py --table               # only write RESULTS.md and accuracy.svg from the results there are

A cell (track, method, seed) is one JSON in eval/arena/results/. Teachers, the text sampled from them and the students'
starts are made first and kept in runs/arena/. Two worker processes with one thread each share the cells.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import queue
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

# Before torch and the hub's client are imported, here and in the workers, which inherit them.
for name, value in {
    "OMP_NUM_THREADS": "1",  # two threads beside anything else are slower than one
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DS_ACCELERATOR": "cpu",
}.items():
    os.environ.setdefault(name, value)
warnings.filterwarnings("ignore")  # TRL's word on vLLM's version, which is not used here

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
QUICK_METHODS = ("sft_labels", "fkl_teacher", "opd")
QUICK_SHARE = 0.2


def machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores"


def commit() -> str:
    """The commit of the package that is imported, with a + when it has changes."""
    import llmdistill

    root = Path(llmdistill.__file__).resolve().parents[1]
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "llmdistill"], cwd=root)
    return head.stdout.strip() + ("+" if changed.returncode else "")


# ------------------------------------------------------------------------------------------------------- the workers


def work(jobs: Any, events: Any, number: int, out: str, share: float, lr: float) -> None:
    """A worker: takes jobs until there is none: ("teacher", name) or ("cell", track, method, seed, only_prepare)."""
    import datasets
    import torch
    import transformers

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    events.put(("ready", number))
    parent = os.getppid()
    while (job := next_job(jobs, parent)) is not None:
        began = time.perf_counter()
        try:
            done_of_it = one(job, lambda text: events.put(("note", number, text)), Path(out), share, lr)
            events.put(("done", number, job, time.perf_counter() - began, done_of_it))
        except Exception:
            events.put(("failed", number, job, traceback.format_exc()))


def next_job(jobs: Any, parent: int) -> Any:
    """The next job; None when there is none left, or nobody to do it for."""
    while os.getppid() == parent:
        try:
            return jobs.get(timeout=5)
        except queue.Empty:
            continue
    return None


STARTS: dict[tuple[str, int], dict[str, float]] = {}  # the scores of a start, by track and seed


def one(job: tuple[Any, ...], note: Any, out: Path, share: float, lr: float = 0.0) -> str:
    """Does one job; returns a line about it."""
    from across import aligned_share
    from entries import METHODS
    from teachers import teacher
    from tracks import TRACKS, Cell, prepare

    if job[0] == "teacher":
        _, about = teacher(job[1], note)
        return f"exact match {about['exact']:.3f}, {about['parameters']:,} weights, {about['cpu_seconds']:.0f} CPU-s"
    cell, only_prepare = Cell(*job[1:4]), job[4]
    track = TRACKS[cell.track].smaller(share) if share < 1 else TRACKS[cell.track]
    prepared = prepare(track, cell, note, lambda part: note(f"{part:4.0%}"))
    if only_prepare:
        about = prepared.start
        return f"exact match {about['exact']:.3f}, attempt {about['attempts']}, {about['cpu_seconds']:.0f} CPU-s"
    if lr:
        prepared.setting.lr = lr
    curve = prepared.setting.curve
    curve.before = STARTS.get((cell.track, cell.seed))
    trainer = METHODS[cell.method].build(prepared.setting)
    trainer.train()
    if curve.before is not None:
        STARTS[cell.track, cell.seed] = curve.before
    points = curve.points
    if track.group and (aligned := aligned_share(trainer)) is not None:
        points = [{**point, "aligned": aligned} for point in points]
    result = {
        "track": cell.track,
        "method": cell.method,
        "seed": cell.seed,
        "lr": prepared.setting.lr,
        "key": track.key(),
        "commit": commit(),
        "machine": machine(),
        "tokens": track.budget.tokens,
        "cpu_seconds": track.budget.cpu_seconds,
        "points": [{k: round(v, 6) if isinstance(v, float) else v for k, v in p.items()} for p in points],
    }
    file = out / f"{cell.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(result, indent=0))
    temporary.replace(file)
    metric = track.metric
    return f"{metric} {points[0][metric]:.3f} -> {points[-1][metric]:.3f} in {points[-1]['step']} steps"


# -------------------------------------------------------------------------------------------------------- the parent


def rounds(cells: list[Any], share: float) -> list[list[tuple[Any, ...]]]:
    """Jobs in rounds, each of which needs what the earlier ones made: teachers, their text and starts, cells."""
    from models import CACHE
    from table import track_of
    from teachers import key_of

    needed = {name for cell in cells for name in track_of(cell.track, share).needs}
    missing = {name for name in needed if not (CACHE / "models" / key_of(name) / "about.json").exists()}
    teachers = [("teacher", name) for name in sorted(missing - {"imitator"})]
    later = [("teacher", name) for name in sorted(missing & {"imitator"})]
    first: dict[Any, Any] = {}
    for cell in cells:
        first.setdefault((cell.track, cell.seed), cell)
    tracks = {cell.track: cell for cell in reversed(list(first.values()))}  # one seed of each makes the shared text
    text = [("cell", c.track, c.method, c.seed, True) for c in tracks.values()]
    starts = [("cell", c.track, c.method, c.seed, True) for c in first.values() if tracks[c.track] != c]
    runs = [("cell", c.track, c.method, c.seed, False) for c in cells]
    return [r for r in (teachers, later, text, starts, runs) if r]


def label(job: tuple[Any, ...]) -> str:
    if job[0] == "teacher":
        return f"teacher {job[1]}"
    return f"{job[1]}/{job[2]}-{job[3]}" if not job[4] else f"start of {job[1]}, seed {job[3]}"


def weight(job: tuple[Any, ...]) -> float:
    """About how long a job takes, in CPU seconds; the bar's unit."""
    from tracks import TRACKS

    return 110.0 if job[0] == "teacher" else 25.0 if job[4] else 1.3 * TRACKS[job[1]].budget.cpu_seconds


def run(cells: list[Any], workers: int, out: Path, share: float, lr: float = 0.0) -> int:
    """Runs the cells; returns how many failed."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console, failed = Console(stderr=True), 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of the `finally` below: no worker stays behind
    context = multiprocessing.get_context("spawn")
    jobs, events = context.Queue(), context.Queue()
    crew = [context.Process(target=work, args=(jobs, events, i, str(out), share, lr)) for i in range(workers)]
    for process in crew:
        process.start()
    todo = rounds(cells, share)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"))
    clocks = (TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    cells_done, cells_all, began = 0, len(cells), time.perf_counter()
    try:
        with Progress(*columns, *clocks, console=console) as bar:
            task = bar.add_task("arena", total=sum(weight(j) for r in todo for j in r), note="starting")
            notes = {i: "starting" for i in range(workers)}
            for jobs_of_round in todo:
                for job in jobs_of_round:
                    jobs.put(job)
                left = len(jobs_of_round)
                while left:
                    try:
                        event = events.get(timeout=5)
                    except queue.Empty:
                        if dead := [p.exitcode for p in crew if p.exitcode is not None]:
                            raise RuntimeError(f"a worker ended with status {dead[0]}") from None
                        continue
                    if event[0] in ("note", "ready"):
                        notes[event[1]] = event[2] if event[0] == "note" else "ready"
                    else:
                        left, job = left - 1, event[2]
                        cells_done += job[0] == "cell" and not job[4]
                        rate = cells_done / (time.perf_counter() - began) * 3600
                        bar.update(task, advance=weight(job), description=f"{cells_done}/{cells_all} ({rate:.0f}/h)")
                        failed += event[0] == "failed"
                        said = f"{event[4]}, {event[3]:.0f} s" if event[0] == "done" else event[3]
                        console.print(f"{label(job)}: {said}", markup=False, highlight=False)
                    bar.update(task, note=" | ".join(notes.values()))
        for _ in crew:
            jobs.put(None)
        for process in crew:
            process.join(timeout=30)
    finally:
        for process in crew:
            if process.is_alive():
                process.terminate()
    return failed


def main() -> int:
    from table import all_curves, current, curves, report, table_of, with_figures
    from tracks import TRACKS, cells

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tracks", nargs="+", default=list(TRACKS), choices=list(TRACKS))
    parser.add_argument("--methods", nargs="+", help="default: all of a track")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the track")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK_METHODS)} at a fifth of the budget")
    parser.add_argument("--again", action="store_true", help="run cells anew that have a result")
    parser.add_argument("--table", action="store_true", help="run nothing; write the tables of what there is")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--lr", type=float, default=0.0, help="a sweep: another learning rate, results under sweeps/")
    options = parser.parse_args()
    if options.quick:
        options.tracks, options.methods, options.seeds = ["main"], options.methods or QUICK_METHODS, [0]
        options.out, share = HERE.parents[1] / "runs" / "arena" / "quick", QUICK_SHARE
    else:
        share = 1.0
    if options.lr:
        options.out = HERE / "sweeps" / f"{options.lr:g}"
    wanted = [
        cell
        for cell in cells(tuple(options.tracks), options.seeds)
        if not options.methods or cell.method in options.methods
    ]
    todo = [c for c in wanted if options.again or not current(options.out, c, share, options.lr)]
    print(f"{len(wanted)} cells, {len(wanted) - len(todo)} of them done already", file=sys.stderr)
    failed = (
        run(todo, min(options.workers, len(todo)), options.out, share, options.lr) if todo and not options.table else 0
    )
    if options.quick:
        print(table_of("main", curves(options.out, "main", share), share))
    elif options.out == RESULTS:
        found = all_curves(options.out)
        report(options.out, HERE, found)
        for page in (HERE.parents[1] / "docs" / "methods.md", HERE.parents[1] / "README.md"):
            page.write_text(with_figures(found, page.read_text(), guide=page.name != "README.md"))
        print(
            f"wrote {HERE / 'RESULTS.md'}, accuracy.svg, and the figures of methods.md and README.md", file=sys.stderr
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
