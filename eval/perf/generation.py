"""What generation costs beside the bare engine: the same calls to vLLM directly, and through `llmdistill generate`.

    OMP_NUM_THREADS=1 python eval/perf/generation.py                        # the quick start's teacher, 3 rounds each
    python eval/perf/generation.py --model Qwen/Qwen3-8B --prompts 512 --new_tokens 512

Rounds alternate, so that what else the machine does meets both. Bare: every call is handed to vLLM's engine with the
parameters that generation uses, and what it draws is thrown away. Generation: plain writer, a file of its own each
round, answers on disk as they come, then the file of traces. Both draw with the same engine, which is loaded once.

Measured at a8a4eb1 on two AMD EPYC cores with other work on them (SmolLM2-135M-Instruct, float32, 48 prompts of 64 new
tokens, two rounds): 1.01 and 1.07 of the bare engine's tokens a second, 1.01 and 1.01 of its tokens a CPU second.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from llmdistill.datagen.calls import Call
from llmdistill.datagen.engines.base import Reader
from llmdistill.datagen.engines.local import VLLMEngine
from llmdistill.datagen.generation import generate
from llmdistill.datagen.roles import Role
from llmdistill.datagen.spending import Price
from llmdistill.evals.engines.local import checkpoint_eos_ids
from llmdistill.models.vllm_engine import InProcessVLLM
from llmdistill.models.vllm_requests import generation_params
from llmdistill.texts.rollout import Sampling

IN_FLIGHT = 256


class Shared(VLLMEngine):
    """An engine that outlives the roles it is asked through."""

    def close(self) -> None:
        self._closed.set()
        self._calls.put(None)
        self._thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="data/quickstart/teacher")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    words = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(words.model)
    engine = InProcessVLLM(
        words.model, "teacher", dtype=words.dtype, longest=512 + words.new_tokens, kv_cache_gib=0.5,
        gpu_memory_utilization=0.85,
    )  # fmt: skip
    reader, eos = Reader(tokenizer, engine.longest), checkpoint_eos_ids(words.model, tokenizer)
    sampling = Sampling(words.new_tokens, temperature=1.0)
    rows = [{"prompt": f"Write a short story about the number {n}."} for n in range(words.prompts)]

    def bare(seed: int) -> tuple[int, float, float]:
        began, cpu = time.perf_counter(), time.process_time()
        calls = [Call(({"role": "user", "content": row["prompt"]},), sampling) for row in rows]
        requests = (
            (str(i), reader.read(c)[1], generation_params(sampling, seed + i, eos)) for i, c in enumerate(calls)
        )
        tokens = sum(len(output.token_ids) for _, output in engine.stream(requests, IN_FLIGHT))
        return tokens, time.perf_counter() - began, time.process_time() - cpu

    def ours(seed: int) -> tuple[int, float, float]:
        role = Role(words.model, "0" * 16, None, None, {}, Price(), lambda: Shared(engine, reader, eos, IN_FLIGHT))
        with tempfile.TemporaryDirectory() as folder:
            began, cpu = time.perf_counter(), time.process_time()
            made = generate(rows, "plain", {"teacher": role}, Path(folder) / "t.jsonl", sampling=sampling, seed=seed)
            return made.details["tokens"], time.perf_counter() - began, time.process_time() - cpu

    bare(-1000)  # the first requests of an engine are slower
    rates: dict[str, list[tuple[float, float]]] = {"bare": [], "generate": []}
    for number in range(words.rounds):
        measured: list[tuple[str, Any]] = [("bare", bare), ("generate", ours)]
        for name, work in measured if number % 2 == 0 else reversed(measured):
            tokens, seconds, cpu = work(1 + 10_000 * number)
            rates[name].append((tokens / seconds, tokens / cpu))
            print(
                f"{name:9} {tokens} tokens, {tokens / seconds:7.1f} a second, {tokens / cpu:7.1f} a CPU second",
                flush=True,
            )
    for column, what in ((0, "tokens a second"), (1, "tokens a CPU second")):
        ratios = [g[column] / b[column] for g, b in zip(rates["generate"], rates["bare"], strict=True)]
        shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"{what}: generate over bare, median {statistics.median(ratios):.3f}, rounds {shown}")
    engine.close()


if __name__ == "__main__":
    main()
