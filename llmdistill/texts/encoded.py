"""Encoded examples that stay in Arrow: each becomes a :class:`Prompt` or a :class:`Pair` when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmdistill.texts.columnar import FOUND, PromptColumns
from llmdistill.texts.facts import Facts, Numbers
from llmdistill.texts.findings import Findings

READ_AT_ONCE = 256  # examples, where all are read one after the other


class Encoded(Sequence[Any]):
    """The examples of a table.

    Args:
        data: a ``datasets.Dataset`` of such columns. Rows without ids hold no example.
        columns: what they mean.
    """

    def __init__(self, data: Any, columns: PromptColumns) -> None:
        self.data, self.columns = data, columns
        if data.data.column("ids").null_count:
            self.data = data.select(np.flatnonzero(self.numbers("ids", pc.is_valid)))

    def __len__(self) -> int:
        return len(self.data)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.__getitems__(range(len(self))[index])
        return self.columns.example(self.data[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Several at once, as torch's loader asks."""
        if not len(indices):
            return []
        found = self.data[indices if isinstance(indices, range) else list(indices)]
        rows = zip(*(found[name] for name in found), strict=True)
        return [self.columns.example(dict(zip(found, row, strict=True))) for row in rows]

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), READ_AT_ONCE):
            yield from self[start : start + READ_AT_ONCE]

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of the examples."""
        if self.data._indices is None:
            return self.data.data.column(name)
        return self.data.select_columns([name]).with_format("arrow")[:][name]

    def numbers(self, name: str, of: Any = None) -> Any:
        """One column, or of each of its values what a function of ``pyarrow.compute`` says, as numpy has it."""
        column = self.column(name)
        return (column if of is None else of(column)).to_numpy()

    def lengths(self, name: str) -> Numbers:
        """How many ids a column has of every example."""
        return self.numbers(name, pc.list_value_length).astype(np.int64)  # type: ignore[no-any-return]

    @property
    def facts(self) -> Facts:
        """See :mod:`~llmdistill.texts.facts`. 100 bytes an example, which are not kept: they are soon read again."""
        coded = pc.dictionary_encode(self.column("domain"), null_encoding="encode").combine_chunks()
        coded = coded.chunk(0) if isinstance(coded, pa.ChunkedArray) else coded
        kinds = {"rows": "row", "widest": "widest", "digests": "digest", "last": "last", "doubled": "doubled"}
        return Facts(
            tokens=self.lengths("ids"),
            completions=self.lengths("completion"),
            answered=self.numbers("answer", pc.binary_length) > 0,
            token_weighted=self.numbers("weights", pc.is_valid),
            positive=self.numbers("positive"),
            domains=coded.indices.to_numpy().astype(np.int64),
            names=tuple(coded.dictionary.to_pylist()),
            contexts={name: self.numbers(f"context.{name}", pc.is_valid) for name in self.columns.contexts},
            **{fact: self.numbers(name).astype(np.int64) for fact, name in kinds.items()},
        )

    def rows_with(self, token: int) -> list[int]:
        """The rows that have a token in prompt or completion."""
        found = list[int]()
        for batch in self.data.with_format("arrow").iter(READ_AT_ONCE):
            marked = np.zeros(len(batch), dtype=bool)
            for name in ("ids", "completion"):
                lists = batch[name].combine_chunks()
                at = pc.list_parent_indices(lists).to_numpy()[lists.flatten().to_numpy() == token]
                marked[at] = True
            found += batch["row"].to_numpy()[marked].tolist()
        return found


def findings_of(data: Any) -> Iterator[Findings]:
    """What was found in the rows of a table, part by part."""
    for chunk in data.data.column(FOUND).chunks:
        for said in chunk.drop_null().to_pylist():
            yield Findings.of(json.loads(said))
