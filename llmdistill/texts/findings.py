"""What was found while rows were encoded, apart from the examples: told once, and kept beside them in their cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol


class RowEncoder(Protocol):
    """What of a :class:`~llmdistill.texts.prompts.PromptEncoder` its findings are in, beside the fields of those."""

    @property
    def columns(self) -> Any: ...

    @property
    def readers(self) -> Mapping[str, Any]: ...

    @property
    def notes(self) -> dict[str, set[int]]: ...


@dataclass
class Findings:
    """Of some rows, what a :class:`~llmdistill.texts.prompts.PromptEncoder` counts and notes of all it has read."""

    dropped: int = 0
    truncated: set[int] = field(default_factory=set)
    cut: int = 0
    bad: dict[int, str] = field(default_factory=dict)
    notes: dict[str, set[int]] = field(default_factory=dict)
    ends: set[int] = field(default_factory=set)
    chats: int = 0
    read_as: dict[str, str] = field(default_factory=dict)
    readers: dict[str, Findings] = field(default_factory=dict)  # of judges' readings, by name
    skipped: dict[str, list[int]] = field(default_factory=dict)  # pairs that cannot be trained on, by reason

    def json(self) -> str:
        return json.dumps(asdict(self), default=sorted)

    @classmethod
    def of(cls, said: dict[str, Any]) -> Findings:
        """Of what :meth:`json` wrote, read again."""
        numbered = {"bad": {int(row): why for row, why in said["bad"].items()}}
        sets = {name: set(said[name]) for name in ("truncated", "ends")}
        notes = {message: set(rows) for message, rows in said["notes"].items()}
        readers = {name: cls.of(of_reader) for name, of_reader in said["readers"].items()}
        return cls(**{**said, **numbered, **sets, "notes": notes, "readers": readers})


OF_ENCODER = tuple(f.name for f in fields(Findings) if f.name not in ("read_as", "readers", "skipped"))


def taken(encoder: RowEncoder) -> Findings:
    """What an encoder has found so far, which it then forgets, but for the names that it reads columns under."""
    found = Findings(
        read_as=dict(encoder.columns.read_as),
        readers={name: taken(reader) for name, reader in encoder.readers.items()},
        **{name: getattr(encoder, name) for name in OF_ENCODER},
    )
    for name in OF_ENCODER:
        setattr(encoder, name, getattr(Findings(), name))
    return found


def add(encoder: RowEncoder, found: Findings) -> None:
    """As if the encoder had read those rows."""
    for name in OF_ENCODER:
        value = getattr(found, name)
        if isinstance(value, int):
            setattr(encoder, name, getattr(encoder, name) + value)
        elif name != "notes":
            getattr(encoder, name).update(value)
    for message, rows in found.notes.items():
        encoder.notes.setdefault(message, set()).update(rows)
    encoder.columns.read_as.update(found.read_as)
    for name, of_reader in found.readers.items():
        add(encoder.readers[name], of_reader)
