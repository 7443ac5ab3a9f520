"""Encoded pairs as Arrow columns: those of their prompts, and both sides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from llmdistill.texts.columnar import COUNTS, IDS, PromptColumns
from llmdistill.texts.pair import SIDES, Pair, whole


class PairColumns(PromptColumns):
    """How a :class:`Pair` stands in columns."""

    @property
    def schema(self) -> pa.Schema:
        sides = [pa.field(name, COUNTS if name.endswith("counts") else IDS) for name in SIDES]
        numbers = [pa.field(name, pa.int64()) for name in ("cut", "whole", "chosen_last")]
        return pa.schema([*super().schema, *sides, *numbers])

    def row(self, pair: Any) -> dict[str, Any]:
        sides = {name: getattr(pair, name) for name in SIDES}
        numbers = {"cut": pair.cut, "whole": whole(pair), "chosen_last": pair.chosen[-1]}
        return {**super().row(pair.prompt), **sides, **numbers}

    def example(self, row: Mapping[str, Any]) -> Pair:
        chosen, rejected, *counts = (tuple(row[name]) for name in SIDES)
        return Pair(self.prompt(row), chosen, rejected, row["cut"], *counts)
