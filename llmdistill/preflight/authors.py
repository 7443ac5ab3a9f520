"""Who wrote the texts that are trained on, or were before: manifests beside data files tell."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from llmdistill.preflight.finding import Finding, Side, Subject, notice, ok
from llmdistill.record.manifest import read_manifest


def authors(s: Subject) -> Iterator[Finding]:
    """The teacher is the author of the traces that the student learnt from, or learns from now."""
    looked = False
    for file, what in _data_files(s):
        written = _teachers(file)
        looked = looked or bool(written)
        for side in s.sides:
            if written and not any(_same(side, fingerprint, who) for fingerprint, who in written.items()):
                names = ", ".join(f"{who['name']!r} ({fingerprint})" for fingerprint, who in written.items())
                message = (
                    f"the traces {what} ({file}) were written by {names}, and teacher {side.info.name!r} "
                    f"({side.info.fingerprint}) is another model: the student is drawn to two teachers in turn"
                )
                yield notice(message, "distil from the traces' author, or have this teacher write traces of its own")
    yield ok("the teacher wrote the traces" if looked else "no manifest says who wrote the texts")


def _data_files(s: Subject) -> Iterator[tuple[Path, str]]:
    """Data files of this run, and of the one that made its student."""
    for train in _files(s.trainer.data_config.train):
        yield train, "of data.train"
    model = Path(s.recipe.student.model) if s.recipe is not None else Path("")
    record = model.parent / "config.yaml"  # RUN/student
    if model.name == "student" and record.is_file():
        try:
            before: Any = yaml.safe_load(record.read_text(encoding="utf-8"))
            train = before["data"]["train"]
        except (yaml.YAMLError, TypeError, KeyError):
            return
        for file in _files(train):
            yield file, "that the student was trained on"


def _files(train: Any) -> list[Path]:
    """Those that a recipe names: one, a list of them, or a pattern."""
    named = [train] if isinstance(train, str) else train if isinstance(train, list) else []
    return [Path(file) for name in named if name for file in (sorted(glob.glob(str(name))) or [name])]


def _teachers(file: Path) -> dict[str, dict[str, Any]]:
    """Of the traces in a file: those who wrote as teachers, by fingerprint."""
    manifest = read_manifest(file) if file.is_file() else None
    found = manifest.authors() if manifest is not None else {}
    return {fingerprint: who for fingerprint, who in found.items() if who.get("role") != "student"}


def _same(side: Side, fingerprint: str, who: dict[str, Any]) -> bool:
    """By weights; where an endpoint told its name only, by that."""
    return side.info.fingerprint == fingerprint or (
        fingerprint.startswith("name:") and str(who["name"]) in (side.info.name, side.name)
    )
