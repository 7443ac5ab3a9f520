"""Evidence over HTTP from an engine that costs nothing: how much of it the service and its client move.

    OMP_NUM_THREADS=1 python -m eval.perf.evidence --top-k 64 128

The service is the real one, on a core of its own; its engine takes the rows it answers with from memory. The client is
a ``RemoteTeacher`` in this process, on another core, that scores rollouts of 64 sequences one after another. Rows are
the likeliest K of random logits over V tokens. For each width: positions a second of the rollouts, positions a second
of CPU on both sides, which other work on the machine does not change much, and how late the service's event loop was,
every 5 ms, without the time that other processes had its core.

``--front`` adds what vLLM's output processor and our row making take of the same core, without HTTP: positions a second
from the tensors of vLLM's worker to a score block.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from eval.perf.blocks import random_block
from eval.perf.record import add_results_option, note
from llmdistill.service.engine import Done, GenerateJob, Sample, ScoreJob, Told
from llmdistill.teachers.base import TeacherInfo
from llmdistill.wire.blocks import ScoreBlock

PROMPT, ROWS = 32, 1536  # tokens before what is scored; rows in memory
LAG_EVERY_S = 0.005


class FreeEngine:
    """Implements :class:`~llmdistill.service.engine.Engine` with the same rows for every text."""

    kind, dtype, chosen_ids, partial_weights = "free", "float32", False, False
    transfer, workers = "", 1
    adapters: dict[str, str] = {}
    tokenizer: Any = None
    weights_bytes = 0
    capacity_tokens = None

    def __init__(self, top_k: int, vocab: int) -> None:
        block = random_block(ROWS, top_k, vocab)
        self.rows = (block.token_logprobs, block.topk_ids, block.topk_logprobs)
        self.max_top_k, self.max_model_len = top_k, 1 << 20
        self.info = TeacherInfo("free", "0" * 16, "1" * 16, vocab, (0,), self.max_model_len, None)

    async def start(self) -> None: ...

    async def check(self) -> None: ...

    async def score(self, jobs: Sequence[ScoreJob], done: Done | None = None) -> list[ScoreBlock]:
        blocks = [self._block(job) for job in jobs]
        for i, block in enumerate(blocks if done is not None else []):
            done(i, block)  # type: ignore[misc]
        return blocks

    def _block(self, job: ScoreJob) -> ScoreBlock:
        count, first = job.stop - job.start, job.stop % 1024
        return job.block(self.info, tuple(rows[first : first + count] for rows in self.rows))  # type: ignore[arg-type]

    def head(self) -> None:
        return None

    async def generate(self, job: GenerateJob, told: Told | None = None) -> list[list[Sample]]:
        raise NotImplementedError

    async def close(self) -> None: ...


def elsewhere_s() -> float:
    """Seconds that this thread was ready to run and another process had its core, where the kernel counts them."""
    try:
        with open("/proc/thread-self/schedstat") as file:
            waited = int(file.read().split()[1]) / 1e9
    except OSError:
        return 0.0
    return waited - (time.process_time() - time.thread_time())  # threads of our own may have had it meanwhile


async def serve(options: argparse.Namespace) -> None:
    """Until stdin ends; says its port, then its CPU seconds and how late the loop was since the line before."""
    import uvicorn

    from llmdistill.service.app import Service
    from llmdistill.service.limits import Limits
    from llmdistill.service.routes import create_app

    engine = FreeEngine(options.top_k[0], options.vocab)
    service = Service(engine, Limits(top_k=engine.max_top_k, sequence_tokens=1 << 16))  # type: ignore[arg-type]
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="warning", access_log=False, lifespan="off"))
    late: list[float] = []

    async def measure() -> None:
        while True:
            wanted, others = time.monotonic() + LAG_EVERY_S, elsewhere_s()
            await asyncio.sleep(LAG_EVERY_S)
            others = elsewhere_s() - others
            late.append(max(time.monotonic() - wanted - max(others, 0.0), 0.0))

    async def told() -> None:
        while await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline):
            print(json.dumps({"cpu": time.process_time(), "late": late}), flush=True)
            late.clear()
        server.should_exit = True

    print(json.dumps({"port": listening.getsockname()[1]}), flush=True)
    tasks = [asyncio.create_task(measure()), asyncio.create_task(told())]
    await server.serve(sockets=[listening])
    for task in tasks:
        task.cancel()


def over_http(options: argparse.Namespace, top_k: int, cores: list[int]) -> None:
    """One width."""
    from llmdistill.teachers.remote import RemoteTeacher
    from llmdistill.texts import collate

    role = ["--role", "service", "--top-k", str(top_k), "--vocab", str(options.vocab)]
    os.sched_setaffinity(0, {cores[0]})
    process = subprocess.Popen(
        [sys.executable, "-m", "eval.perf.evidence", *role], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    os.sched_setaffinity(0, {cores[-1]})
    assert process.stdin is not None and process.stdout is not None
    said, told = process.stdout, process.stdin

    def state() -> dict[str, Any]:
        told.write("\n")
        told.flush()
        return json.loads(said.readline())  # type: ignore[no-any-return]

    port = json.loads(said.readline())["port"]
    draw = np.random.default_rng(0)
    lengths = draw.integers(options.completion // 2, options.completion * 3 // 2, options.sequences)
    texts = [draw.integers(0, options.vocab, PROMPT + n).tolist() for n in lengths]
    rollout = collate([t[:PROMPT] for t in texts], [t[PROMPT:] for t in texts], pad_id=0)
    teacher = RemoteTeacher(f"http://127.0.0.1:{port}", lossless=options.lossless)
    seen: dict[str, list[float]] = {"wall": [], "client": [], "service": []}
    late: list[float] = []
    try:
        for _ in range(3):
            teacher.score(rollout, top_k)
        end, before = time.monotonic() + options.seconds, state()
        while time.monotonic() < end:
            began, cpu = time.perf_counter(), time.process_time()
            rows = sum(len(block.token_logprobs) for block in teacher.score(rollout, top_k))
            seen["wall"].append(rows / (time.perf_counter() - began))
            seen["client"].append(rows / (time.process_time() - cpu))
            after = state()
            seen["service"].append(rows / (after["cpu"] - before["cpu"]))
            late, before = late + after["late"], after
    finally:
        teacher.close()
        told.close()
        process.wait(30)
    cell = f"{teacher.dtype} top-{top_k}, {options.sequences} x {options.completion}{options.note}"
    for side, unit in (("wall", "positions/s"), ("client", "positions/CPU s"), ("service", "positions/CPU s")):
        note("evidence", f"http {cell}, {side}", unit, seen[side], options.results)
    lags = (1000 * np.sort(late)).tolist()
    note("evidence", f"http {cell}, loop late", "ms", lags, options.results)
    note("evidence", f"http {cell}, loop late, p99", "ms", [float(np.quantile(lags, 0.99))], options.results)


def front(options: argparse.Namespace, top_k: int) -> None:
    """From the tensors that a worker of vLLM sends to a block, as the service's process does it."""
    from vllm.v1.engine import output_processor
    from vllm.v1.outputs import LogprobsTensors

    from llmdistill.compat.vllm_arrays import keep_arrays
    from llmdistill.models.vllm_requests import scored_rows, scoring_params

    keep_arrays()
    block = random_block(PROMPT + options.completion - 1, top_k, options.vocab)
    ids = torch.cat([block.topk_ids[:, :1], block.topk_ids], 1)
    listed = torch.cat([block.token_logprobs[:, None], block.topk_logprobs], 1)
    at = np.arange(PROMPT, PROMPT + options.completion)
    params = scoring_params(PROMPT + options.completion, at, top_k, options.vocab, None)
    rates = []
    for _ in range(20):
        tensors = LogprobsTensors(ids, listed, torch.ones(len(ids), dtype=torch.int32))
        request: Any = SimpleNamespace(sampling_params=params)
        output: Any = SimpleNamespace(
            new_logprobs=None, prompt_token_id_logprobs=None, new_prompt_logprobs_tensors=tensors
        )
        began = time.process_time()
        processor = output_processor.LogprobsProcessor.from_new_request(None, request)
        processor.update_from_output(output)
        processor.prompt_token_ids = range(PROMPT + options.completion)
        scored_rows(processor, at, top_k, options.vocab, None)
        rates.append(len(at) / (time.process_time() - began))
    note("evidence", f"vllm front top-{top_k}{options.note}", "positions/CPU s", rates, options.results)


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    for top_k in options.top_k:
        if options.front:
            front(options, top_k)
        over_http(options, top_k, cores)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--top-k", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--sequences", type=int, default=64, help="of a rollout")
    parser.add_argument("--completion", type=int, default=256, help="scored tokens of a sequence, on average")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--lossless", action="store_true")
    parser.add_argument("--front", action="store_true", help="vLLM's output processor too")
    parser.add_argument("--note", default="", help="goes into the names of what is measured")
    add_results_option(parser)
    parser.add_argument("--role", choices=["service"], help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.role == "service":
        torch.set_num_threads(1)
        asyncio.run(serve(chosen))
    else:
        main(chosen)
