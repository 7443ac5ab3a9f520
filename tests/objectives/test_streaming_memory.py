"""Peak memory of the streaming engine does not depend on the number of rows; naively it does."""

import subprocess
import sys

import pytest

V, CHUNK = 50_000, 16

PROGRAM = f"""
import resource, sys
import torch
from torch import nn
from llmdistill.objectives.divergences import reverse_kl
from llmdistill.objectives.streaming import streamed

torch.set_num_threads(1)
kind, rows = sys.argv[1], int(sys.argv[2])
head, teacher_head = nn.Linear(4, {V}), nn.Linear(4, {V})

def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

def step(rows):
    hidden, teacher = torch.randn(rows, 4, requires_grad=True), torch.randn(rows, 4)
    if kind == "streamed":
        loss, _ = streamed(reverse_kl, hidden, head, (teacher, teacher_head), chunk_tokens={CHUNK})
    else:
        loss = reverse_kl(head(hidden), teacher_head(teacher)).sum()
    loss.backward()

step(1)  # code is loaded and parameter gradients are in place
before, ballast = peak_mib(), []
while peak_mib() < before + 2:  # an earlier peak (the imports) must not hide the one to be measured
    ballast.append(torch.ones(2**18))
before = peak_mib()
step(rows)
print(peak_mib() - before)
"""


def peak_mib(kind, rows):
    """Growth of the peak resident set in a process of its own."""
    command = [sys.executable, "-c", PROGRAM, kind, str(rows)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)


@pytest.mark.skipif(sys.platform == "win32", reason="no getrusage")
def test_peak_memory_is_independent_of_the_number_of_rows():
    """16 times the rows cost the engine less than half of one [rows, V] tensor, the naive step several."""
    rows = 16 * CHUNK
    tensor_mib = rows * V * 4 / 2**20  # 49
    one_chunk, many_chunks = peak_mib("streamed", CHUNK), peak_mib("streamed", rows)
    naive = peak_mib("naive", rows)
    assert many_chunks - one_chunk < tensor_mib / 2, (one_chunk, many_chunks)
    assert naive > 4 * tensor_mib > many_chunks, (many_chunks, naive)
