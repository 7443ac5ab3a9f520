"""What stands beside a data file: which step made it, of what, with which settings, and what came before.

    traces.jsonl                  rows
    traces.jsonl.manifest.json    the Manifest of the step that wrote them

It is written last, so that a file without one is not finished. ``lineage`` holds the manifests of the steps before, so
that the last file of a chain knows who wrote its texts and what was lost at each filter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from llmdistill.errors import UserError
from llmdistill.files import atomic_write, read_json

FORMAT = 1


@dataclass(frozen=True)
class Mark:
    """A file as it was read or written.

    Attributes:
        sha256: of its bytes.
        rows: in it, None where nobody counted them.
    """

    sha256: str
    bytes: int
    rows: int | None = None


@dataclass(frozen=True)
class Manifest:
    """How a data file came to be.

    Attributes:
        step: what made it ("generate", "verify", ...).
        settings: of the step. Under one output they may not change.
        inputs, outputs: by path as it was given.
        counts: rows "read", "written", "rejected".
        lost: rows that were read and not written, by reason.
        details: whatever the step tells besides: authors, statistics, thresholds that were found.
        version: of the package.
        code: 16 hex digits over the source of the package that holds the step.
        seconds: of work.
        lineage: the manifests of the files it was made of, oldest first, without lineages of their own.
    """

    step: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, Mark] = field(default_factory=dict)
    outputs: Mapping[str, Mark] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    lost: Mapping[str, int] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""
    code: str = ""
    seconds: float = 0.0
    lineage: tuple[Mapping[str, Any], ...] = ()

    def history(self) -> Iterator[Mapping[str, Any]]:
        """All steps up to this one, oldest first, as dictionaries."""
        yield from self.lineage
        yield {name: value for name, value in asdict(self).items() if name != "lineage"}

    def authors(self) -> dict[str, dict[str, Any]]:
        """Who wrote the texts: fingerprint -> name, role, tokenizer and number of traces. Empty where nobody says."""
        found: dict[str, dict[str, Any]] = {}
        for step in self.history():
            for fingerprint, author in step["details"].get("authors", {}).items():
                found[fingerprint] = dict(author)
        return found


def manifest_file(out: str | Path) -> Path:
    """Where the manifest of a data file stands."""
    return Path(f"{out}.manifest.json")


def read_manifest(out: str | Path) -> Manifest | None:
    """The manifest of a data file; None without one.

    Raises:
        UserError: it is damaged, or of a later format.
    """
    file = manifest_file(out)
    fix = f"remove {file}, then the command that made {out} once more"
    content = read_json(file, fix)
    if content is None:
        return None
    try:
        if content["format"] > FORMAT:
            raise UserError(
                f"{file} has format {content['format']}, this llmdistill reads up to {FORMAT}. Fix: upgrade."
            )
        known = {f.name: content[f.name] for f in fields(Manifest)}
        for side in ("inputs", "outputs"):
            known[side] = {path: Mark(**mark) for path, mark in known[side].items()}
        return Manifest(**{**known, "lineage": tuple(known["lineage"])})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no manifest ({error!r}). Fix: {fix}.") from error


def write_manifest(out: str | Path, manifest: Manifest) -> None:
    """Puts it beside the data file. Raises UserError where the disk is full."""
    content = {"format": FORMAT, **asdict(manifest)}
    atomic_write(manifest_file(out), json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def mark(file: str | Path, rows: int | None = None) -> Mark:
    """A file as it is now. Raises UserError where there is none."""
    path, digest, size = Path(file), hashlib.sha256(), 0
    try:
        with path.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}. Fix: the path of a data file.") from error
    return Mark(digest.hexdigest(), size, rows)
