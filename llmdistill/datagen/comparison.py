"""Teachers compared on the prompts that all of them answered: who is right how often, how long, and how far off.

    compare_teachers("verified.jsonl", "teachers.md", student="runs/student")
    compare_teachers("verified.jsonl", "teachers.md", student="runs/student", trial={"prompts": 64})   # and tried

The student's perplexity of a teacher's texts says how much of it is new to the student: DED (METHODS 4.4) found that
the better teacher need not be the larger one. It is in nats per byte, so that long and short tokens do not matter.
Lengths are told by their quantiles and by the mean and spread of their logarithm (lengths of reasoning traces are close
to log-normal: exp of the mean is the typical one).
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmdistill.datagen.schema import prompt_of
from llmdistill.datagen.steps import Paths, Step, run_step
from llmdistill.datagen.tables import MOST_REJECTED, Row
from llmdistill.datagen.teacher_choice import Trial, difference_lines, trial_lines
from llmdistill.errors import UserError
from llmdistill.files import atomic_write
from llmdistill.recipe.config import DType
from llmdistill.record.intervals import bootstrap_ci, paired_bootstrap
from llmdistill.record.manifest import Manifest


@dataclass
class Tally:
    """What is known of one teacher, by prompt."""

    lengths: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # tokens, or else characters
    passed: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    finished: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    nats: dict[str, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))  # and bytes

    def add(self, row: Row, name: str) -> None:
        self.lengths[name].append(int(row.get("tokens") or len(str(row["completion"]))))
        self.finished[name].append(row.get("finish") != "length")
        if row.get("passed") is not None:
            self.passed[name].append(bool(row["passed"]))


def compare_teachers(
    src: Paths,
    out: str | Path,
    *,
    student: str = "",
    dtype: DType = "auto",
    column: str = "teacher",
    trial: Mapping[str, Any] | None = None,
    max_rejected: float = MOST_REJECTED,
) -> Manifest:
    """Writes a page in Markdown; its numbers are in the manifest's ``details["teachers"]``.

    Args:
        src: traces, verified for the verdict rates.
        out: .md.
        student: folder or hub name of a model that reads every trace; empty: no perplexities.
        dtype: of its weights.
        column: that tells teachers apart.
        trial: settings of :class:`~llmdistill.datagen.teacher_choice.Trial`, which trains ``student`` a little on each
            teacher's traces and asks it; {}: its defaults; None: none.

    Raises:
        UserError: fewer than two teachers, or no prompt that all of them answered.
    """
    tried = None if trial is None else Trial.of(trial, student)

    def work(step: Step) -> None:
        teachers = defaultdict[str, Tally](Tally)
        for row in step.rows(("prompt", "completion")):
            teachers[str(row.get(column) or "unnamed")].add(row, prompt_of(row))
        if len(teachers) < 2:
            raise UserError(
                f"the traces are of {', '.join(teachers) or 'nobody'}; at least two teachers are compared. "
                f"Fix: more traces, or another column than {column!r}."
            )
        common = sorted(set.intersection(*(set(t.lengths) for t in teachers.values())))
        if not common:
            raise UserError("no prompt was answered by all teachers. Fix: traces of all of them for the same prompts.")
        if student:
            _read(step, teachers, student, dtype, column)
        numbers = {name: _numbers(tally, common) for name, tally in sorted(teachers.items())}
        step.details["teachers"], step.details["prompts"] = numbers, len(common)
        step.details["differences"] = _differences(teachers, common)
        text = page(numbers, step.details["differences"], len(common))
        if tried is not None:
            step.details["trial"] = tried.run(step, student, list(numbers), column)
            text += "\n" + "\n".join(trial_lines(step.details["trial"])) + "\n"
        atomic_write(step.out, text)
        step.wrote(step.out)

    said = {"student": student, "dtype": dtype, "column": column, **({} if trial is None else {"trial": dict(trial)})}
    return run_step("teachers", work, src=src, out=out, settings=said, max_rejected=max_rejected, suffixes=(".md",))


def _read(step: Step, teachers: Mapping[str, Tally], student: str, dtype: DType, column: str) -> None:
    """Has the student read all traces."""
    from llmdistill.datagen.student import Student

    waiting = deque[tuple[str, str, int]]()  # traces that a batch of the student's holds

    def rows() -> Iterator[Row]:
        for row in step.again(("prompt", "completion")):
            waiting.append((str(row.get(column) or "unnamed"), prompt_of(row), len(str(row["completion"]).encode())))
            yield row

    for read in Student(student, dtype).read(rows()):
        name, prompt, size = waiting.popleft()
        teachers[name].nats[prompt].append((-math.fsum(read.logprobs), size))


def _numbers(tally: Tally, common: list[str]) -> dict[str, Any]:
    lengths = np.array([n for p in common for n in tally.lengths[p]], float)
    logs = np.log(np.maximum(lengths, 1))
    found: dict[str, Any] = {
        "traces": len(lengths),
        "finished": _mean_of_means(tally.finished, common)[0],
        "length": {f"p{q}": float(np.percentile(lengths, q)) for q in (10, 50, 90, 99)},
        "log_length": {"mean": float(logs.mean()), "sd": float(logs.std())},
    }
    if any(tally.passed.get(p) for p in common):
        mean, values = _mean_of_means(tally.passed, common)
        found["right"] = {"mean": mean, "interval": list(bootstrap_ci(values))}
    if read := [item for p in common for item in tally.nats.get(p, [])]:
        nats, size = (math.fsum(item[i] for item in read) for i in range(2))
        per_prompt = [sum(n for n, _ in tally.nats[p]) for p in common]
        sizes = [max(sum(b for _, b in tally.nats[p]), 1) for p in common]
        interval = bootstrap_ci([n / b for n, b in zip(per_prompt, sizes, strict=True)], sizes)
        found["nats_per_byte"] = {"mean": nats / max(size, 1), "interval": list(interval)}
    return found


def _mean_of_means(values: Mapping[str, list[bool]], prompts: list[str]) -> tuple[float, list[float]]:
    """Each prompt counts once, however many traces it has."""
    means = [float(np.mean(values[p])) for p in prompts if values.get(p)]
    return float(np.mean(means)), means


def _differences(teachers: Mapping[str, Tally], common: list[str]) -> dict[str, dict[str, float]]:
    """Share of right traces of every two teachers, prompt by prompt: "A - B" -> difference with its interval."""
    found = {}
    names = sorted(teachers)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            both = [p for p in common if teachers[a].passed.get(p) and teachers[b].passed.get(p)]
            if both:
                sides = ([float(np.mean(teachers[t].passed[p])) for p in both] for t in (a, b))
                found[f"{a} - {b}"] = vars(paired_bootstrap(*sides))
    return found


def page(numbers: Mapping[str, Mapping[str, Any]], differences: Mapping[str, Mapping[str, float]], prompts: int) -> str:
    """The comparison as Markdown."""
    lines = [
        "# Teachers compared",
        "",
        f"On the {prompts:,} prompts that all of them answered. Right: mean over prompts, with the 95 % interval over "
        "them. Lengths are in tokens where the traces say how many they have, else in characters.",
        "",
        "| teacher | traces | right | finished | length p10 / p50 / p90 / p99 | exp(mean log length) "
        "| student's nats per byte |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, n in numbers.items():
        quantiles = " / ".join(f"{v:,.0f}" for v in n["length"].values())
        typical = f"{math.exp(n['log_length']['mean']):,.0f} (sd of log {n['log_length']['sd']:.2f})"
        right = _with_interval(n.get("right"), "{:.1%}")
        nats = _with_interval(n.get("nats_per_byte"), "{:.3f}")
        lines.append(f"| {name} | {n['traces']:,} | {right} | {n['finished']:.1%} | {quantiles} | {typical} | {nats} |")
    if differences:
        lines += ["", *difference_lines("right, prompt by prompt", differences)]
    return "\n".join(lines) + "\n"


def _with_interval(value: Mapping[str, Any] | None, form: str) -> str:
    if value is None:
        return "not measured"
    low, high = value["interval"]
    return f"{form.format(value['mean'])} [{form.format(low)}, {form.format(high)}]"
