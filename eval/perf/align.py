"""Alignment of two tokenizations: tokens in a second by pair and length, and what a longer text costs in memory.

    OMP_NUM_THREADS=1 python eval/perf/align.py [--student-tokens-per-second N]

Prints JSON. ``align``: spelling both sides out and cutting chunks, of ids that are there; ``retokenize``: the text from
the student's ids, and the teacher's ids from it. Both in student tokens a second on one core, the median of ``--runs``.
``share``: their share of a step in which the student passes so many tokens a second (forward, backward, head), by
default 2,000: SmolLM2-135M on two CPU cores; a GPU passes more, and its teacher too, while the batch is aligned.
``bytes_per_token``: the most that NumPy and Python hold at a time, over the tokens of the text.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llmdistill.tokenization.align import align, spell
from llmdistill.tokenization.token_bytes import table_of
from tests.tokenization.vocabularies import encode, tokenizer

PAIRS = (("smollm2", "qwen"), ("smollm2", "deepseek"), ("deepseek", "mistral-fast"), ("smollm2", "bytes"))
LENGTHS = (1_000, 8_000, 32_000, 128_000)
LINE = (
    "Natalia sold 48 clips in April, and half as many in May: 48 / 2 = 24, so 48 + 24 = 72 in all.\n"
    "def total(prices):\n    return sum(p * 1.19 for p in prices)  # 含税\n\n"
)


def seconds(run: Callable[[], Any], runs: int) -> float:
    run()
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def row(pair: tuple[str, str], tokens: int, runs: int, step: float) -> dict[str, Any]:
    toks = [tokenizer(name) for name in pair]
    tables = [table_of(tok) for tok in toks]
    text = LINE * (tokens // len(encode(toks[0], LINE)))
    ids = [encode(tok, text) for tok in toks]

    def cut() -> int:
        found = align(*(spell(i, table) for i, table in zip(ids, tables, strict=True)))
        assert found.exact
        return len(found.student_ends)

    def retokenize() -> list[int]:
        return encode(toks[1], spell(ids[0], tables[0]).units.astype("uint8").tobytes().decode())

    aligning, encoding = seconds(cut, runs), seconds(retokenize, max(1, runs // 3))
    tracemalloc.start()
    chunks = cut()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    count = len(ids[0])
    return {
        "pair": "-".join(pair),
        "tokens": count,
        "chunks_per_token": round(chunks / count, 3),
        "align_tokens_per_s": round(count / aligning),
        "retokenize_tokens_per_s": round(count / encoding),
        "share": round((aligning + encoding) / (count / step), 5),
        "bytes_per_token": round(peak / count, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--student-tokens-per-second", type=float, default=2000.0)
    args = parser.parse_args()
    rows = [row(pair, n, args.runs, args.student_tokens_per_second) for pair in PAIRS for n in LENGTHS]
    print(json.dumps({"machine": platform.processor() or platform.machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
