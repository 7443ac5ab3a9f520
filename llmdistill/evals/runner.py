"""Asking, drawing, grading, summing up: what ``llmdistill eval`` and :func:`evaluate` do.

A run can be killed at any moment. Every finished sample is on disk, has a seed of its own, and is never drawn again,
nor is a grade made twice;
the same command goes on with what is missing. Under ``accelerate launch`` every process draws its share and writes its
own file; the first one grades. They share nothing but the folder, so one that is slow holds up no collective.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llmdistill.errors import UserError
from llmdistill.evals.config import EvalConfig
from llmdistill.evals.engines.base import Asked, Engine
from llmdistill.evals.engines.make import Source, open_source
from llmdistill.evals.following import followed
from llmdistill.evals.grades import GradesSoFar
from llmdistill.evals.grading import grade, with_prefill
from llmdistill.evals.jobs import Job, begin, check, prepare
from llmdistill.evals.lines import Lines
from llmdistill.evals.records import EvalFolder, Grade, Sample
from llmdistill.evals.suite import Suite, load_suite
from llmdistill.evals.summary import Tally

# Of config.json, what results.json repeats.
ABOUT = (
    *("suite", "model", "weights", "engine", "dtype", "thinking", "seed", "limit", "data", "sampling"),
    "versions",
)


@dataclass(frozen=True)
class Evaluation:
    """One suite, done.

    Attributes:
        folder: where everything is.
        results: results.json.
    """

    folder: Path
    results: dict[str, Any]

    @property
    def score(self) -> float:
        """avg@n: the mean over problems of the share of right samples."""
        return float(self.results["avg"]["value"])


def evaluate(
    suite: str | Path | Suite | Sequence[str | Path | Suite], model: str = "", *, config: EvalConfig | None = None,
    console: Console | None = None, rank: int = 0, world: int = 1, **settings: Any,
) -> Evaluation | list[Evaluation]:  # fmt: skip
    """Scores a model on one suite or several, or goes on with an evaluation that was interrupted.

    Args:
        suite: a suite's YAML file, the name of one that comes with the package, or a list.
        model: folder or hub name.
        config, settings: an :class:`~llmdistill.evals.config.EvalConfig`, or its fields one by one.
        console: where progress goes; None: standard error.
        rank, world: of this process, where several share the work.

    Returns:
        One :class:`Evaluation`, or a list if ``suite`` was one; an empty list on all ranks but the first.

    Raises:
        UserError: a suite, its data, the model or an endpoint is not as it must be. What was drawn is kept.
    """
    config = config or EvalConfig(model=model, **settings)
    console = console or Console(stderr=True, markup=False)
    given: list[Any] = list(suite) if isinstance(suite, (list, tuple)) else [suite]
    suites = [one if isinstance(one, Suite) else load_suite(one) for one in given]
    names = [one.name for one in suites]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UserError(f"suite {sorted(repeated)[0]!r} is there twice; they would share a folder. Fix: once each.")
    source = open_source(config)
    jobs = [prepare(one, config, source) for one in suites]
    with ExitStack() as held:
        for job in jobs:
            if rank:
                _await_begin(job, config.timeout_s)
            held.enter_context(job.folder.claimed(rank))  # before anything of it is read or written
            check(job)
            if rank == 0:
                begin(job, console)
        with followed(jobs, config) if rank == 0 else nullcontext():
            draw_all(jobs, source, console, rank, world, config.timeout_s)
        if rank:
            return []
        found = [finish(job, config, console) for job in jobs]
    return found if isinstance(suite, (list, tuple)) else found[0]


def draw_all(
    jobs: Sequence[Job], source: Source, console: Console, rank: int = 0, world: int = 1, patience_s: float = 3600.0
) -> None:
    """Draws what is missing of all jobs; returns, on the first rank, when every rank's samples are there."""
    missing = [_missing(job, job.folder.samples()) for job in jobs]
    # by place in the whole list: what is a rank's own does not depend on what others have finished by now
    own = [[a for i, a in enumerate(job.asked) if i % world == rank and (a.problem, a.index) in lack]
           for job, lack in zip(jobs, missing, strict=True)]  # fmt: skip
    for job, lack in zip(jobs, missing, strict=True):
        if rank == 0 and len(lack) < len(job.asked):
            done = len(job.asked) - len(lack)
            console.print(f"{job.suite.name}: {done} of {len(job.asked)} samples are there already", highlight=False)
    if any(own):
        longest = max(len(a.ids) + a.room for part in own for a in part)
        engine = source.engine(longest)
        try:
            for job, part in zip(jobs, own, strict=True):
                draw(job, part, engine, console, rank)
        finally:
            engine.close()
    if rank == 0 and world > 1:
        _await_others(jobs, console, patience_s)


def draw(job: Job, asked: Sequence[Asked], engine: Engine, console: Console, rank: int = 0) -> None:
    """Draws ``asked`` and writes every sample as it comes."""
    if not asked:
        return
    writer = job.folder.appender(rank)
    try:
        with _bar(f"{job.suite.name}: drawing", len(asked), console, rank == 0) as tick:
            tokens = 0
            for sample in engine.draw(asked, job.sampling, job.template.stop):
                writer.add(sample)
                tokens += sample.tokens
                tick(tokens)
    finally:
        writer.close()


def finish(job: Job, config: EvalConfig, console: Console) -> Evaluation:
    """Grades all samples and writes grades, results and page."""
    return regrade(job.folder.path, workers=config.workers, allow_unsafe_exec=config.allow_unsafe_exec, console=console)


def regrade(
    folder: str | Path, *, workers: int = 0, allow_unsafe_exec: bool = False, console: Console | None = None
) -> Evaluation:
    """Grades the samples of a folder (again), without the model, and writes grades, results and page.

    Raises:
        UserError: no evaluation there, or one that is not complete.
    """
    from llmdistill.evals.page import write_page

    place = EvalFolder(folder)
    settings = place.read_config()
    problems, samples = place.problems(), place.samples()
    if settings is None or not problems:
        raise UserError(
            f"{folder} is no evaluation: it has no config.json with problems.jsonl. Fix: the suite's folder."
        )
    n, wanted = int(settings["n"]), len(problems) * int(settings["n"])
    if lacking := sum((p.id, i) not in samples for p in problems for i in range(n)):
        raise UserError(
            f"{folder} lacks {lacking} of {wanted} samples. Fix: run the evaluation again; it goes on from there."
        )

    def samples_of(problem: str) -> list[Sample]:
        return [sample for sample in samples.of(problem) if sample.index < n]

    console, prefill, complete = console or Console(stderr=True, markup=False), settings["template"]["prefill"], False
    tally = Tally(
        n, k_pass=settings["pass_at"], k_maj=settings["maj_at"], thinking=settings["thinking"], seed=settings["seed"]
    )

    def tallied() -> Iterator[Grade]:
        for problem in problems:
            mine = samples_of(problem.id)
            grades = [grade for grade in kept.of(problem, with_prefill(mine, prefill)) if grade is not None]
            tally.add(problem, mine, grades)
            yield from grades

    kept = GradesSoFar(place, {"prefill": prefill, "allow_unsafe_exec": allow_unsafe_exec})
    try:
        with _bar(f"{settings['suite']}: grading", wanted, console) as tick:
            grade(
                problems,
                samples_of,
                kept,
                prefill=prefill,
                workers=workers,
                allow_unsafe_exec=allow_unsafe_exec,
                progress=lambda count: tick(None, count),
            )
        place.write_grades(tallied())
        complete = True
    finally:
        kept.close(complete)
    template = {key: settings["template"][key] for key in ("name", "version", "hash")}
    about = {**{key: settings[key] for key in ABOUT}, "template": template, "few_shot": settings.get("few_shot")}
    results = {**about, **tally.numbers()}
    if any(p.kind == "code" for p in problems):
        from llmdistill.verify.sandbox import describe

        results["sandbox"] = describe(allow_unsafe_exec)
    place.write_json(place.results_file, results)
    write_page(place.path)
    return Evaluation(place.path, results)


def launch() -> tuple[int, int]:
    """Rank and number of processes of an ``accelerate launch``, taken out of the environment: every process then is
    on its own, with one GPU, and no library sets up a group that a slow one would hold up."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        local = os.environ.get("LOCAL_RANK", "0")
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = seen.split(",") if seen else [str(i) for i in range(int(local) + 1)]
        if int(local) >= len(devices):
            raise UserError(
                f"CUDA_VISIBLE_DEVICES is {seen!r}, and process {local} needs a GPU of its own. "
                f"Fix: --num_processes {len(devices)}."
            )
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[int(local)]
    return rank, world


def _missing(job: Job, samples: Lines[Sample]) -> set[tuple[str, int]]:
    return {key for a in job.asked if (key := (a.problem, a.index)) not in samples}


def _await_begin(job: Job, patience_s: float) -> None:
    """Until the first rank has written whose folder it is."""
    end = time.monotonic() + patience_s
    while job.folder.read_config() is None:
        if time.monotonic() > end:
            raise UserError(
                f"{job.folder.path} has no config.json after {patience_s:g} s. Fix: a folder all ranks share."
            )
        time.sleep(0.1)


def _await_others(jobs: Sequence[Job], console: Console, patience_s: float) -> None:
    told, came = 0.0, time.monotonic()
    drawn = [job.folder.samples() for job in jobs]
    missing = [_missing(job, samples) for job, samples in zip(jobs, drawn, strict=True)]
    while lack := sum(map(len, missing)):
        for lacking, samples in zip(missing, drawn, strict=True):
            lacking -= set(samples.look())  # only what was written since is read
        now = time.monotonic()
        came = now if sum(map(len, missing)) < lack else came
        if now - came > patience_s:
            raise UserError(
                f"no sample came from the other processes for {patience_s:g} s, {lack} are missing. "
                "Fix: a folder that all of them share; then the same command again."
            )
        if now - told > 30:
            console.print(f"waiting for {lack} samples of the other processes", highlight=False)
            told = now
        time.sleep(1)


@contextmanager
def _bar(title: str, total: int, console: Console, shown: bool = True) -> Iterator[Callable[..., None]]:
    """One bar with rate and ETA; a log file gets a line now and then instead."""
    began, count, said = time.monotonic(), 0, time.monotonic()
    columns = (TextColumn(title, markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    progress = Progress(
        *columns, TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), console=console,
        disable=not (shown and console.is_terminal),
    )  # fmt: skip
    task = progress.add_task("", total=total, rate="")

    def tick(tokens: int | None, more: int = 1) -> None:
        nonlocal count, said
        count, now = count + more, time.monotonic()
        seconds = max(now - began, 1e-9)
        rate = f"{tokens / seconds:,.0f} tokens/s" if tokens is not None else f"{count / seconds:,.1f}/s"
        progress.update(task, completed=count, rate=rate)
        if shown and not console.is_terminal and (now - said > 30 or count == total):
            said = now
            left = seconds / count * (total - count)
            console.print(f"{title} {count}/{total}  {rate}  ETA {left:,.0f} s", highlight=False)

    with progress:
        yield tick
