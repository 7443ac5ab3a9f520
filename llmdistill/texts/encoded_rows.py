"""All rows of a dataset encoded: of a ``datasets.Dataset`` by its ``map``, so once per node, and kept in its cache.

The cache's name is made of all that the result depends on: the rows, the tokenizer, its template, the settings, and the
code that reads them. It stands beside the dataset's own files. Lists of rows are encoded at every start: short ones
into Python objects, longer ones into Arrow in memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import tokenizers
import transformers

from llmdistill.ranks import on_every_rank
from llmdistill.texts import findings
from llmdistill.texts.findings import Findings, RowEncoder

if TYPE_CHECKING:
    from llmdistill.texts.columnar import PromptColumns

logger = logging.getLogger(__name__)

SHORT = 2000  # rows of a list that are kept as Python objects
PART = 1000  # rows that are encoded at one time
OBJECTS = 64  # examples that are Python objects at one time
WITH_BAR = 10_000  # rows whose encoding takes long enough to be watched
# Settings of data that say where rows come from, and not what is made of them.
SOURCES = {"train", "heldout", "subset", "split", "heldout_split", "streaming", "shuffle_buffer", "limit"}


class Encoder(RowEncoder, Protocol):
    """What of a :class:`~llmdistill.texts.prompts.PromptEncoder` the encoded rows depend on."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def config(self) -> Any: ...

    @property
    def template(self) -> Any: ...


# The examples of a row with its number; what is left out of pairs goes into the third.
OfRow = Callable[[Any, int, dict[str, list[int]]], Sequence[Any]]


def encode_rows(
    rows: Any, encoder: Encoder, of_row: OfRow, columns: Callable[[Any], PromptColumns], asked: Mapping[str, Any]
) -> tuple[Sequence[Any], dict[str, list[int]], int]:
    """The examples of all rows; by reason the numbers of rows left out of pairs; and how many rows there are.

    Every rank calls it; the first of each node encodes what the others then read.

    Args:
        columns: how the examples stand in Arrow; called with what gives a row by its number.
        asked: what, beside the encoder's settings, the result depends on.

    Raises:
        UserError: a row cannot be read, and the settings do not leave it out.
    """
    dataset = _dataset_of(rows)
    if dataset is None:
        return _of_list(rows, of_row, columns)
    if not len(dataset):
        return [], {}, 0
    from llmdistill.texts.encoded import Encoded, findings_of

    layout = columns(dataset)
    part = _Part(encoder, layout, of_row)
    name = _fingerprint(dataset, encoder, asked)
    kept = bool(name and dataset.cache_files)
    is_first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    made = on_every_rank(lambda: _mapped(dataset, part, name) if is_first or not kept else None)
    made = on_every_rank(lambda: _mapped(dataset, part, name) if made is None else made)
    skipped: dict[str, list[int]] = {}
    for found in findings_of(made):
        _add(encoder, skipped, found)
    return Encoded(made, layout), skipped, len(dataset)


def _of_list(
    rows: Any, of_row: OfRow, columns: Callable[[Any], PromptColumns]
) -> tuple[Sequence[Any], dict[str, list[int]], int]:
    """Of rows that are no table: a list, or whatever else can be iterated."""
    examples, skipped, count = list[Any](), dict[str, list[int]](), 0
    tables: list[Any] | None = None
    layout: Any = None
    if hasattr(rows, "__len__") and len(rows) > SHORT and importlib.util.find_spec("datasets"):
        tables, layout = [], columns(rows)
    for index, row in enumerate(rows):
        count += 1
        examples += of_row(row, index, skipped)
        if tables is not None and len(examples) >= OBJECTS:
            tables.append(layout.table(examples))
            examples = []
    if tables is None:
        return examples, skipped, count
    from datasets import Dataset
    from pyarrow import concat_tables

    from llmdistill.texts.encoded import Encoded

    whole = concat_tables([*tables, layout.table(examples)]).combine_chunks()
    return Encoded(Dataset(whole), layout), skipped, count


class _Part:
    """Encodes a part of a table: what ``datasets.map`` calls, perhaps in another process."""

    def __init__(self, encoder: Encoder, columns: PromptColumns, of_row: OfRow) -> None:
        self.encoder, self.columns, self.of_row = encoder, columns, of_row

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> Any:
        import pyarrow as pa

        before, tables, examples = findings.taken(self.encoder), list[Any](), list[Any]()
        skipped: dict[str, list[int]] = {}
        of_columns = {name: batch[name] for name in batch}
        try:
            for place, index in enumerate(indices):
                row = {name: values[place] for name, values in of_columns.items()}
                examples += self.of_row(row, index, skipped)
                if len(examples) >= OBJECTS:
                    tables.append(self.columns.table(examples))
                    examples = []
        finally:
            found = findings.taken(self.encoder)
            findings.add(self.encoder, before)
        if examples or tables:
            table = pa.concat_tables([*tables, self.columns.table(examples)]).combine_chunks()
        else:
            table = self.columns.nothing()
        found.skipped = skipped
        return self.columns.with_found(table, found)


def _mapped(dataset: Any, part: _Part, name: str | None) -> Any:
    """The dataset of examples, from its cache where there is one."""
    import pyarrow as pa
    from datasets import Features

    how: dict[str, Any] = {"batched": True, "batch_size": PART, "with_indices": True, "desc": "encoding rows"}
    how |= {"features": Features.from_arrow_schema(part.columns.schema), "remove_columns": dataset.column_names}
    if name is None:
        how |= {"keep_in_memory": True, "load_from_cache_file": False, "new_fingerprint": "unnamed"}
    else:
        how["new_fingerprint"] = name
    with _bar(len(dataset) >= WITH_BAR):
        try:
            return dataset.map(part, **how)
        except pa.ArrowInvalid:  # the file is damaged
            return dataset.map(part, **{**how, "load_from_cache_file": False})
        except OSError as error:
            folder = Path(dataset.cache_files[0]["filename"]).parent if dataset.cache_files else "?"
            why = error.strerror or error
            logger.warning("%s cannot be written (%s): rows are encoded anew at every start, in memory", folder, why)
            return dataset.map(part, **{**how, "load_from_cache_file": False, "keep_in_memory": True})


@contextmanager
def _bar(shown: bool) -> Iterator[None]:
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = not shown and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


def _dataset_of(rows: Any) -> Any:
    """The ``datasets.Dataset`` that rows are, or are read from."""
    datasets = sys.modules.get("datasets")
    found = getattr(rows, "rows", rows)
    return found if datasets is not None and isinstance(found, datasets.Dataset) else None


def _add(encoder: Encoder, skipped: dict[str, list[int]], found: Findings) -> None:
    findings.add(encoder, found)
    for reason, rows in found.skipped.items():
        skipped.setdefault(reason, []).extend(rows)


# ---------------------------------------------------------------- what the result depends on


def _fingerprint(dataset: Any, encoder: Encoder, asked: Mapping[str, Any]) -> str | None:
    """32 hex digits over all that the examples depend on; None where that cannot be said."""
    said = _described(encoder)
    if said is None:
        return None
    content = json.dumps([dataset._fingerprint, said, dict(asked), _code()], sort_keys=True, default=str)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _described(encoder: Encoder) -> dict[str, Any] | None:
    tokenizer = encoder.tokenizer
    settings = {k: v for k, v in dataclasses.asdict(encoder.config).items() if k not in SOURCES}
    said: dict[str, Any] = {"settings": settings, "template": tokenizer.chat_template}
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "to_str"):  # one in Python: its splitting is code, which has no name
        return None
    whole = json.loads(backend.to_str())
    said["tokenizer"] = {k: v for k, v in whole.items() if k not in ("truncation", "padding")}  # set by every call
    said["special"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    if "strftime_now" in encoder.template.source:  # it writes the date
        said["day"] = time.strftime("%Y-%m-%d")
    said["readers"] = {name: _described(reader) for name, reader in encoder.readers.items()}
    return None if None in said["readers"].values() else said


def _code() -> list[str]:
    """Versions of what reads rows: a hash of our own files, and the libraries'."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return [digest.hexdigest(), transformers.__version__, tokenizers.__version__]
