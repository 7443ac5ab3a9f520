"""What checks of all prompts look at, as arrays of numbers: a million of them in milliseconds, without their ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmdistill.texts.rollout import Prompt

Numbers = NDArray[np.int64]
Marks = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Facts:
    """Of P prompts, in their order: an array [P] each, and of other contexts one by name."""

    rows: Numbers  # in the dataset they were read from
    tokens: Numbers
    completions: Numbers  # tokens of the row's own
    widest: Numbers  # tokens of the longest other context
    digests: Numbers  # of the ids
    last: Numbers  # id of the completion; -1: none
    doubled: Numbers  # id that the prompt begins with twice; -1: none
    answered: Marks  # the right answer is known
    token_weighted: Marks  # a weight for each token of the completion
    positive: Marks  # some weight is above 0
    domains: Numbers  # which of ``names``
    names: tuple[str | None, ...]
    contexts: dict[str, Marks]

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, kept: Marks) -> Facts:
        """Of some of the prompts."""
        arrays = {f.name: getattr(self, f.name)[kept] for f in fields(self) if f.name not in ("names", "contexts")}
        return replace(self, **arrays, contexts={name: marks[kept] for name, marks in self.contexts.items()})

    def of_domains(self, wanted: Callable[[str | None], bool]) -> Marks:
        """Which prompts are of a domain that is wanted."""
        return np.array([wanted(name) for name in self.names] or [False], dtype=bool)[self.domains]

    def has(self, context: str) -> Marks:
        """Which prompts have that other context."""
        return self.contexts.get(context, np.zeros(len(self), dtype=bool))


def facts_of(examples: Any) -> Facts:
    """Of prompts: a list of them, or an :class:`~llmdistill.texts.encoded.Encoded`, which has noted them."""
    if hasattr(examples, "facts"):
        return examples.facts  # type: ignore[no-any-return]
    prompts: Sequence[Prompt] = [p for p in examples or () if isinstance(p, Prompt)]
    names = list(dict.fromkeys(p.domain for p in prompts))
    number = {name: i for i, name in enumerate(names)}

    def numbers(of: Callable[[Prompt], int]) -> Numbers:
        return np.array([of(p) for p in prompts], dtype=np.int64)

    def marks(of: Callable[[Prompt], bool]) -> Marks:
        return np.array([of(p) for p in prompts], dtype=bool)

    return Facts(
        rows=numbers(lambda p: p.row),
        tokens=numbers(lambda p: len(p.ids)),
        completions=numbers(lambda p: len(p.completion)),
        widest=numbers(lambda p: max(map(len, p.contexts.values()), default=0)),
        digests=numbers(lambda p: digest(p.ids)),
        last=numbers(lambda p: p.completion[-1] if p.completion else -1),
        doubled=numbers(lambda p: doubled(p.ids)),
        answered=marks(lambda p: bool(p.answer)),
        token_weighted=marks(lambda p: isinstance(p.weight, tuple)),
        positive=marks(lambda p: counts_some(p.weight)),
        domains=numbers(lambda p: number[p.domain]),
        names=tuple(names),
        contexts={
            name: np.array([name in p.contexts for p in prompts], dtype=bool)
            for name in dict.fromkeys(name for p in prompts for name in p.contexts)
        },
    )


def digest(ids: Sequence[int]) -> int:
    """63 bits that tell one list of ids from another."""
    raw = hashlib.blake2b(np.asarray(ids, dtype=np.int32).tobytes(), digest_size=8).digest()
    return int.from_bytes(raw, "big") >> 1


def doubled(ids: Sequence[int]) -> int:
    """The id that a prompt begins with twice; -1: none."""
    return ids[0] if len(ids) > 1 and ids[0] == ids[1] else -1


def counts_some(weight: float | tuple[float, ...]) -> bool:
    """Whether a row of that weight, or some token of it, counts."""
    return any(w > 0 for w in weight) if isinstance(weight, tuple) else weight > 0
