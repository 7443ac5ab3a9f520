"""A step: files in, a file out, and a manifest beside it. A finished step is not done again.

    def short(src, out, *, characters=2000, max_rejected=0.05):
        def work(step):
            def kept():
                for row in step.rows(("completion",)):
                    if len(row["completion"]) > characters:
                        step.lose("too long")
                    else:
                        yield row
            step.write(kept())
        return run_step("short", work, src=src, out=out, settings={"characters": characters}, max_rejected=max_rejected)

Whatever has this shape, ``step(src, out, **settings) -> Manifest``, is a step of ``llmdistill data run`` too. What was
made of other inputs is made again; other settings under one output are refused, with the difference.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import llmdistill
from llmdistill.datagen.schema import check_row
from llmdistill.datagen.tables import MOST_REJECTED, Rejects, Row, check_suffix, read_rows, write_rows
from llmdistill.errors import UserError
from llmdistill.evals.differing import differing
from llmdistill.record.manifest import Manifest, Mark, manifest_file, mark, read_manifest, write_manifest

Paths = str | Path | Sequence[str | Path]


class Step:
    """What the work of a step is given: its rows, where they go, and what is counted on the way.

    Attributes:
        inputs: the files it reads.
        out: the file it writes.
        counts: rows "read" and "written"; a step may count more.
        lost: rows that were read and left out, by reason.
        details: whatever else the manifest is to tell.
    """

    def __init__(self, inputs: Sequence[Path], out: Path, max_rejected: float = MOST_REJECTED) -> None:
        self.inputs, self.out = list(inputs), out
        self.rejects = Rejects(f"{out}.rejects.jsonl", max_rejected)
        self.counts, self.lost = Counter[str](), Counter[str]()
        self.details: dict[str, Any] = {}
        self.outputs: dict[Path, int] = {}

    def rows(self, columns: Sequence[str] = (), inputs: Sequence[Path] | None = None) -> Iterator[Row]:
        """The rows of all inputs, one in memory at a time. Those that lack one of ``columns``, or hold none of the
        schema's things in them, go to the rejects.

        Raises:
            UserError: too many of them do.
        """
        for source in self.inputs if inputs is None else inputs:
            for row in read_rows(source, self.rejects, lambda row: check_row(row, columns)):
                self.counts["read"] += 1
                yield row
        self.rejects.check()

    def again(self, columns: Sequence[str] = ()) -> Iterator[Row]:
        """The rows of :meth:`rows` once more, for a step that goes through them several times: nothing is counted, and
        what was rejected the first time is passed over."""
        unheeded = Rejects.unheeded()
        for source in self.inputs:
            yield from read_rows(source, unheeded, lambda row: check_row(row, columns))

    def lose(self, reason: str, rows: int = 1) -> None:
        """Counts rows that are left out."""
        self.lost[reason] += rows

    def write(self, rows: Iterable[Mapping[str, Any]], to: str | Path | None = None) -> int:
        """Writes the output, or another file that belongs to it; how many rows that were."""
        file = self.out if to is None else Path(to)
        self.outputs[file] = written = write_rows(file, rows)
        if to is None:
            self.counts["written"] = written
        return written

    def wrote(self, file: str | Path, rows: int | None = None) -> None:
        """Notes a file that was written otherwise (a page, a plot)."""
        self.outputs[Path(file)] = -1 if rows is None else rows


def run_step(
    name: str,
    work: Callable[[Step], None],
    *,
    src: Paths,
    out: str | Path,
    settings: Mapping[str, Any],
    max_rejected: float = MOST_REJECTED,
    suffixes: Sequence[str] = (".jsonl", ".jsonl.gz", ".parquet"),
    may_change: Sequence[str] = (),
) -> Manifest:
    """Does ``work`` unless it was done, and writes the manifest last.

    Args:
        src: its inputs; empty where the settings say what is read (a hub dataset).
        settings: what the output depends on beside its inputs; JSON-like.
        may_change: settings that make the output again when they change (how many samples), where others are refused.
        suffixes: how the output's name may end.

    Raises:
        UserError: an input that is not there, an output made with other settings, or what ``work`` raises. Then there
            is no new output and no new manifest.
    """
    target, inputs = check_suffix(out, suffixes), paths(src) if src else []
    said = plain(settings)
    before = read_manifest(target)
    _refuse_other_settings(target, before, name, said, may_change)
    marks = {str(file): mark(file) for file in inputs}
    if before is not None and before.settings == said and _unchanged(before, marks):
        return before
    manifest_file(target).unlink(missing_ok=True)  # what is being replaced is no longer what it says
    step, began = Step(inputs, target, max_rejected), time.perf_counter()
    step.rejects.forget()
    try:
        work(step)
    finally:
        step.rejects.close()
    made = Manifest(
        step=name,
        settings=said,
        inputs=marks,
        outputs={str(file): mark(file, None if rows < 0 else rows) for file, rows in step.outputs.items()},
        counts={**step.counts, "rejected": step.rejects.count},
        lost={**step.lost},
        details=plain(step.details),
        version=llmdistill.__version__,
        code=source_hash(sys.modules[work.__module__].__package__ or ""),
        seconds=round(time.perf_counter() - began, 3),
        lineage=lineage(inputs),
    )
    write_manifest(target, made)
    return made


def _refuse_other_settings(
    target: Path, before: Manifest | None, name: str, settings: Mapping[str, Any], may_change: Sequence[str]
) -> None:
    """Raises UserError where ``target`` was made by another step or with other settings; the first one is named."""
    if before is None:
        return
    fixed = [
        {"step": step, **{k: v for k, v in told.items() if k not in may_change}}
        for step, told in ((before.step, before.settings), (name, settings))
    ]
    for setting, then, now in differing(*fixed):
        raise UserError(
            f"{target} was made with {setting} {then}, now it is {now}. "
            f"Fix: another output, or remove {manifest_file(target)}."
        )


def lineage(inputs: Sequence[Path]) -> tuple[Mapping[str, Any], ...]:
    """The manifests behind some files, oldest first, each once."""
    found: dict[str, Mapping[str, Any]] = {}
    for file in inputs:
        if (manifest := read_manifest(file)) is not None:
            for step in manifest.history():
                found.setdefault(repr(sorted(step["outputs"].items())), step)
    return tuple(found.values())


def paths(src: Paths) -> list[Path]:
    """One path or several, each once."""
    given = [src] if isinstance(src, str | Path) else list(src)
    if not given:
        raise UserError("a step was given no input. Fix: the path of a data file.")
    return list(dict.fromkeys(Path(file) for file in given))


def beside(out: str | Path, name: str) -> Path:
    """A second file of a step: DIR/STEM.NAME.SUFFIX for DIR/STEM.SUFFIX."""
    path = Path(out)
    stem, dot, suffix = path.name.partition(".")
    return path.with_name(f"{stem}.{name}{dot}{suffix}")


def plain(value: Any) -> Any:
    """Settings as JSON keeps them, so that what is compared later is what was written."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if callable(value):
        return f"{value.__module__}:{value.__qualname__}"
    raise TypeError(f"a setting is a {type(value).__name__}; a manifest holds what JSON has")


@cache
def source_hash(package: str) -> str:
    """16 hex digits over the source files of a package, by name and content; empty where there are none."""
    module = sys.modules.get(package)
    files = [Path(file) for file in ([inspect.getfile(module)] if module is not None and module.__spec__ else [])]
    digest = hashlib.blake2b(digest_size=8)
    found = sorted(files[0].parent.rglob("*.py")) if files else []
    for file in found:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest() if found else ""


def _unchanged(before: Manifest, marks: Mapping[str, Mark]) -> bool:
    """Whether inputs and outputs are what they were when the step was finished."""
    if before.inputs.keys() != marks.keys():
        return False
    if any((marks[file].sha256, marks[file].bytes) != (old.sha256, old.bytes) for file, old in before.inputs.items()):
        return False
    for file, old in before.outputs.items():
        if not Path(file).is_file() or asdict(mark(file, old.rows)) != asdict(old):
            return False
    return bool(before.outputs)
