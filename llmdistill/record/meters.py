"""Running means for the log: every value is a (sum, count) pair, so that ranks and micro-batches add up exactly."""

from __future__ import annotations

import math
import resource
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object

ROOT = "root of "  # before the names of sums of squares


class Meters:
    """Collects sums between two log lines. Threads may share it."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}
        self._lock = threading.Lock()

    def add(self, name: str, total: float, count: float = 1.0) -> None:
        """Adds ``total``, the sum of ``count`` observations."""
        with self._lock:
            pair = self.sums.setdefault(name, [0.0, 0.0])
            pair[0] += float(total)
            pair[1] += float(count)

    def add_all(self, totals: Mapping[str, object], count: float, prefix: str = "") -> None:
        for name, total in totals.items():
            self.add(prefix + name, float(total), count)  # type: ignore[arg-type]

    def add_root(self, name: str, square: float) -> None:
        """Adds to a sum of squares over processes and micro-batches, whose root is shown."""
        self.add(ROOT + name, square, 0.0)

    @contextmanager
    def timed(self, name: str, count: float = 1.0) -> Iterator[None]:
        """Adds the seconds spent inside, as ``count`` observations: 1/4 for one of four parts of a step."""
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start, count)

    def flush(self, accelerator: Any = None) -> dict[str, float]:
        """The means since the last flush; over all processes, which flush together, where an accelerator is given."""
        with self._lock:
            parts, self.sums = [self.sums], {}
        if accelerator is not None and accelerator.num_processes > 1:
            parts = gather_object(parts)
        pairs: dict[str, list[float]] = {}
        for part in parts:
            for name, (total, count) in part.items():
                pair = pairs.setdefault(name, [0.0, 0.0])
                pair[0] += total
                pair[1] += count
        roots = {name.removeprefix(ROOT): math.sqrt(pairs[name][0]) for name in pairs if name.startswith(ROOT)}
        return {name: total / count for name, (total, count) in pairs.items() if count} | roots


def peak_memory_gib() -> float:
    """Peak memory of this process: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
