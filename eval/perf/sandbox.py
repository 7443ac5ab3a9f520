"""Code verdicts: how many short programs a second, and what one costs from asking to verdict.

    OMP_NUM_THREADS=1 python eval/perf/sandbox.py --programs 400 --threads 2

Programs are a few lines with a few asserts (a HumanEval problem's size), in every mode that this machine grants, next
to what a bare `python -c` of the same program takes: no confinement, one interpreter a program. Prints JSON; latencies
in milliseconds (median, 95th percentile), throughput as the median of windows, since other load comes and goes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llmdistill.errors import UserError
from llmdistill.verify.code import find_program, run_stdin, run_tests
from llmdistill.verify.sandbox import Sandbox

PROGRAM = """
from typing import List

def has_close_elements(numbers: List[float], threshold: float) -> bool:
    ordered = sorted(numbers)
    return any(b - a < threshold for a, b in zip(ordered, ordered[1:]))
"""
TESTS = """
assert has_close_elements([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.3) == True
assert has_close_elements([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.05) == False
assert has_close_elements([1.0, 2.0, 5.9, 4.0, 5.0], 0.95) == True
assert has_close_elements([1.0, 2.0, 5.9, 4.0, 5.0], 0.8) == False
"""
WINDOWS = 5


def tests(pool: Sandbox) -> bool:
    return run_tests(PROGRAM, TESTS, sandbox=pool).passed


def script(pool: Sandbox) -> bool:
    return run_stdin("print(sum(map(int, input().split())))", [("1 2 3\n", "6\n")], sandbox=pool).passed


def found(pool: Sandbox) -> bool:
    return (
        find_program(f"Here it is:\n```python{PROGRAM}```\n", entry_point="has_close_elements", sandbox=pool)
        is not None
    )


def bare(_: Sandbox | None) -> bool:
    return subprocess.run([sys.executable, "-c", PROGRAM + TESTS]).returncode == 0


def measure(judge: Callable[[Any], bool], pool: Sandbox | None, programs: int, threads: int) -> dict[str, float]:
    def timed(_: int) -> float:
        start = time.perf_counter()
        assert judge(pool)
        return (time.perf_counter() - start) * 1000

    rates, latencies = [], []
    with ThreadPoolExecutor(threads) as executor:
        list(executor.map(timed, range(2 * threads)))  # fork servers start
        for _ in range(WINDOWS):
            start = time.perf_counter()
            latencies += executor.map(timed, range(max(1, programs // WINDOWS)))
            rates.append(programs / WINDOWS / (time.perf_counter() - start))
    return {
        "programs_per_second": round(statistics.median(rates), 1),
        "latency_ms_median": round(statistics.median(latencies), 2),
        "latency_ms_p95": round(statistics.quantiles(latencies, n=20)[-1], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=400, help="of each kind, in each mode")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="programs at a time")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, uid {os.geteuid()}",
        "python": platform.python_version(),
        "threads": options.threads,
        "bare python -c": measure(bare, None, max(WINDOWS * 2, options.programs // 10), options.threads),
    }
    for mode in ("namespaces", "landlock"):
        start = time.perf_counter()
        try:
            pool = Sandbox(options.threads, mode=mode)
        except UserError as error:
            report[mode] = str(error)
            continue
        with pool:
            report[mode] = {"start_s": round(time.perf_counter() - start, 3), "means": pool.means}
            for name, judge in (("asserts", tests), ("stdin", script), ("finding a program", found)):
                report[mode][name] = measure(judge, pool, options.programs, options.threads)
                report[mode][f"{name}, one at a time"] = measure(judge, pool, options.programs // 2, 1)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
