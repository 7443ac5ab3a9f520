"""How many OpenMP threads to use on a CPU: measured, because the right number depends on who else is computing.

    OMP_NUM_THREADS=$(python -m llmdistill.threads) accelerate launch ...

Idle, two threads on two cores gain 1.6-1.8x; while anything else runs they are 4-6x slower than one. ``accelerate
launch`` sets one thread unless told, so the quick start asks here first.
"""

from __future__ import annotations

import os
import statistics
import time

import torch

ROUNDS = 7
# Threads that gain less than this would lose more as soon as somebody else wakes up.
WORTHWHILE = 0.8


def best_thread_count() -> int:
    """All cores or one, whichever runs a transformer-sized matrix product clearly faster right now."""
    cores, before = len(os.sched_getaffinity(0)), torch.get_num_threads()
    if cores == 1:
        return 1
    rows, weight = torch.randn(640, 576), torch.randn(576, 3072)
    seconds: dict[int, list[float]] = {1: [], cores: []}
    for _ in range(ROUNDS):
        for threads, runs in seconds.items():
            torch.set_num_threads(threads)
            torch.mm(rows, weight)  # the pool wakes up
            start = time.perf_counter()
            for _ in range(5):
                torch.mm(rows, weight).softmax(-1)
            runs.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return cores if statistics.median(seconds[cores]) < WORTHWHILE * statistics.median(seconds[1]) else 1


if __name__ == "__main__":
    print(best_thread_count())
