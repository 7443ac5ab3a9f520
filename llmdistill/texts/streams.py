"""Examples that are encoded as they are needed: for rows without a length, or more than memory holds."""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import IterableDataset

from llmdistill.errors import UserError

logger = logging.getLogger(__name__)
HEAD = 64  # examples that the start-up checks look at


class ExampleStream(IterableDataset[Any]):
    """Encoded rows, epoch after epoch: training ends with ``max_steps``.

    What is iterated is the same every time, from its beginning, so a resumed run skips to where it was. A generator
    (not a function that makes one) can be read once, and ends.

    Args:
        rows: an iterable; one with ``numbered(epoch)`` says which row is which, one with ``set_epoch`` is told.
        encode: the examples of a row with its number; none, where the row is left out.

    Raises:
        UserError: no row can be used.
    """

    def __init__(self, rows: Iterable[Any], encode: Callable[[Any, int], Sequence[Any]]) -> None:
        self.rows, self.encode = rows, encode
        self._again = not isinstance(rows, Iterator)
        self._begun = self._examples()
        self.head: list[Any] = list(itertools.islice(self._begun, HEAD))
        if not self.head:
            raise UserError("there are no rows, or none that can be used. Fix: give at least one.")

    def __iter__(self) -> Iterator[Any]:
        if self._begun is None:
            if not self._again:
                raise UserError(
                    "the training rows are a generator, which can be read once, and it was. Fix: the function that "
                    "makes it, or a datasets.IterableDataset.from_generator."
                )
            return self._examples()
        begun, self._begun = self._begun, None  # type: ignore[assignment]
        return itertools.chain(self.head, begun)

    def _examples(self) -> Iterator[Any]:
        for epoch in itertools.count():
            count = 0
            for index, row in self._numbered(epoch):
                for example in self.encode(row, index):
                    count += 1
                    yield example
            if not count or not self._again:
                if epoch or not self._again:
                    logger.warning("the training rows ended after %d examples", count)
                return

    def _numbered(self, epoch: int) -> Iterator[tuple[int, Any]]:
        if hasattr(self.rows, "numbered"):
            return self.rows.numbered(epoch)  # type: ignore[no-any-return]
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)
        return enumerate(self.rows)


class Called:
    """What a generator function yields, read again as often as it is asked for."""

    def __init__(self, function: Callable[[], Iterable[Any]]) -> None:
        self.function = function

    def __iter__(self) -> Iterator[Any]:
        return iter(self.function())


def at_hand(dataset: Any) -> Sequence[Any]:
    """The examples of a dataset, and of a stream its first."""
    if isinstance(dataset, ExampleStream):
        return dataset.head
    return dataset if isinstance(dataset, Sequence) else list(dataset or [])


def are_examples(dataset: Any, kind: type) -> bool:
    """Whether a caller gave what is encoded already: a list of such examples, or a table of them."""
    if not (isinstance(dataset, list) or hasattr(dataset, "facts")):
        return False
    return len(dataset) > 0 and isinstance(dataset[0], kind)


def rows_of(dataset: Any, split: str) -> Any:
    """What a caller gave as training rows, as something to iterate.

    Args:
        split: of a ``DatasetDict``.

    Raises:
        UserError: it has no such split, or is nothing that holds rows.
    """
    if isinstance(dataset, Mapping):
        if split not in dataset:
            names = ", ".join(map(str, dataset))
            raise UserError(f"train_dataset has the splits {names}, not {split!r}. Fix: one of them, or data.split.")
        return dataset[split]
    if inspect.isfunction(dataset) or inspect.ismethod(dataset):
        return Called(dataset)
    if isinstance(dataset, str | bytes) or not (hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")):
        raise UserError(
            f"train_dataset is {str(dataset)[:80]!r}, a {type(dataset).__name__}; it must be rows: a datasets.Dataset "
            "(iterable or not), a list, or a generator function. Fix: datasets.load_dataset(...)."
        )
    if hasattr(dataset, "__len__") and not hasattr(dataset, "__iter__"):  # torch's map style
        return [dataset[i] for i in range(len(dataset))]
    return dataset


def has_length(rows: Any) -> bool:
    """Whether it is known how many rows there are; those of a stream are not counted."""
    try:
        return len(rows) >= 0
    except TypeError:
        return False


class HeldOutSets(list[Any]):
    """Examples of several evaluation sets, one set after the other. ``sizes`` says how many each has."""

    def __init__(self, sets: Mapping[str, Sequence[Any]]) -> None:
        super().__init__(example for examples in sets.values() for example in examples)
        self.sizes = {name: len(examples) for name, examples in sets.items()}

    def spans(self) -> dict[str, slice]:
        """Where each set is."""
        ends = list(itertools.accumulate(self.sizes.values()))
        return {name: slice(end - size, end) for (name, size), end in zip(self.sizes.items(), ends, strict=True)}


def spans_of(examples: Sequence[Any]) -> dict[str, slice]:
    """Where each of several evaluation sets is; none of one set."""
    return examples.spans() if isinstance(examples, HeldOutSets) else {}


def to_measure(examples: Sequence[Any], most: int) -> Sequence[Any]:
    """Of an evaluation set its first ``most``; several sets have no more in the first place."""
    return examples if isinstance(examples, HeldOutSets) else examples[:most]
