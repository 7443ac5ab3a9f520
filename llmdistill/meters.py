"""Running means for the log: every value is a (sum, count) pair, so that ranks and micro-batches add up exactly."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class Meters:
    """Collects sums between two log lines."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, name: str, total: float, count: float = 1.0) -> None:
        """Adds ``total``, the sum of ``count`` observations."""
        pair = self.sums.setdefault(name, [0.0, 0.0])
        pair[0] += float(total)
        pair[1] += float(count)

    def add_all(self, totals: Mapping[str, object], count: float, prefix: str = "") -> None:
        for name, total in totals.items():
            self.add(prefix + name, float(total), count)  # type: ignore[arg-type]

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside; the mean is per entry."""
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)

    def flush(self) -> dict[str, float]:
        """The means since the last flush."""
        means = {name: total / count for name, (total, count) in self.sums.items() if count}
        self.sums.clear()
        return means


def peak_memory_gib() -> float:
    """Peak memory of this process: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
