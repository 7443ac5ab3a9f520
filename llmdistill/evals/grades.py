"""Grades of a folder while they come: appended like samples, so that a kill costs none of those that were there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from llmdistill.evals.records import Appender, EvalFolder, Grade, Problem, Sample, json_rows


class GradesSoFar:
    """``grading.jsonl`` of a folder: what a grading that was interrupted had found.

    It counts for the next one where judge, settings, problem and text are the same.

    Args:
        settings: what verdicts depend on beside sample, problem and code.
    """

    def __init__(self, folder: EvalFolder, settings: dict[str, Any]) -> None:
        self.file = folder.path / "grading.jsonl"
        judge = _digest([settings, judges_code()])
        rows = list(json_rows(self.file)) if self.file.is_file() else []
        if not rows or rows[0] != {"judge": judge}:
            rows = []
            self.file.unlink(missing_ok=True)
        self._writer = Appender(self.file)
        if not rows:
            self._writer.add({"judge": judge})
        self._found: dict[tuple[str, int], tuple[str, Grade]] = {}
        for row in rows[1:]:
            grade = Grade(**row["grade"])
            self._found[grade.problem, grade.index] = row["of"], grade

    def of(self, problem: Problem, sample: Sample) -> Grade | None:
        """The grade of this sample, if it is there."""
        of, grade = self._found.get((sample.problem, sample.index), ("", None))
        return grade if of == _what(problem, sample) else None

    def add(self, graded: Sequence[tuple[Problem, Sample, Grade]]) -> None:
        """Raises UserError where the disk is full."""
        self._writer.add(*({"of": _what(p, s), "grade": asdict(g)} for p, s, g in graded))

    def close(self, done: bool) -> None:
        """``done``: grades.jsonl has them all, so that the file can go."""
        self._writer.close()
        if done:
            self.file.unlink(missing_ok=True)


@cache
def judges_code() -> str:
    """16 hex digits over whatever gives verdicts: grades of other code are made again."""
    parts = [(files("llmdistill.evals") / "grading.py").read_bytes(), *_sources(files("llmdistill.verify"))]
    with suppress(PackageNotFoundError):
        parts.append(version("mpmath").encode())
    return hashlib.blake2b(b"\0".join(parts), digest_size=8).hexdigest()


def _sources(folder: Traversable) -> list[bytes]:
    found: list[bytes] = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            found += _sources(entry)
        elif Path(entry.name).suffix == ".py":
            found.append(entry.read_bytes())
    return found


def _what(problem: Problem, sample: Sample) -> str:
    return _digest([asdict(problem), sample.text, sample.finish])


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()
