"""Rows that wait on the host until the micro-batch that reads them is trained on: a round of them fits no GPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor


class HostRows:
    """[N, ...] rows of a round, written pass by pass to where they belong: nothing is there twice.

    In pinned memory where they come from a GPU, so that both copies go on beside what it computes.

    Args:
        counts: rows of every sequence.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self._starts = [0, *accumulate(counts)]
        self._rows: Tensor | None = None
        self._filled = self._written = 0
        self._source = torch.device("cpu")

    def put(self, sequences: Iterable[int], rows_nX: Tensor) -> None:
        """The rows of these sequences, one after the other."""
        first = 0
        for i in sequences:
            start, stop = self._starts[i : i + 2]
            self._write(start, rows_nX[first : first + stop - start])
            first += stop - start

    def append(self, rows_nX: Tensor) -> None:
        """The rows of the next sequences. Of a pass behind all others, which only keeps ranks in step, there are none
        left to write."""
        self._write(self._filled, rows_nX[: self._starts[-1] - self._filled])
        self._filled = min(self._filled + len(rows_nX), self._starts[-1])

    def _write(self, start: int, rows_nX: Tensor) -> None:
        if self._rows is None:
            self._source = rows_nX.device
            self._rows = host_empty((self._starts[-1], *rows_nX.shape[1:]), rows_nX.dtype, rows_nX.device)
        self._rows[start : start + len(rows_nX)].copy_(rows_nX, non_blocking=True)
        self._written += len(rows_nX)

    def tensor(self, empty: Tensor) -> Tensor:
        """All rows; ``empty``, [0, ...], where there was no pass."""
        assert self._written == self._starts[-1] or self._rows is None, "some rows were never written"
        if self._source.type == "cuda":  # the copies have arrived
            torch.cuda.current_stream(self._source).synchronize()
        return empty.cpu() if self._rows is None else self._rows


def host_empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Memory of the host for what goes to or comes from ``device``: pinned, where that is a GPU and there is enough."""
    if torch.device(device).type == "cuda":
        try:
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
        except RuntimeError:  # the system allows no more of it; copies then wait for each other
            pass
    return torch.empty(tuple(shape), dtype=dtype)


def joined(pieces: list[Tensor], device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """The pieces one after the other on the host, for ``device`` to read. Each is let go when it has been copied.

    Args:
        pieces: [n, ...] each; the list is empty afterwards.
    """
    first = pieces[0]
    rows = host_empty((sum(map(len, pieces)), *first.shape[1:]), dtype or first.dtype, device)
    start = len(rows)
    del first
    while pieces:
        piece = pieces.pop()
        start -= len(piece)
        rows[start : start + len(piece)] = piece
    return rows
