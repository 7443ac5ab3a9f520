"""Whether this CPU computes in bfloat16: measured, since without the instructions it takes a hundred times longer.

    accelerate launch -m llmdistill.opd --config recipes/quickstart.yaml $(python -m llmdistill.precision)

prints the options that turn the quick start's bfloat16 into float32 where that is faster, and nothing elsewhere.
"""

from __future__ import annotations

import time

import torch

FLOAT32 = "--bf16 false --teacher.dtype float32 --rollouts.dtype float32"
# bfloat16 halves the memory; it may be a little slower and still be right.
WORTHWHILE = 3.0


def bfloat16_costs() -> float:
    """Time of a transformer-sized matrix product in bfloat16 over that in float32, on the CPU."""
    rows, weight = torch.randn(64, 576), torch.randn(576, 1536)
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = rows.to(dtype), weight.to(dtype)
        torch.mm(a, b)  # code is loaded
        start = time.perf_counter()
        for _ in range(3):
            torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return seconds[1] / max(seconds[0], 1e-9)


if __name__ == "__main__":
    print("" if torch.cuda.is_available() or bfloat16_costs() < WORTHWHILE else FLOAT32)
