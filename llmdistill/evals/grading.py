"""Verdicts on stored samples. Nothing is generated here, so grading can be done again at any time."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

from llmdistill.errors import UserError
from llmdistill.evals.grades import GradesSoFar
from llmdistill.evals.records import Grade, Problem, Sample
from llmdistill.verify.code import find_program, judge_program
from llmdistill.verify.math import AnswerJudge
from llmdistill.verify.sandbox import Sandbox

Told = Callable[[int, int], None]


def grade(
    problems: Sequence[Problem],
    samples: Mapping[tuple[str, int], Sample],
    *,
    prefill: str = "",
    workers: int = 0,
    allow_unsafe_exec: bool = False,
    progress: Told | None = None,
    kept: GradesSoFar | None = None,
) -> list[Grade]:
    """One grade for each sample of ``problems``, ordered by problem and index.

    Args:
        prefill: the beginning of every completion, which the template wrote.
        workers: verdicts at one time; 0: one for each usable core. Programs are timed, so more than that is unfair.
        allow_unsafe_exec: run programs where the kernel cannot confine them.
        progress: told (done, total) now and then.
        kept: grades that are there already; those that come are added to it.

    Raises:
        UserError: nothing here confines programs, or tests of an unknown form; the samples of
            other problems are graded all the same, and stay graded where ``kept`` is given.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = workers or usable
    drawn: dict[str, list[Sample]] = defaultdict(list)
    for (problem, _), sample in sorted(samples.items()):
        drawn[problem].append(sample)
    wanted = [(p, replace(s, text=prefill + s.text)) for p in problems for s in drawn[p.id]]
    found: dict[tuple[str, int], Grade] = {}
    if kept is not None:
        found = {(s.problem, s.index): g for p, s in wanted if (g := kept.of(p, s)) is not None}
        # the classes of a problem's answers are numbered together
        part = {p.id for p, s in wanted if p.kind != "code" and (s.problem, s.index) not in found}
        found = {key: g for key, g in found.items() if key[0] not in part}
    if progress is not None:
        for done in range(1, len(found) + 1):
            progress(done, len(wanted))
    todo = [(p, s) for p, s in wanted if (s.problem, s.index) not in found]
    programs = [(p, s) for p, s in todo if p.kind == "code"]
    answers = [(p, s) for p, s in todo if p.kind != "code"]
    asked, failed = {(s.problem, s.index): (p, s) for p, s in todo}, list[Ungraded]()
    for graded in (_answers(answers, workers), _programs(programs, workers, allow_unsafe_exec)):
        for verdicts in graded:
            if isinstance(verdicts, Ungraded):
                failed.append(verdicts)
                continue
            found |= {(g.problem, g.index): g for g in verdicts}
            if kept is not None:
                kept.add([(*asked[g.problem, g.index], g) for g in verdicts])
            for done in range(len(found) - len(verdicts) + 1, len(found) + 1):
                if progress is not None:
                    progress(done, len(wanted))
    if failed:
        raise failed[0].error
    return [found[p.id, s.index] for p, s in wanted]


@dataclass(frozen=True)
class Ungraded:
    """A sample without a verdict, because its problem's tests cannot be run."""

    error: UserError


def _answers(items: Sequence[tuple[Problem, Sample]], workers: int) -> Iterator[list[Grade]]:
    """Problem by problem: the majority vote needs the classes of all its answers."""
    if not items:
        return
    rows: dict[str, list[tuple[Problem, Sample]]] = defaultdict(list)
    for problem, sample in items:
        rows[problem.id].append((problem, sample))
    with AnswerJudge(workers=workers) as judge, ThreadPoolExecutor(workers) as threads:

        def row(pairs: list[tuple[Problem, Sample]]) -> list[Grade]:
            kind: Literal["math", "choice"] = "choice" if pairs[0][0].kind == "choice" else "math"
            verdicts = [
                judge.judge(
                    s.text,
                    p.gold or "",
                    kind,
                    last_number=s.finish != "length",  # of a text that was cut off, the last number is no answer
                    tolerance=(p.tests or {}).get("tolerance"),
                )
                for p, s in pairs
            ]
            classes = judge.classes([v.extracted for v in verdicts], kind)
            return [
                Grade(p.id, s.index, v.passed, v.kind, v.extracted, v.stage, v.detail, c)
                for (p, s), v, c in zip(pairs, verdicts, classes, strict=True)
            ]

        yield from threads.map(row, rows.values())


def _programs(items: Sequence[tuple[Problem, Sample]], workers: int, unsafe: bool) -> Iterator[list[Grade] | Ungraded]:
    if not items:
        return
    with Sandbox(workers, allow_unsafe_exec=unsafe) as sandbox, ThreadPoolExecutor(workers) as threads:

        def one(item: tuple[Problem, Sample]) -> list[Grade] | Ungraded:
            problem, sample = item
            try:
                return [graded(problem, sample)]
            except UserError as error:
                return Ungraded(UserError(f"problem {problem.id!r}: {error}"))

        def graded(problem: Problem, sample: Sample) -> Grade:
            tests = problem.tests or {}
            prompt = problem.question if tests.get("setup") == problem.question else None  # one that is code itself
            confined: Any = {"allow_unsafe_exec": unsafe, "sandbox": sandbox}
            entry_point = tests.get("entry_point")
            program = find_program(sample.text, entry_point=entry_point, prompt=prompt, **confined)
            verdict = judge_program(program, tests, **confined)
            detail = f"{verdict.detail} ({verdict.seconds:.2f} s)".strip()
            return Grade(
                problem.id,
                sample.index,
                verdict.passed,
                verdict.kind,
                program,
                "program" if program else "none",
                detail,
            )

        yield from threads.map(one, items)
