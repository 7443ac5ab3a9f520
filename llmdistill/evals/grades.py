"""Grades of a folder while they come: appended like samples, so that a kill costs none of those that were there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from llmdistill.evals.lines import Lines
from llmdistill.evals.records import Appender, EvalFolder, Grade, Problem, Sample, json_rows
from llmdistill.extras import installed_version


class GradesSoFar:
    """``grading.jsonl`` of a folder: what a grading that was interrupted had found.

    It counts for the next one where judge, settings, problem and text are the same.

    Args:
        settings: what verdicts depend on beside sample, problem and code.
    """

    def __init__(self, folder: EvalFolder, settings: dict[str, Any]) -> None:
        self.file = folder.path / "grading.jsonl"
        judge = _digest([settings, judges_code()])
        if _first(self.file) != {"judge": judge}:
            self.file.unlink(missing_ok=True)
        fresh = not self.file.is_file()
        self._writer = Appender(self.file)
        if fresh:
            self._writer.add({"judge": judge})
        self._lines = Lines(lambda: [self.file], _read, _key, last=True)

    def of(self, problem: Problem, samples: Sequence[Sample]) -> list[Grade | None]:
        """The grades of a problem's samples, None for those that are not there."""
        self._lines.look()
        kept = {grade.index: (of, grade) for of, grade in self._lines.of(problem.id)}
        found = [kept.get(sample.index, ("", None)) for sample in samples]
        return [g if of == _what(problem, s) else None for s, (of, g) in zip(samples, found, strict=True)]

    def add(self, problem: Problem, samples: Sequence[Sample], grades: Sequence[Grade]) -> None:
        """Raises UserError where the disk is full."""
        self._writer.add(*({"of": _what(problem, s), "grade": asdict(g)} for s, g in zip(samples, grades, strict=True)))

    def close(self, done: bool) -> None:
        """``done``: grades.jsonl has them all, so that the file can go."""
        self._writer.close()
        if done:
            self.file.unlink(missing_ok=True)


def _first(file: Path) -> Any:
    if not file.is_file():
        return None
    return next(iter(json_rows(file)), None)


def _read(row: dict[str, Any]) -> tuple[str, Grade]:
    return ("", Grade("", -1, False, "", None, "", "")) if "judge" in row else (row["of"], Grade(**row["grade"]))


def _key(row: dict[str, Any]) -> tuple[str, int] | None:
    return None if "judge" in row else (row["grade"]["problem"], row["grade"]["index"])


@cache
def judges_code() -> str:
    """16 hex digits over whatever gives verdicts: grades of other code are made again."""
    parts = [(files("llmdistill.evals") / "grading.py").read_bytes(), *_sources(files("llmdistill.verify"))]
    if mpmath := installed_version("mpmath"):
        parts.append(mpmath.encode())
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
