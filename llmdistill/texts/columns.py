"""Columns as other libraries call them: what a row has under another name is read as if it were called as usual.

A setting of ``data`` names a column; it may be a path into a struct (``reward_model.ground_truth``). Where the setting
is the default and a row has no such column, the first of these that it has is read, and the preflight says so. Alpaca's
``input`` goes behind its ``instruction``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llmdistill.recipe.data_config import DataConfig

# Setting -> names, in the order they are looked for. TRL, verl, open-r1, slime, ShareGPT, Alpaca, gsm8k, MATH.
ALIASES: dict[str, tuple[str, ...]] = {
    "prompt_column": (
        *("messages", "conversations", "conversation", "question", "problem", "instruction", "query", "input"),
    ),
    "completion_column": ("response", "output"),  # not an answer: that may be the result alone
    "answer_column": ("ground_truth", "solution", "reward_model.ground_truth", "extra_info.answer"),
    "domain_column": ("teacher_id", "data_source"),
}
DEFAULTS = {name: DataConfig.__dataclass_fields__[name].default for name in ALIASES}
SETTINGS = (*ALIASES, "text_column", "weight_column", "tools_column")


class Columns:
    """Rows as the settings of ``data`` name their columns. ``read_as`` is what was read under another name."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.read_as: dict[str, str] = {}  # setting -> column
        self._found: dict[frozenset[str], dict[str, str]] = {}  # by the columns of a row

    def row(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row, with a column more for each that it has under another name; None there where it has not."""
        names = frozenset(row)
        if names not in self._found:
            self._found[names] = self.found(row)
            self.read_as |= self._found[names]
        more = {getattr(self.config, name): _at(row, path) for name, path in self._found[names].items()}
        if self._found[names].get("prompt_column") == "instruction" and row.get("input"):
            more[self.config.prompt_column] = f"{row['instruction']}\n\n{row['input']}"
        return {**row, **more} if more else row

    def found(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Setting -> the column or path that stands for it in such a row, where that is not the one it names."""
        found = {}
        for name in SETTINGS:
            column = getattr(self.config, name)
            if not column or column in row:
                continue
            if _has(row, column):
                found[name] = column
            elif column == DEFAULTS.get(name):
                path = next((path for path in ALIASES[name] if _has(row, path)), None)
                if path is not None:
                    found[name] = path
        return found

    def missing(self, names: Iterable[str]) -> bool:
        """Whether rows with these columns have nothing that could be read as a prompt or a document."""
        row = dict.fromkeys(names)
        setting = "text_column" if self.config.text_column else "prompt_column"
        column = getattr(self.config, setting)
        return column not in row and column.partition(".")[0] not in row and setting not in self.found(row)


def _has(row: Mapping[str, Any], path: str) -> bool:
    root, *rest = path.split(".")
    value = row.get(root)
    for name in rest:
        if not isinstance(value, Mapping) or name not in value:
            return False
        value = value[name]
    return root in row


def _at(row: Mapping[str, Any], path: str) -> Any:
    """The value at a path; None where a struct on the way is null."""
    value: Any = row
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
