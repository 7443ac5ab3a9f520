"""JSON lines read by ourselves: where ``datasets`` stops at a line that is none, this says which, and goes on.

Files may be compressed (.gz, .bz2, .xz, .zst). A line that is no row comes as :class:`Unreadable` in its place.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llmdistill.errors import UserError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True)
class Unreadable:
    """What stands in the place of a row."""

    reason: str


def zstandard_for(what: str | Path) -> Any:
    """The module that reads ``.zst``.

    Raises:
        UserError: it is not installed; ``what`` needs it.
    """
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{what} is compressed with zstandard. Fix: pip install zstandard.") from None
    return zstandard


def opened(file: str | Path) -> IO[str]:
    """A text file, decompressed as its name says.

    Raises:
        UserError: it is compressed with zstandard, and that is not installed.
    """
    suffix = Path(file).suffix
    if suffix == ".zst":
        return io.TextIOWrapper(
            zstandard_for(file).ZstdDecompressor().stream_reader(open(file, "rb")), encoding="utf-8"
        )
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(suffix, open)
    return opener(file, "rt", encoding="utf-8")  # type: ignore[no-any-return]


def numbered_lines(files: Sequence[str]) -> Iterator[tuple[str, int, str]]:
    """(file, line from 1, text) of every line that is not blank."""
    for file in files:
        with opened(file) as text:
            for number, line in enumerate(text, 1):
                if line.strip():
                    yield file, number, line


def json_lines(files: Sequence[str]) -> Iterator[dict[str, Any] | Unreadable]:
    """The rows of files of JSON lines, or of one JSON list, in their order."""
    for file in files:
        if (whole := _json_list(file)) is not None:
            yield from whole
            continue
        for _, _, line in numbered_lines([file]):
            yield _row(line)


def line_of(files: Sequence[str], index: int) -> str:
    """Where row ``index`` stands: ``FILE, line N``."""
    for file in files:
        if (whole := _json_list(file)) is not None:
            if index < len(whole):
                return f"{file}, entry {index + 1}"
            index -= len(whole)
            continue
        for _, number, _ in numbered_lines([file]):
            if index == 0:
                return f"{file}, line {number}"
            index -= 1
    return ""


def _json_list(file: str) -> list[dict[str, Any] | Unreadable] | None:
    """The rows of a file that is one JSON list; None for any other."""
    with opened(file) as text:
        if text.read(1) != "[":
            return None
    with opened(file) as text:
        try:
            rows = json.load(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {error.lineno}: {error.msg}; it is no JSON. Fix: mend that line.") from None
    return [row if isinstance(row, dict) else Unreadable(_no_row(row)) for row in rows]


def _row(line: str) -> dict[str, Any] | Unreadable:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return Unreadable(f"it is no JSON: {error.msg} at column {error.colno}")
    return row if isinstance(row, dict) else Unreadable(_no_row(row))


def _no_row(value: Any) -> str:
    return f"it is {str(value)[:40]!r}, a {type(value).__name__}; a row has names and values"
