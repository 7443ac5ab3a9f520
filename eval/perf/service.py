"""The service under load, next to the bare engine in the same run.

    OMP_NUM_THREADS=1 python eval/perf/service.py --model data/quickstart/student --clients 64 --minutes 3

Two processes hold the same model in the same vLLM engine: ``bare`` calls it directly, nothing in between and the
numbers thrown away; ``service`` is `llmdistill serve`, asked over HTTP by as many concurrent clients, which decode the
score blocks they get. Both score the same sequences with as many in flight, in alternating windows, so that what else
the machine does hits both. In one more window of the service a probe asks for /health every 50 ms, and one caller posts
the largest body that is legal, which is refused in the end. Prints JSON: scored positions a second of each window and
the ratio of each pair, latencies, statuses, bytes a position, how late the service's event loop was (its own word, and
what the probe had to wait), and the resident memory of the service after every window.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]


def sequences(options: argparse.Namespace, seed: int) -> list[list[int]]:
    """Seeded ids; lengths spread around the mean, as completions are."""
    draw = random.Random(seed)
    made = []
    for _ in range(512):
        length = options.prompt + max(4, round(draw.uniform(0.5, 1.5) * options.completion))
        made.append([draw.randrange(100, options.ids) for _ in range(length)])
    return made


# ---------------------------------------------------------------- the bare engine: a process of its own


async def bare(options: argparse.Namespace) -> None:
    """Reads the seconds of a window from stdin, scores for so long, writes positions and seconds."""
    import numpy as np

    from llmdistill.compat.vllm import load_async_vllm
    from llmdistill.models.vllm_requests import scoring_params

    engine = load_async_vllm(
        options.model,
        dtype=options.dtype,
        max_model_len=options.max_model_len + 1,
        max_logprobs=options.top_k,
        seed=0,
        max_num_batched_tokens=16384,
    )
    asked, numbers, vocab = sequences(options, 1), itertools.count(), 1 << 30

    async def caller(end: float, positions: list[int]) -> None:
        while time.monotonic() < end:
            i = next(numbers)
            ids = asked[i % len(asked)]
            at = np.arange(options.prompt, len(ids))
            params = scoring_params(len(ids), at, options.top_k, vocab, None)
            async for _ in engine.generate({"prompt_token_ids": ids}, params, f"b{i}"):
                pass
            positions.append(len(at))

    print("ready", flush=True)
    loop = asyncio.get_running_loop()
    while line := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
        positions, started = list[int](), time.monotonic()
        await asyncio.gather(*[caller(started + float(line), positions) for _ in range(options.clients)])
        print(json.dumps({"positions": sum(positions), "seconds": time.monotonic() - started}), flush=True)
    engine.shutdown()


# ---------------------------------------------------------------- clients of the service: another process


async def clients(options: argparse.Namespace) -> None:
    """As :func:`bare`, over HTTP."""
    import numpy as np

    from llmdistill.wire import protocol
    from llmdistill.wire.blocks import decode
    from llmdistill.wire.bodies import pack_sequences

    headers = {"Content-Type": protocol.IDS_TYPE}
    asked, numbers = sequences(options, 1), itertools.count()
    limits = httpx.Limits(max_connections=options.clients)
    async with httpx.AsyncClient(base_url=options.url, timeout=600, limits=limits) as http:
        done: list[str] = []

        async def caller(end: float, seen: dict[str, Any]) -> None:
            while time.monotonic() < end:
                i = next(numbers)
                ids = asked[i % len(asked)]
                spans = [(options.prompt, len(ids))]
                body = pack_sequences({"top_k": options.top_k}, [np.asarray(ids, np.int32)], spans, None, options.ids)
                named = headers | {"X-Request-Id": f"{os.getpid()}-{i}"}
                if done:
                    named["X-Request-Done"] = done.pop()
                while True:
                    started = time.monotonic()
                    answer = await http.post(protocol.SCORE, content=body, headers=named)
                    seen["status"][answer.status_code] += 1
                    if answer.status_code != 429:
                        break
                    await asyncio.sleep(float(answer.headers["retry-after-ms"]) / 1000 * random.uniform(0.5, 1))
                if answer.status_code != 200:
                    continue
                done.append(named["X-Request-Id"])
                head, block = protocol.unpack_frames(answer.content)
                seen["positions"] += len(decode(block).token_logprobs)
                seen["bytes"] += len(answer.content)
                seen["latency"].append(time.monotonic() - started)

        print("ready", flush=True)
        loop = asyncio.get_running_loop()
        while line := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
            seen: dict[str, Any] = {"positions": 0, "bytes": 0, "latency": [], "status": Counter()}
            started = time.monotonic()
            await asyncio.gather(*[caller(started + float(line), seen) for _ in range(options.clients)])
            print(json.dumps({**seen, "seconds": time.monotonic() - started}), flush=True)


class Worker:
    """A process that is told how long to work and says what it did."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def until(self, pattern: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(pattern, line):
                return found[0]
        raise SystemExit(f"a process ended early: {' '.join(map(str, self.process.args))}")  # type: ignore[arg-type]

    def window(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        return json.loads(self.until(r"^\{.*\}$"))  # type: ignore[no-any-return]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


class Probe:
    """Asks /health every 50 ms, and once in between posts the largest legal body."""

    def __init__(self, url: str, body_bytes: int) -> None:
        self.url, self.body_bytes = url, body_bytes
        self.seconds: list[float] = []
        self.status = 0
        self._end = threading.Event()

    def __enter__(self) -> Probe:
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._ask, self._post)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        with httpx.Client(timeout=120) as http:
            while not self._end.wait(0.05):
                started = time.monotonic()
                http.get(f"{self.url}/health")
                self.seconds.append(time.monotonic() - started)

    def _post(self) -> None:
        from llmdistill.wire import protocol

        self._end.wait(2)
        kind = {"Content-Type": protocol.IDS_TYPE}
        answer = httpx.post(self.url + protocol.SCORE, content=bytes(self.body_bytes), headers=kind, timeout=120)
        self.status = answer.status_code


def resident_mib(pid: int) -> dict[str, int]:
    """Of the service's own process, and of the engine's beneath it (whose cache is touched bit by bit)."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid=,rss="], capture_output=True, text=True).stdout
    rows = [[int(word) for word in line.split()] for line in listing.splitlines()]
    family = {pid}
    while more := {p for p, parent, _ in rows if parent in family} - family:
        family |= more
    own = sum(rss for p, _, rss in rows if p == pid) // 1024
    return {"service": own, "engine": sum(rss for p, _, rss in rows if p in family) // 1024 - own}


def percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {"p50_s": round(cuts[49], 3), "p90_s": round(cuts[89], 3), "p99_s": round(cuts[98], 3)}


def main(options: argparse.Namespace) -> None:
    command = [sys.executable, str(Path(__file__).resolve())]
    same = [f"--{n}={getattr(options, n)}" for n in ("model", "dtype", "clients", "prompt", "completion", "ids")]
    same += [f"--top-k={options.top_k}", f"--max-model-len={options.max_model_len}"]
    served = Worker(
        [sys.executable, "-m", "llmdistill.cli", "serve", "--model", options.model, "--port", "0"]
        + ["--dtype", options.dtype, "--top-k", str(options.top_k), "--max-model-len", str(options.max_model_len)]
        + ["--in-flight", str(options.in_flight)]
    )
    url = served.until(r"http://\S+:\d+")
    direct, callers = (
        Worker([*command, "--role=bare", *same]),
        Worker([*command, "--role=clients", f"--url={url}", *same]),
    )
    for worker in (direct, callers):
        worker.until("ready")
    windows = max(1, round(options.minutes * 60 / options.window))
    try:
        for worker in (direct, callers):
            worker.window(min(5, options.window))  # caches, first-time compilation
        pairs, memory = [], [resident_mib(served.process.pid)]
        lag: list[float] = []
        httpx.get(f"{url}/metrics")  # the longest lag is counted from here
        for _ in range(windows):
            pairs.append((direct.window(options.window), callers.window(options.window)))
            memory.append(resident_mib(served.process.pid))
        with Probe(url, 64 << 20) as probe:  # a window of its own: what it asks would be counted against the service
            callers.window(options.window)
        lag += probe.seconds
        metrics = httpx.get(f"{url}/metrics").text
    finally:
        for worker in (callers, direct, served):
            worker.stop()
    rate = [[round(side["positions"] / side["seconds"], 1) for side in pair] for pair in pairs]
    latency = [value for _, ours in pairs for value in ours["latency"]]
    status = sum((Counter(ours["status"]) for _, ours in pairs), Counter[str]())
    longest = re.search(r"^llmdistill_longest_loop_lag_seconds (\S+)", metrics, re.M)
    cpu = re.search(r"^process_cpu_seconds_total (\S+)", metrics, re.M)
    print(
        json.dumps(
            {
                "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
                "commit": subprocess.run(
                    ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
                ).stdout.strip(),
                "model": Path(options.model).name,
                "clients": options.clients,
                "window_s": options.window,
                "bare_positions_per_second": [a for a, _ in rate],
                "service_positions_per_second": [b for _, b in rate],
                "service_over_bare": [round(b / a, 3) for a, b in rate],
                "median_ratio": round(statistics.median(b / a for a, b in rate), 3),
                "latency": percentiles(latency),
                "health_latency": percentiles(lag) | {"longest_s": round(max(lag), 3)},
                "longest_loop_lag_s": round(float(longest[1]), 3) if longest else None,
                "requests": len(latency),
                "status": dict(status),
                "bytes_per_position": round(
                    sum(o["bytes"] for _, o in pairs) / sum(o["positions"] for _, o in pairs), 1
                ),
                "service_cpu_s": float(cpu[1]) if cpu else None,
                "memory_mib": {part: [m[part] for m in memory] for part in memory[0]},
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="data/quickstart/teacher")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=3.0, help="of load on each of the two")
    parser.add_argument("--window", type=float, default=30.0, help="seconds of one window")
    parser.add_argument("--in-flight", type=int, default=256, help="of the service; fewer than clients brings 429s")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--ids", type=int, default=40000, help="ids are drawn below this")
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=256)
    parser.add_argument("--role", choices=["bare", "clients"], help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.role == "bare":
        asyncio.run(bare(chosen))
    elif chosen.role == "clients":
        asyncio.run(clients(chosen))
    else:
        main(chosen)
