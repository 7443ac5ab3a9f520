"""What several processes in front of one engine cost (``llmdistill serve --api_processes``), on machines of few cores.

    OMP_NUM_THREADS=1 python -m eval.perf.processes --count 1 2

The service is the real one but for its engine, which costs nothing (``FreeEngine`` of eval/perf/evidence.py, one in
every process); the client is a ``RemoteTeacher`` in this process. For each count: positions in a second of CPU of all
the service's processes, the part of it that the one in front takes, and the smallest part of the others' work that one
of them did. What is won on the clock takes more cores than processes, and one more for the client.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
import time

import numpy as np

from eval.perf.evidence import PROMPT, FreeEngine
from eval.perf.record import add_results_option, note

VOCAB, TOP_K = 151936, 64


def free_member(config: object, token: str | None, seat: object, line: socket.socket, handed: socket.socket) -> None:
    """One of the processes."""
    import torch

    from llmdistill.service import member

    torch.set_num_threads(1)
    member.load = lambda config, seat: FreeEngine(TOP_K, VOCAB)  # type: ignore[assignment,return-value]
    member.run(config, token, seat, line, handed)  # type: ignore[arg-type]


def serve(count: int) -> int:
    from eval.perf import processes as ours  # by the name under which the others find it
    from llmdistill.service import processes
    from llmdistill.service.serve import parsed
    from tests.service.members import OneEach

    processes.member.run = ours.free_member  # type: ignore[assignment]
    words = ["--model", "free", "--port", "0", "--top_k", str(TOP_K), "--max_model_len", "65536"]
    return processes.run(parsed([*words, "--api_processes", str(count)]), None, OneEach)


def cpu_s(pid: int) -> float:
    """That a process has had."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(count: int, seconds: float, results: str) -> None:
    from llmdistill.teachers.remote import RemoteTeacher
    from llmdistill.texts import collate

    command = [sys.executable, "-m", "eval.perf.processes", "--role", "service", "--count", str(count)]
    front = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert front.stdout is not None
    port = next(found[1] for line in front.stdout if (found := re.search(r":(\d+)$", line.strip())))
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(front.pid)], capture_output=True, text=True).stdout
    pids = [front.pid, *map(int, listed.split())]
    draw = np.random.default_rng(0)
    texts = [draw.integers(0, VOCAB, PROMPT + n).tolist() for n in draw.integers(128, 384, 64)]
    rollout = collate([t[:PROMPT] for t in texts], [t[PROMPT:] for t in texts], pad_id=0)
    teacher = RemoteTeacher(f"http://127.0.0.1:{port}")
    try:
        for _ in range(3):
            teacher.score(rollout, TOP_K)
        before, end, rows = [cpu_s(pid) for pid in pids], time.monotonic() + seconds, 0
        while time.monotonic() < end:
            rows += sum(len(block.token_logprobs) for block in teacher.score(rollout, TOP_K))
        used = [cpu_s(pid) - s for pid, s in zip(pids, before, strict=True)]
    finally:
        teacher.close()
        front.terminate()
        front.wait(60)
    name, work = f"{count} processes, top-{TOP_K}", sorted(used[1:])[-count:]
    note("processes", f"{name}, all of them", "positions/CPU s", [rows / sum(used)], results)
    note("processes", f"{name}, the one in front", "% of CPU", [100 * used[0] / sum(used)], results)
    note("processes", f"{name}, least of the others", "% of their CPU", [100 * work[0] / sum(work)], results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=15.0)
    add_results_option(parser)
    parser.add_argument("--role", choices=["service"], help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.role == "service":
        raise SystemExit(serve(chosen.count[0]))
    for count in chosen.count:
        measure(count, chosen.seconds, chosen.results)
