"""Verdicts on stored samples. Nothing is generated here, so grading can be done again at any time."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

from llmdistill.evals.records import Grade, Problem, Sample
from llmdistill.verify.code import judge_program
from llmdistill.verify.math import AnswerJudge
from llmdistill.verify.programs import extract_program
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
) -> list[Grade]:
    """One grade for each sample of ``problems``, ordered by problem and index.

    Args:
        prefill: the beginning of every completion, which the template wrote.
        workers: verdicts at one time; 0: one for each usable core. Programs are timed, so more than that is unfair.
        allow_unsafe_exec: run programs where the kernel cannot confine them.
        progress: told (done, total) now and then.

    Raises:
        UserError: math-verify is missing, nothing here confines programs, or tests of an unknown form.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = workers or usable
    drawn: dict[str, list[Sample]] = defaultdict(list)
    for (problem, _), sample in sorted(samples.items()):
        drawn[problem].append(sample)
    wanted = [(p, replace(s, text=prefill + s.text)) for p in problems for s in drawn[p.id]]
    programs = [(p, s) for p, s in wanted if p.kind == "code"]
    answers = [(p, s) for p, s in wanted if p.kind != "code"]
    found: dict[tuple[str, int], Grade] = {}
    for verdicts in (_answers(answers, workers), _programs(programs, workers, allow_unsafe_exec)):
        for verdict in verdicts:
            found[verdict.problem, verdict.index] = verdict
            if progress is not None:
                progress(len(found), len(wanted))
    return [found[p.id, s.index] for p, s in wanted]


def _answers(items: Sequence[tuple[Problem, Sample]], workers: int) -> Iterator[Grade]:
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

        for grades in threads.map(row, rows.values()):
            yield from grades


def _programs(items: Sequence[tuple[Problem, Sample]], workers: int, unsafe: bool) -> Iterator[Grade]:
    if not items:
        return
    with Sandbox(workers, allow_unsafe_exec=unsafe) as sandbox, ThreadPoolExecutor(workers) as threads:

        def one(item: tuple[Problem, Sample]) -> Grade:
            problem, sample = item
            tests = problem.tests or {}
            prompt = problem.question if tests.get("setup") == problem.question else None  # one that is code itself
            program = extract_program(sample.text, entry_point=tests.get("entry_point"), prompt=prompt)
            verdict = judge_program(program, tests, allow_unsafe_exec=unsafe, sandbox=sandbox)
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
