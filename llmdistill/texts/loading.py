"""The rows of a recipe: files (several, globs, compressed), folders (also of ``save_to_disk``), and hub datasets."""

from __future__ import annotations

import glob
import importlib.util
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from llmdistill.errors import UserError, in_this_folder
from llmdistill.recipe.data_config import DataConfig
from llmdistill.texts.columns import Columns
from llmdistill.texts.lines import COMPRESSED, Unreadable, json_lines, line_of, zstandard_for

KINDS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
KINDS |= {".tsv": "csv"}
SHOWN = 8  # names in a message


class Rows:
    """Rows that are all there, and where each of them stands.

    Args:
        rows: a ``datasets.Dataset``, or what was read by ourselves: rows, and :class:`Unreadable` where there is none.
        source: what the recipe calls them.
        files: they were read from, where these are JSON lines.
    """

    def __init__(self, rows: Any, source: str, files: Sequence[str] = ()) -> None:
        self.rows, self.source, self.files = rows, source, files

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]

    @property
    def column_names(self) -> list[str]:
        if (names := getattr(self.rows, "column_names", None)) is not None:  # of a datasets.Dataset
            return list(names)
        return list(next((row for row in self.rows if isinstance(row, Mapping)), {}))

    def where(self, index: int) -> str:
        """File and line of a row, where that can be said."""
        return line_of(self.files, index) if self.files else ""

    def first(self, n: int) -> Rows:
        """The first so many."""
        select = getattr(self.rows, "select", None)
        rows = self.rows[:n] if select is None else select(range(min(n, len(self))))
        return Rows(rows, self.source, self.files)


class RowStream:
    """Rows that are read as they are needed, in every epoch in another order.

    Args:
        rows: an iterable that can be read again.
        limit: of an epoch; 0: all.
        buffer: rows among which the next one is drawn; 0: they come as they stand.
    """

    def __init__(
        self,
        rows: Iterable[Any],
        source: str,
        files: Sequence[str] = (),
        *,
        limit: int = 0,
        buffer: int = 0,
        seed: int = 0,
    ) -> None:
        self.rows, self.source, self.files = rows, source, files
        self.limit, self.buffer, self.seed = limit, buffer, seed

    def __iter__(self) -> Iterator[Any]:
        """As they stand."""
        return islice(iter(self.rows), self.limit or None)

    def numbered(self, epoch: int) -> Iterator[tuple[int, Any]]:
        """(place in the source, row) in the order of an epoch: the same for the same seed."""
        return _shuffled(enumerate(self), self.buffer, random.Random(f"{self.seed}:{epoch}"))

    where = Rows.where


class _Lines:
    """Files of JSON lines as an iterable that can be read again."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = files

    def __iter__(self) -> Iterator[Any]:
        return json_lines(self.files)


def load_rows(
    source: str | Sequence[str], config: DataConfig, setting: str, *, split: str = "", seed: int = 0
) -> Rows | RowStream:
    """The rows of files, a folder or a hub dataset; a :class:`RowStream` with ``data.streaming``.

    Args:
        setting: that names them, for messages.
        split: to read, where that is not ``data.split``.
        seed: of a stream's order.

    Raises:
        UserError: nothing there, not parseable, no prompt column, or no rows.
    """
    named = [source] if isinstance(source, str) else list(source)
    shown = named[0] if len(named) == 1 else ", ".join(map(str, named))
    if not named or not all(isinstance(name, str) and name for name in named):
        raise UserError(f"{setting} is {source!r}; it must be a file or a hub dataset, or a list of files.")
    files, split = _files(named, setting), split or config.split
    kind = _kind(files, setting) if files else ""
    own = files if kind == "json" and all(Path(file).is_file() for file in files) else []
    if config.streaming and own:
        rows: Any = _Lines(own)
    else:
        try:
            rows = _read(named, files, kind, config, split, setting)
        except UserError:
            raise
        except Exception as error:  # datasets raises whatever its readers raise
            rows = _line_by_line(own, config, setting) if own else None
            if rows is None:
                raise _not_read(error, shown, config, split, setting) from error
    if config.streaming:
        more = {"limit": config.limit, "buffer": config.shuffle_buffer, "seed": seed}
        stream = RowStream(rows, shown, own, **more)
        _check_columns(list(next((row for row in stream if isinstance(row, Mapping)), {})), config, setting, shown)
        return stream
    made = Rows(rows, shown, own)
    _check_columns(made.column_names, config, setting, shown)
    return made.first(config.limit) if config.limit else made


def load_sets(source: Any, setting: str, load: Callable[..., Any]) -> Any:
    """What ``load(source, setting=...)`` gives, or of several sets (``data.heldout`` as a mapping) that of each."""
    if isinstance(source, Mapping):
        return {name: load(each, setting=f"{setting}.{name}") for name, each in source.items()}
    return load(source, setting=setting)


def _files(named: Sequence[str], setting: str) -> list[str]:
    """Files as they are named, globs filled in; none of them: it is a folder or a hub dataset."""
    found: list[str] = []
    for name in named:
        if any(c in name for c in "*?[") and not Path(name).exists() and "://" not in name:
            matches = sorted(file for file in glob.glob(name, recursive=True) if Path(file).is_file())
            if not matches:
                raise UserError(f"{setting} {name!r} matches no file. Fix: another pattern.")
            found += matches
        elif len(named) > 1 or _suffix(name) in KINDS:
            if "://" not in name and not Path(name).expanduser().exists():
                raise UserError(
                    f"{setting} {name!r}: there is no such file{in_this_folder(name)}. Fix: another path, or make it: "
                    "the head of a recipe says what makes its files."
                )
            found.append(name)
    return found


def _suffix(name: str) -> str:
    path = Path(name)
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _kind(files: Sequence[str], setting: str) -> str:
    kinds = {KINDS.get(_suffix(file), "") for file in files}
    if "" in kinds or len(kinds) > 1:
        raise UserError(
            f"{setting} names files of several kinds, or of one that is not read: {', '.join(files[:SHOWN])}. Fix: "
            f"files of one kind among {', '.join(KINDS)}, each of them compressed or not ({', '.join(COMPRESSED)})."
        )
    if any(file.endswith(".zst") for file in files):
        zstandard_for(setting)
    return kinds.pop()


def _read(named: Sequence[str], files: list[str], kind: str, config: DataConfig, split: str, setting: str) -> Any:
    """A ``datasets.Dataset`` or ``IterableDataset``; a list where there is no ``datasets``.

    Raises:
        UserError: without ``datasets``, of anything but files of JSON lines or Parquet.
    """
    if importlib.util.find_spec("datasets") is None:
        return _without_datasets(files, kind, config, setting, named[0])
    from datasets import DatasetDict, load_dataset, load_from_disk

    streamed: dict[str, Any] = {"streaming": True} if config.streaming else {}
    if files:
        more = {"sep": "\t"} if _suffix(files[0]) == ".tsv" else {}
        return load_dataset(kind, data_files=list(files), split="train", **streamed, **more)
    folder = Path(named[0])
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        saved = load_from_disk(str(folder))
        found = _of_split(saved, split, setting, named[0]) if isinstance(saved, DatasetDict) else saved
        return found.to_iterable_dataset() if config.streaming else found
    return load_dataset(named[0], config.subset or None, split=split, **streamed)


def _without_datasets(files: list[str], kind: str, config: DataConfig, setting: str, source: str) -> list[Any]:
    rows = None
    if kind == "json":
        rows = _line_by_line(files, config, setting)
    elif kind == "parquet":
        import pyarrow.parquet as pq

        rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    if rows is None:
        raise UserError(
            f"{setting} {source!r} cannot be read without the package datasets. Fix: pip install datasets, or a file "
            "of JSON lines or Parquet."
        )
    return rows


def _of_split(splits: Mapping[str, Any], split: str, setting: str, source: str) -> Any:
    """The split of a ``DatasetDict``; of one that has no other, that.

    Raises:
        UserError: it has no such split.
    """
    if split in splits or len(splits) == 1:
        return splits[split if split in splits else next(iter(splits))]
    names = ", ".join(map(str, splits))
    raise UserError(
        f"{setting} {source!r} has the splits {names}, not {split!r}. Fix: --data.split {next(iter(splits))}."
    )


def _line_by_line(files: list[str], config: DataConfig, setting: str) -> list[Any] | None:
    """Rows that ``datasets`` cannot put into one table: some are none, or their columns are of several types.

    Raises:
        UserError: one is no row, and ``data.bad_rows`` is error.
    """
    try:
        rows = list(json_lines(files))
    except (OSError, UnicodeDecodeError, EOFError):
        return None
    reasons = {i: row.reason for i, row in enumerate(rows) if isinstance(row, Unreadable)}
    bad = list(reasons)
    if bad and (config.bad_rows == "error" or len(bad) == len(rows)):
        raise UserError(
            f"{setting}: {line_of(files, bad[0])} cannot be read: {reasons[bad[0]]} ({len(bad)} such rows of "
            f"{len(rows)}). Fix: mend it, or --data.bad_rows skip."
        )
    return rows


def _not_read(error: Exception, source: str, config: DataConfig, split: str, setting: str) -> UserError:
    """What to say of it: that a configuration or a split is to be named, where that is the trouble."""
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    fix = ""
    if "onfig name is missing" in str(error) or "BuilderConfig" in str(error):
        fix = " Fix: --data.subset NAME, one of those."
        reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
    elif "plit" in reason and split in reason:
        fix = " Fix: --data.split NAME, one of those (data.heldout_split for data.heldout)."
    return UserError(f"{setting} {source!r} cannot be read: {reason.rstrip('.')}.{fix}")


def _check_columns(names: Sequence[str], config: DataConfig, setting: str, source: str) -> None:
    if not names:
        raise UserError(f"{setting} {source!r} has no rows")
    if Columns(config).missing(names):
        key = "text_column" if config.text_column else "prompt_column"
        raise UserError(
            f"{setting} {source!r} has no column {getattr(config, key)!r} (it has {', '.join(names)}). "
            f"Fix: --data.{key} NAME."
        )


def _shuffled(rows: Iterator[tuple[int, Any]], size: int, draw: random.Random) -> Iterator[tuple[int, Any]]:
    """One of the next ``size`` rows at a time."""
    held = list(islice(rows, size))
    for row in rows:
        place = draw.randrange(len(held)) if held else 0
        if held:
            row, held[place] = held[place], row
        yield row
    draw.shuffle(held)
    yield from held
