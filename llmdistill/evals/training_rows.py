"""Training data as a stream of (id, text): files, datasets and rows of any layout, one row in memory at a time."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from llmdistill.errors import UserError

_NOT_TEXT = ("role", "type")  # of chat messages and their parts
_ROWS = 256  # of a Parquet file decoded at a time


def row_text(row: Mapping[str, Any], columns: Sequence[str] | None = None) -> str:
    """All text of a row: its string columns, and the strings within lists and chat messages, one a line.

    Args:
        row: of a dataset; ``{"messages": [{"role": ..., "content": ...}]}`` as well as ``{"prompt": ..., ...}``.
        columns: which columns to read; all when None.

    Raises:
        UserError: a named column is not there.
    """
    if columns is not None:
        if missing := [c for c in columns if c not in row]:
            raise UserError(f"the training rows have no column {missing[0]!r}; they have {', '.join(row)}")
        return "\n".join(part for c in columns for part in _strings(row[c]))
    return "\n".join(_strings(row))


def documents(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> Iterator[tuple[str, str]]:
    """(id, text) of rows, such as those of a Hugging Face dataset; a row without "id" is named by its number from 0."""
    for number, row in enumerate(rows):
        yield str(row.get("id") or number), row_text(row, columns)


class TrainingFiles:
    """The rows of .jsonl, .jsonl.gz, .json and .parquet files and of ``save_to_disk`` folders, as (id, text).

    A row without "id" is named FILE:ROW, rows from 1.

    Attributes:
        total: bytes on disk of all files.
        done: bytes of it that were read so far, for a progress bar.

    Raises:
        UserError: a file that is not there or of no known kind; when read, a line that is not JSON or no object.
    """

    def __init__(self, paths: Sequence[str | Path], columns: Sequence[str] | None = None) -> None:
        self.paths = [Path(p) for p in paths]
        self.columns = columns
        self.sizes = [_size(p) for p in self.paths]
        self.total = sum(self.sizes)
        self.done = 0

    def __iter__(self) -> Iterator[tuple[str, str]]:
        before = 0
        for path, size in zip(self.paths, self.sizes, strict=True):
            for number, row in enumerate(self._rows(path, size, before), 1):
                yield str(row.get("id") or f"{path.name}:{number}"), row_text(row, self.columns)
            before += size
            self.done = before

    def _rows(self, path: Path, size: int, before: int) -> Iterator[Mapping[str, Any]]:
        if path.is_dir():
            from datasets import load_from_disk

            yield from load_from_disk(str(path))
        elif path.suffix == ".parquet":
            import pyarrow.parquet as parquet

            file = parquet.ParquetFile(path)
            seen = 0
            for batch in file.iter_batches(_ROWS, columns=None if self.columns is None else ["id", *self.columns]):
                yield from batch.to_pylist()
                seen += batch.num_rows
                self.done = before + size * seen // file.metadata.num_rows
        elif path.suffix == ".json":
            table = json.loads(path.read_bytes())
            if not isinstance(table, list):
                raise UserError(f"{path} holds no list of rows. Fix: JSON Lines (.jsonl), or a list of objects.")
            yield from table
        else:
            with path.open("rb") as raw:
                yield from self._lines(path, raw, before)

    def _lines(self, path: Path, raw: IO[bytes], before: int) -> Iterator[Mapping[str, Any]]:
        lines: Iterable[bytes] = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        for number, line in enumerate(lines, 1):
            if number % 256 == 0:
                self.done = before + raw.tell()
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path} line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path} line {number} is no object; each line must be one row of named columns.")
            yield row


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(f.stat().st_size for f in path.rglob("*.arrow"))
    if not path.is_file():
        raise UserError(f"--train {path}: no such file")
    if not path.name.endswith((".jsonl", ".jsonl.gz", ".json", ".parquet")):
        raise UserError(f"--train {path}: unknown kind of file; .jsonl, .jsonl.gz, .json, .parquet or a saved dataset")
    return path.stat().st_size


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            if key not in _NOT_TEXT:
                yield from _strings(part)
    elif isinstance(value, (list, tuple)):
        if value and isinstance(value[0], (int, float)):  # token ids, scores
            return
        for part in value:
            yield from _strings(part)
