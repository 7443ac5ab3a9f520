"""Verdicts a second of processor time: what extraction and comparison cost, whatever else the machine does.

    LLMDISTILL_DATA=data python eval/perf/verdicts.py

The first table is of the rules alone, all in this process. The second is of what graders and rewards do: the worker
processes are asked, one for each core, with many answers at a time, and the seconds are those of the clock. The data
folder holds verifier_cases.jsonl and traces/.
"""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

from llmdistill.verify.equal import compare_all, judge_quickly
from llmdistill.verify.math import AnswerJudge

FILES = {
    "gsm8k_gpt3_solutions": ("traces/gsm8k_gpt3_solutions.jsonl.gz", "response", "answer"),
    "qwen25math_maj8_sample": ("traces/qwen25math_maj8_sample.jsonl", "response", "answer"),
    "mip_traces": ("traces/mip_traces.jsonl.gz", "response", "answer"),
    "the labelled pairs": ("verifier_cases.jsonl", "prediction", "gold"),
}


def rows(file: Path) -> list[dict[str, Any]]:
    data = file.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(data) if file.suffix == ".gz" else data).splitlines()]


def judge(prediction: str, gold: str) -> bool:
    """One verdict. Returns whether it was decided without algebra."""
    found = judge_quickly(prediction, gold, kind="math", last_number=True, tolerance=None)
    if found.decision is not None or found.extraction.answer is None:
        return True
    compare_all(gold, found.extraction.answer, found.extraction.parts)
    return False


def main() -> None:
    data = Path(os.environ.get("LLMDISTILL_DATA", "data"))
    judge("\\boxed{\\sqrt{x}+y}", "y+\\sqrt{x}")  # mpmath's import is no verdict
    print("| | verdicts/s of one core | without algebra | median | p99 | max |\n|---|---|---|---|---|---|")
    for name, (file, prediction, gold) in FILES.items():
        times, plain = [], 0
        for row in rows(data / file):
            start = time.process_time()
            plain += judge(row[prediction], row[gold])
            times.append(time.process_time() - start)
        times.sort()
        rate, p99 = len(times) / sum(times), 1e3 * times[int(0.99 * len(times))]
        share, median = 100 * plain / len(times), 1e3 * times[len(times) // 2]
        print(f"| {name} | {rate:,.0f} | {share:.0f} % | {median:.2f} ms | {p99:.0f} ms | {times[-1]:.2f} s |")
    print("\n| | verdicts/s by worker processes | of this process, ms each |\n|---|---|---|")
    with AnswerJudge(workers=os.cpu_count() or 1) as judges:
        list(judges.judge_many([("\\boxed{1}", "1")] * 256))  # a worker's start is no verdict
        for name, (file, prediction, gold) in FILES.items():
            asked = [(row[prediction], row[gold]) for row in rows(data / file)]
            begun, own = time.perf_counter(), time.process_time()
            count = sum(1 for _ in judges.judge_many(asked))
            rate, own = count / (time.perf_counter() - begun), 1e3 * (time.process_time() - own) / count
            print(f"| {name} | {rate:,.0f} | {own:.3f} |")


if __name__ == "__main__":
    main()
