"""Grading while samples are still drawn: a problem is judged as soon as its last sample is there.

What is found is in ``grading.jsonl``, where the grading at the end finds it: with as many cores as the drawing leaves
idle, a run on a GPU ends with its last sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Event, Thread

import torch

from llmdistill.errors import UserError
from llmdistill.evals.config import EvalConfig
from llmdistill.evals.grades import GradesSoFar
from llmdistill.evals.grading import grade
from llmdistill.evals.jobs import Job
from llmdistill.evals.lines import Lines
from llmdistill.evals.records import Problem, Sample

LOOK_EVERY_S = 1.0


@contextmanager
def followed(jobs: Sequence[Job], config: EvalConfig) -> Iterator[None]:
    """Grades, in a thread, what the body draws. Programs wait where the drawing takes their cores: they are timed.

    An error here (nothing confines programs) is left to the grading at the end, which meets it again.
    """
    elsewhere = config.resolved_engine in ("openai", "remote") or torch.cuda.is_available()
    chosen = [job for job in jobs if elsewhere or all(p.kind != "code" for p in job.problems)]
    over = Event()
    thread = Thread(target=_follow, args=(chosen, config, over), name="grading", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _follow(jobs: Sequence[Job], config: EvalConfig, over: Event) -> None:
    for job in jobs:
        prefill, samples, n = job.template.prefill, job.folder.samples(), job.n

        def samples_of(problem: str, samples: Lines[Sample] = samples, n: int = n) -> list[Sample]:
            return [sample for sample in samples.of(problem) if sample.index < n]

        with suppress(UserError):
            kept = GradesSoFar(job.folder, {"prefill": prefill, "allow_unsafe_exec": config.allow_unsafe_exec})
            try:
                grade(
                    _whole(job, samples, over),
                    samples_of,
                    kept,
                    prefill=prefill,
                    workers=config.workers,
                    allow_unsafe_exec=config.allow_unsafe_exec,
                )
            finally:
                kept.close(False)


def _whole(job: Job, samples: Lines[Sample], over: Event) -> Iterator[Problem | None]:
    """The problems, each when all of its samples are there, and None while there is none; ends when all were or when
    the drawing is over."""
    waiting = {p.id: p for p in job.problems}
    while True:
        for name in [name for name in waiting if len(samples.indices(name)) >= job.n]:
            if over.is_set():
                return
            yield waiting.pop(name)
        if not waiting or over.wait(LOOK_EVERY_S):
            return
        samples.look()
        yield None
