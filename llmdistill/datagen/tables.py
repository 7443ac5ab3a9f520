"""Reading and writing rows in bounded memory: JSONL, gzipped JSONL, Parquet, and datasets saved to disk.

What cannot be read goes to a file of rejects with the reason, and a run of which more than a share is rejected stops.
Files are replaced in one move: a reader sees the old one or the new one, whole.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

from llmdistill.errors import UserError
from llmdistill.evals.records import as_line
from llmdistill.files import atomic_write, full_disk_is_said

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
BATCH = 1024  # rows of a Parquet file that are in memory at one time
MOST_REJECTED = 0.05  # share of rows
JUDGED_AFTER = 200  # rows, before a share says anything while there are more to come


class Rejects:
    """The rows that could not be used, with the reason: ``OUT.rejects.jsonl``, made when there is one.

    Args:
        file: where they are written, {"source", "row", "reason", "content"} a line; what was there is replaced. None:
            nowhere.
        most: share of the rows read above which the run stops.
    """

    def __init__(self, file: str | Path | None, most: float = MOST_REJECTED) -> None:
        self.file, self.most = None if file is None else Path(file), most
        self.read = self.count = 0
        self.reasons: dict[str, int] = {}
        self._lines: IO[str] | None = None

    @classmethod
    def unheeded(cls) -> Rejects:
        """For a second time through the same rows: what was rejected is written down and counted already."""
        return cls(None, most=1.0)

    def add(self, source: str, number: int, reason: str, content: Any) -> None:
        """Row ``number`` (from 1) of ``source``.

        Raises:
            UserError: more than ``most`` of what was read is rejected by now; the disk is full.
        """
        self.count += 1
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if self.file is None:
            return
        with full_disk_is_said(self.file):
            if self._lines is None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self._lines = self.file.open("w", encoding="utf-8")
            self._lines.write(as_line({"source": source, "row": number, "reason": reason, "content": content}))
        if self.read >= JUDGED_AFTER:
            self.check()

    def forget(self) -> None:
        """Removes what an earlier run has left: its rejects are not this one's."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def check(self) -> None:
        """Raises UserError where too many rows were rejected, with the commonest reason."""
        if self.count > self.most * max(self.read, 1):
            self.close()
            reason, times = max(self.reasons.items(), key=lambda item: item[1])
            raise UserError(
                f"{self.count} of {self.read} rows were rejected, more than the share {self.most:g} that may be; "
                f"{times} of them: {reason}. Fix: see {self.file}, then mend the data or raise max_rejected."
            )

    def close(self) -> None:
        if self._lines is not None and self.file is not None:
            with full_disk_is_said(self.file):
                self._lines.close()
            self._lines = None


def read_rows(
    source: str | Path, rejects: Rejects | None = None, check: Callable[[Mapping[str, Any]], None] | None = None
) -> Iterator[Row]:
    """The rows of a file or of a dataset saved to disk, one after another.

    Args:
        rejects: where rows go that are no JSON, no object, or refused by ``check``; None: such a row is an error.
        check: raises ValueError, with the reason, for a row that cannot be used.

    Raises:
        UserError: no such file, a file of another kind or a damaged one, or a row that cannot be used.
    """
    path = Path(source)
    for number, row, raw in _whole_rows(path):
        if rejects is not None:
            rejects.read += 1
        try:
            if row is None:
                raise ValueError("no JSON object")
            if check is not None:
                check(row)
        except ValueError as error:
            if rejects is None:
                raise UserError(f"{path}, row {number}: {error}. Fix: mend or remove the row.") from None
            rejects.add(str(path), number, str(error), row if row is not None else raw)
            continue
        yield row


def count_rows(source: str | Path) -> int:
    """Rows of a file, without parsing them."""
    path = Path(source)
    if path.suffix == ".parquet" and path.is_file():
        import pyarrow.parquet as parquet

        with _damage_is_said(path):
            return int(parquet.ParquetFile(path).metadata.num_rows)
    return sum(1 for _ in _whole_rows(path))


def write_rows(file: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes rows, the file's kind by its name, and returns how many. Nothing is there before all of it is.

    Columns of a Parquet file may be missing or null in some rows, whichever; they have one type.

    Raises:
        UserError: another kind of file, columns whose values have no common type, a full disk.
    """
    path = check_suffix(file, (".jsonl", ".jsonl.gz", ".parquet"))
    counted = _Counted(rows)
    if path.suffix == ".parquet":
        atomic_write(path, lambda target: _write_parquet(target, counted, path))
    else:
        atomic_write(path, lambda target: _write_lines(target, counted, path.suffix == ".gz"))
    return counted.count


def check_suffix(file: str | Path, known: Sequence[str] = SUFFIXES) -> Path:
    """The path. Raises UserError where its name ends in nothing that is known here."""
    path = Path(file)
    if not path.name.endswith(tuple(known)):
        raise UserError(f"{file} is no known kind of file; it must end in {', '.join(known)}. Fix: another name.")
    return path


class _Counted:
    """Rows, counted as they go by."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.rows, self.count = rows, 0

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for row in self.rows:
            self.count += 1
            yield row


def _whole_rows(path: Path) -> Iterator[tuple[int, Row | None, Any]]:
    """As :func:`_raw_rows`. Raises UserError, with the last row that could be read, where the file ends in the middle
    or is not of the kind that its name says."""
    rows, number = _raw_rows(path), 0
    while True:
        with _damage_is_said(path, number):
            if (found := next(rows, None)) is None:
                return
        number = found[0]
        yield found


@contextmanager
def _damage_is_said(path: Path, rows: int = 0) -> Iterator[None]:
    """Turns what readers raise about a damaged file into one line."""
    from pyarrow import ArrowException

    try:
        yield
    except UserError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, ArrowException) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise UserError(
            f"{path} cannot be read behind row {rows}: {reason}. Fix: a whole copy of it, or the name of its kind."
        ) from error


def _raw_rows(path: Path) -> Iterator[tuple[int, Row | None, Any]]:
    """Number from 1, row (None where it is no object) and what was read."""
    if path.is_dir():
        from datasets import DatasetDict, load_from_disk

        table = load_from_disk(str(path))
        if isinstance(table, DatasetDict):
            raise UserError(f"{path} holds the splits {', '.join(table)}. Fix: {path / next(iter(table))}.")
        plain = _as_json(table.features.arrow_schema)
        yield from ((number, plain(row), row) for number, row in enumerate(table, 1))
        return
    if not path.is_file():
        raise UserError(f"{path}: there is no such file. Fix: the path of a file that ends in {', '.join(SUFFIXES)}.")
    check_suffix(path)
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        number, file = 0, parquet.ParquetFile(path)
        plain = _as_json(file.schema_arrow)
        for batch in file.iter_batches(BATCH):
            for row in map(plain, batch.to_pylist()):
                number += 1
                yield number, row, row
    elif path.suffix == ".json":
        table = json.loads(path.read_bytes())
        if not isinstance(table, list):
            raise UserError(f"{path} holds no list of rows. Fix: JSON Lines (.jsonl), or a list of objects.")
        yield from ((number, row if isinstance(row, dict) else None, row) for number, row in enumerate(table, 1))
    else:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, *_parsed(line)


def _as_json(schema: Any) -> Callable[[Mapping[str, Any]], Row]:
    """How rows of an Arrow schema become what JSON has: dates, decimals and bytes as text."""
    if any(kind in str(schema) for kind in ("timestamp", "date", "time", "duration", "decimal", "binary")):
        return lambda row: json.loads(json.dumps(row, default=_as_text))  # type: ignore[no-any-return]
    return dict


def _as_text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(value.isoformat()) if hasattr(value, "isoformat") else str(value)


def _parsed(line: bytes) -> tuple[Row | None, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None, line.decode("utf-8", "replace").rstrip("\n")
    return (row if isinstance(row, dict) else None), row


def _write_lines(target: Path, rows: Iterable[Mapping[str, Any]], gzipped: bool) -> None:
    with ExitStack() as stack:
        raw: Any = stack.enter_context(target.open("wb"))
        if gzipped:  # without a date: equal rows, equal bytes
            raw = stack.enter_context(gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0, compresslevel=6))
        lines = stack.enter_context(io.TextIOWrapper(raw, encoding="utf-8"))
        for row in rows:
            lines.write(as_line(dict(row)))


def _write_parquet(target: Path, rows: Iterable[Mapping[str, Any]], name: Path) -> None:
    """Twice through the rows, since a column's type is known when all were seen: a spool keeps them in between."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    spool, schema = target.with_name(target.name + ".spool"), pa.schema([])
    try:
        with gzip.open(spool, "wt", encoding="utf-8", compresslevel=1) as lines:
            for batch in _batches(rows):
                lines.writelines(map(as_line, batch))
                try:
                    found = pa.Table.from_pylist(batch, schema=None).schema if len(batch) else schema
                    schema = pa.unify_schemas([schema, _all_columns(batch, found)], promote_options="permissive")
                except pa.ArrowException as error:
                    raise UserError(
                        f"{name} cannot be written: {error}. Fix: values of one type in a column, or a .jsonl file."
                    ) from error
        with gzip.open(spool, "rt", encoding="utf-8") as lines, parquet.ParquetWriter(target, schema) as writer:
            for batch in _batches(json.loads(line) for line in lines):
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
    finally:
        spool.unlink(missing_ok=True)


def _all_columns(batch: Sequence[Mapping[str, Any]], found: Any) -> Any:
    """The schema of a batch. pyarrow takes the columns of its first row only."""
    import pyarrow as pa

    names = list(dict.fromkeys(name for row in batch for name in row))
    if names == found.names:
        return found
    return pa.schema([(name, pa.array([row.get(name) for row in batch]).type) for name in names])


def _batches(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    waiting = iter(rows)
    while batch := [dict(row) for row in islice(waiting, BATCH)]:
        yield batch
