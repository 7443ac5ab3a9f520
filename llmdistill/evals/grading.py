"""Verdicts on stored samples. Nothing is generated here, so grading can be done again at any time.

A few problems at a time are in memory, whatever the number of samples; verdicts go to the disk as they come.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from threading import Lock
from typing import Any

from llmdistill.errors import UserError
from llmdistill.evals.grades import GradesSoFar
from llmdistill.evals.records import Grade, Problem, Sample
from llmdistill.verify.asked import Asked, Kind
from llmdistill.verify.code import DEFAULT_TIME_LIMIT_S, Verdict, find_program, judge_program
from llmdistill.verify.math import AnswerJudge
from llmdistill.verify.sandbox import Sandbox

Told = Callable[[int], None]
Unit = tuple[Problem, Sequence[Sample]]  # what is judged at one time: all answers of a problem, or one program
CALIBRATED = 4.0  # times the reference's own time a program may take, as EvalPlus (arXiv 2305.01210) has it
PATIENCE = 20.0  # times the row's limit that a reference itself is given


def grade(
    problems: Iterable[Problem | None],
    samples_of: Callable[[str], Sequence[Sample]],
    kept: GradesSoFar,
    *,
    prefill: str = "",
    workers: int = 0,
    allow_unsafe_exec: bool = False,
    progress: Told | None = None,
) -> None:
    """Adds to ``kept`` the grade of each sample that is not there yet.

    Args:
        problems: may wait for the next one, as where samples are still drawn; a None in between lets what was judged
            meanwhile go to the disk.
        samples_of: a problem's samples, by its id.
        prefill: the beginning of every completion, which the template wrote.
        workers: verdicts at one time; 0: one for each usable core. Programs are timed, so more than that is unfair.
        allow_unsafe_exec: run programs where the kernel cannot confine them.
        progress: told how many more samples have their grade.

    Raises:
        UserError: nothing here confines programs, or tests of an unknown form; the samples of other problems are
            graded all the same.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers, told, failed = workers or usable, progress or (lambda count: None), list[UserError]()
    with _Judges(workers, allow_unsafe_exec) as judges, ThreadPoolExecutor(workers) as threads:
        units = _units(problems, samples_of, kept, prefill, told)
        for (problem, samples), graded in _bounded(threads, judges.grade, units, 4 * workers):
            if isinstance(graded, UserError):
                failed.append(graded)
            else:
                kept.add(problem, samples, graded)
                told(len(graded))
    if failed:
        raise failed[0]


def with_prefill(samples: Iterable[Sample], prefill: str) -> list[Sample]:
    """The samples as they are judged."""
    return [replace(s, text=prefill + s.text) for s in samples]


def _units(
    problems: Iterable[Problem | None],
    samples_of: Callable[[str], Sequence[Sample]],
    kept: GradesSoFar,
    prefill: str,
    told: Told,
) -> Iterator[Unit | None]:
    for problem in problems:
        if problem is None:
            yield None
            continue
        samples = with_prefill(samples_of(problem.id), prefill)
        lacking = [s for s, grade in zip(samples, kept.of(problem, samples), strict=True) if grade is None]
        if problem.kind == "code":
            told(len(samples) - len(lacking))
            yield from ((problem, [sample]) for sample in lacking)
        elif lacking:
            yield problem, samples  # all of them: the classes of a problem's answers are numbered together
        else:
            told(len(samples))


def _bounded(
    threads: ThreadPoolExecutor, work: Callable[[Unit], Any], units: Iterable[Unit | None], most: int
) -> Iterator[tuple[Unit, Any]]:
    """In order, and no more than ``most`` begun before the first of them is taken."""
    running = deque[tuple[Unit, Future[Any]]]()
    for unit in units:
        if unit is not None:
            running.append((unit, threads.submit(work, unit)))
        while running and (len(running) >= most or running[0][1].done()):
            first, future = running.popleft()
            yield first, future.result()
    for first, future in running:
        yield first, future.result()


class _Judges:
    """Judges of answers and of programs, each started when it is first needed."""

    def __init__(self, workers: int, unsafe: bool) -> None:
        self.workers, self.unsafe = workers, unsafe
        self._open, self._lock = ExitStack(), Lock()
        self._answers: AnswerJudge | None = None
        self._sandbox: Sandbox | None = None
        self._limits: dict[str, float | None] = {}  # by problem: its calibrated limit, None where there is none

    def __enter__(self) -> _Judges:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def grade(self, unit: Unit) -> list[Grade] | UserError:
        problem, samples = unit
        if problem.kind != "code":
            return self._of_answers(problem, samples)
        try:
            return [self._of_program(problem, sample) for sample in samples]
        except UserError as error:
            return UserError(f"problem {problem.id!r}: {error}")

    def _of_answers(self, problem: Problem, samples: Sequence[Sample]) -> list[Grade]:
        with self._lock:
            judge = self._answers = self._answers or self._open.enter_context(AnswerJudge(workers=self.workers))
        kind: Kind = "choice" if problem.kind == "choice" else "math"
        gold, tolerance = problem.gold or "", (problem.tests or {}).get("tolerance")
        # Of a text that was cut off, the last number is no answer.
        asked = [Asked(s.text, gold, kind, last_number=s.finish != "length", tolerance=tolerance) for s in samples]
        verdicts = judge.judge_all(asked)
        classes = judge.classes([v.extracted for v in verdicts], kind)
        return [
            Grade(problem.id, s.index, v.passed, v.kind, v.extracted, v.stage, v.detail, c)
            for s, v, c in zip(samples, verdicts, classes, strict=True)
        ]

    def _of_program(self, problem: Problem, sample: Sample) -> Grade:
        with self._lock:
            self._sandbox = self._sandbox or self._open.enter_context(
                Sandbox(self.workers, allow_unsafe_exec=self.unsafe)
            )
        tests = problem.tests or {}
        prompt = problem.question if tests.get("setup") == problem.question else None  # one that is code itself
        program = find_program(sample.text, entry_point=tests.get("entry_point"), prompt=prompt, **self._confined())
        verdict = judge_program(program, tests, **self._confined())
        if verdict.kind == "timeout" and (limit := self._calibrated(problem)):
            verdict = judge_program(program, tests, time_limit_s=limit, **self._confined())
        detail = f"{verdict.detail} ({verdict.seconds:.2f} s)".strip()
        stage = "program" if program else "none"
        return Grade(problem.id, sample.index, verdict.passed, verdict.kind, program, stage, detail)

    def _calibrated(self, problem: Problem) -> float | None:
        """The limit where the problem's own reference needs much of the row's; measured once, when one is exceeded.

        A limit was chosen on another machine: on one that is slower, or busy, right programs exceed it too.
        """
        if problem.id in self._limits:
            return self._limits[problem.id]
        tests, limit = problem.tests or {}, None
        if problem.gold:
            own = float(tests.get("time_limit_s") or DEFAULT_TIME_LIMIT_S[str(tests.get("style"))])
            found: Verdict = judge_program(problem.gold, tests, time_limit_s=PATIENCE * own, **self._confined())
            if found.passed and CALIBRATED * found.seconds > own:
                limit = CALIBRATED * found.seconds
        self._limits[problem.id] = limit
        return limit

    def _confined(self) -> dict[str, Any]:
        return {"allow_unsafe_exec": self.unsafe, "sandbox": self._sandbox}
