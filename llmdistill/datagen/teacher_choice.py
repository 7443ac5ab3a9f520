"""A small trial of teachers: the student learns a little from each, and is asked held-out prompts (DED, METHODS 4.4).

DED chooses the teacher by such a trial, since the better teacher need not be the larger one, nor the one that is right
more often. Every teacher gives one trace for each of the same prompts (right ones, where they were judged), the same
student is fine-tuned on them in the same way, and then answers the same prompts of which no teacher gave any. Each
training and each answer is a step of its own beside the page, so that an interrupted trial goes on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from llmdistill.datagen.generation import generate
from llmdistill.datagen.schema import prompt_of
from llmdistill.datagen.steps import Step
from llmdistill.datagen.tables import Row, read_rows, write_rows
from llmdistill.datagen.training import student_of, train
from llmdistill.datagen.writing import chance
from llmdistill.errors import UserError
from llmdistill.record.intervals import bootstrap_ci, paired_bootstrap

BEFORE = "untrained"
TUNING = {"objective.method": "sft", "objective.stage1_epochs": 3, "objective.heldout_sequences": 0}
LEAST = 2  # prompts to train on, and as many to be asked


@dataclass(frozen=True)
class Trial:
    """How teachers are tried.

    Attributes:
        prompts: to train on, at most; one trace each.
        heldout: share of the prompts that all teachers answered on which the student is asked.
        n: answers to each of them.
        judge: of the answers.
        sampling: of the answers.
        role: settings of the student that answers (engine, dtype, ...).
        door, config, settings, launch: of the training, as of the step ``train``; ``settings`` over :data:`TUNING`.
    """

    prompts: int = 64
    heldout: float = 0.3
    n: int = 2
    judge: str = "math"
    sampling: Mapping[str, Any] = field(default_factory=dict)
    role: Mapping[str, Any] = field(default_factory=dict)
    door: str = "redi"
    config: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    launch: str = ""

    @classmethod
    def of(cls, given: Mapping[str, Any], student: str) -> Trial:
        """Raises UserError for no student, or a setting that is none or out of range."""
        known = [f.name for f in fields(cls)]
        if unknown := [key for key in given if key not in known]:
            raise UserError(f"trial has no setting {unknown[0]!r}. Fix: one of {', '.join(known)}.")
        if not student:
            raise UserError("a trial trains a student, and none is named. Fix: student: FOLDER_OR_NAME.")
        made = cls(**given)
        if not 0 < made.heldout < 1 or made.prompts < LEAST or made.n < 1:
            raise UserError(
                f"trial has heldout {made.heldout}, prompts {made.prompts} and n {made.n}. "
                f"Fix: heldout in (0, 1), prompts of {LEAST} or more, n of 1 or more."
            )
        return made

    def run(self, step: Step, student: str, names: list[str], column: str) -> dict[str, Any]:
        """{"trained_on", "asked": numbers of prompts, "right": {teacher or "untrained": mean and interval},
        "differences": {"A - B": ...}} after training one student for each teacher.

        Raises:
            UserError: too few prompts, or what training and generation raise.
        """
        folder = Path(f"{step.out}.trial")
        traces, asked = self._chosen(step, names, column)
        write_rows(folder / "asked.jsonl", asked)
        rates = {BEFORE: self._rates(folder, "untrained", student)}
        for name in names:
            file = folder / f"{_file(name)}.jsonl"
            write_rows(file, traces[name])
            settings = {"student.model": student, **TUNING, **self.settings}
            out = folder / f"{_file(name)}.json"
            train(file, out, door=self.door, config=self.config, settings=settings, launch=self.launch)
            rates[name] = self._rates(folder, _file(name), str(student_of(out)))
        return {
            "trained_on": len(traces[names[0]]),
            "asked": len(asked),
            "right": {n: {"mean": float(np.mean(r)), "interval": list(bootstrap_ci(r))} for n, r in rates.items()},
            "differences": {
                f"{a} - {b}": vars(paired_bootstrap(rates[a], rates[b]))
                for i, a in enumerate(names)
                for b in names[i + 1 :]
            },
        }

    def _chosen(self, step: Step, names: list[str], column: str) -> tuple[dict[str, list[Row]], list[Row]]:
        """{teacher: its traces to train on}, prompt by prompt the same, and the rows to ask."""
        first = dict[str, dict[str, Row]]()  # prompt -> teacher -> its first trace that can be learnt from
        every = dict[str, Row]()
        for row in step.again(("prompt", "completion")):
            name, prompt = str(row.get(column) or "unnamed"), prompt_of(row)
            if chance("trial", prompt) < self.heldout:
                every.setdefault(prompt, {key: row.get(key) for key in ("prompt", "answer", "tests")})
            elif row.get("finish") != "length" and row.get("passed") is not False:
                first.setdefault(prompt, {}).setdefault(name, row)
        both = [traces for traces in first.values() if len(traces) == len(names)][: self.prompts]
        asked = [{key: value for key, value in row.items() if value is not None} for row in every.values()]
        if len(both) < LEAST or len(asked) < LEAST:
            raise UserError(
                f"a trial has {len(both)} prompts that all of {', '.join(names)} answered in a way to be learnt from, "
                f"and {len(asked)} to ask; it needs {LEAST} of each. Fix: more traces."
            )
        return {name: [traces[name] for traces in both] for name in names}, asked

    def _rates(self, folder: Path, name: str, student: str) -> list[float]:
        """The share of right answers to each prompt that is asked."""
        out = folder / f"{name}.answers.jsonl"
        roles = {"teacher": {"model": student, **self.role}}
        generate(folder / "asked.jsonl", "plain", roles, out, n=self.n, sampling=self.sampling, judge=self.judge)
        passed = dict[str, list[bool]]()
        for row in read_rows(out):
            passed.setdefault(prompt_of(row), []).append(bool(row["passed"]))
        return [float(np.mean(values)) for values in passed.values()]


def trial_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The trial as Markdown."""
    yield "## A trial"
    yield ""
    yield (
        f"The student after {found['trained_on']:,} traces of each teacher, for the same prompts, "
        f"on {found['asked']:,} other prompts."
    )
    yield ""
    yield "| taught by | right, with the 95 % interval over prompts |"
    yield "|---|---|"
    for name, right in found["right"].items():
        low, high = right["interval"]
        yield f"| {name} | {right['mean']:.1%} [{low:.1%}, {high:.1%}] |"
    yield ""
    yield from difference_lines("prompt by prompt", found["differences"])


def difference_lines(title: str, differences: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Paired differences of shares as a table in Markdown."""
    yield f"| {title} | difference | 95 % interval | p |"
    yield "|---|---|---|---|"
    for pair, d in differences.items():
        yield f"| {pair} | {d['difference']:+.1%} | {d['low']:+.1%} to {d['high']:+.1%} | {d['p_value']:.3f} |"


def _file(name: str) -> str:
    """A teacher's name as that of a file; two that would be one differ behind it."""
    plain = re.sub(r"[^\w.-]+", "_", name).strip("_.")[-60:]
    return plain if plain == name else f"{plain}-{int(chance('name', name) * 16**6):06x}"
