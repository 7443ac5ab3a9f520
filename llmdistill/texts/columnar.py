"""Encoded prompts as Arrow columns: 4 bytes a token, on disk, mapped rather than read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from llmdistill.texts.facts import counts_some, digest, doubled
from llmdistill.texts.findings import Findings
from llmdistill.texts.rollout import Prompt, Reading

IDS = pa.list_(pa.int32())
COUNTS = pa.list_(pa.bool_())
FOUND = "found"  # column: what was found in the rows of a part, in its first row
Records = Callable[[int], Mapping[str, Any]]  # the row of a dataset with this number


class PromptColumns:
    """How a :class:`Prompt` stands in columns.

    Args:
        contexts: names of other contexts that rows may have.
        judges: names of judges of other tokenizers, who read each prompt in their own.
        records: of prompts that keep their row: where it is read from.
    """

    def __init__(self, contexts: Sequence[str], judges: Sequence[str], records: Records | None = None) -> None:
        self.contexts, self.judges, self.records = tuple(contexts), tuple(judges), records

    @property
    def schema(self) -> pa.Schema:
        number = pa.int64()
        prompt: dict[str, Any] = {"ids": IDS, "text": pa.string(), "domain": pa.string(), "row": number}
        prompt |= {"completion": IDS, "counts": COUNTS, "answer": pa.string()}
        prompt |= {"weight": pa.float64(), "weights": pa.list_(pa.float64())}
        prompt |= {f"context.{name}": IDS for name in self.contexts}
        for name in self.judges:
            prompt |= {f"reading.{name}.text": pa.string(), f"reading.{name}.ids": IDS}
            prompt |= {f"reading.{name}.chat": pa.bool_()}
        facts = {"digest": number, "doubled": number, "last": number, "widest": number, "positive": pa.bool_()}
        return pa.schema({**prompt, **facts, FOUND: pa.string()})

    def table(self, examples: Sequence[Any]) -> pa.Table:
        """The examples, with what checks of all of them read (``facts``) in place of the ids."""
        rows = [self.row(example) for example in examples]
        return pa.Table.from_pylist(rows, schema=self.schema)

    def nothing(self) -> pa.Table:
        """A part of the rows of which none is left: a row that holds no example."""
        return pa.Table.from_pylist([{}], schema=self.schema)

    def with_found(self, table: pa.Table, found: Findings) -> pa.Table:
        """The table of a part of the rows, with what was found in them."""
        said = pa.array([found.json(), *[None] * (len(table) - 1)], pa.string())
        return table.set_column(table.schema.get_field_index(FOUND), FOUND, said)

    def row(self, p: Prompt) -> dict[str, Any]:
        weights = p.weight if isinstance(p.weight, tuple) else None
        found: dict[str, Any] = {"ids": p.ids, "text": p.text, "domain": p.domain, "row": p.row, "answer": p.answer}
        found |= {"completion": p.completion, "counts": p.counts}
        found |= {"weight": None if weights is not None else p.weight, "weights": weights}
        found |= {f"context.{name}": ids for name, ids in p.contexts.items()}
        for name, reading in p.readings.items():
            found |= {f"reading.{name}.{key}": getattr(reading, key) for key in ("text", "ids", "chat")}
        last = p.completion[-1] if p.completion else -1
        found |= {"digest": digest(p.ids), "doubled": doubled(p.ids), "last": last}
        return found | {"widest": max(map(len, p.contexts.values()), default=0), "positive": counts_some(p.weight)}

    def example(self, row: Mapping[str, Any]) -> Any:
        """What :meth:`row` was made of."""
        return self.prompt(row)

    def prompt(self, row: Mapping[str, Any]) -> Prompt:
        contexts = {name: row[f"context.{name}"] for name in self.contexts}
        readings = {name: [row[f"reading.{name}.{key}"] for key in ("text", "ids", "chat")] for name in self.judges}
        return Prompt(
            row["ids"],
            row["text"],
            row["domain"],
            row["row"],
            tuple(row["completion"]),
            row["answer"],
            row["weight"] if row["weights"] is None else tuple(row["weights"]),
            {name: tuple(ids) for name, ids in contexts.items() if ids is not None},
            tuple(row["counts"]),
            None if self.records is None else dict(self.records(row["row"])),
            {name: Reading(text, tuple(ids), chat) for name, (text, ids, chat) in readings.items() if ids is not None},
        )
