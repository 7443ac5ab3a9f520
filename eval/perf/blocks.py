"""Score blocks as bytes: size and speed of both forms, beside JSON and raw int32 + float32 arrays. One thread.

    OMP_NUM_THREADS=1 python eval/perf/blocks.py

Rows are the likeliest K of random logits over V tokens, spread like a language model's. Prints JSON: bytes, and tokens
encoded and decoded in a second, the median of ``--runs``. "raw" copies float32 and int32 arrays and checks nothing.
"json" is the least that JSON can be: per position an object from id to log-prob with the digits float32 needs, without
the ranks and texts that OpenAI-style servers add, read into tensors.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from llmdistill.wire.blocks import BlockHeader, ScoreBlock, decode, encode

Codec = tuple[Callable[[ScoreBlock], Any], Callable[[Any], Any]]


def random_block(n: int, k: int, vocab: int) -> ScoreBlock:
    """Seeded rows of [n, V] logits with standard deviation 3."""
    generator = torch.Generator().manual_seed(0)
    token_lp, ids, listed = [], [], []
    for rows in torch.arange(n).split(64):
        logprobs = torch.randn(len(rows), vocab, generator=generator).mul(3).log_softmax(-1)
        values, indices = logprobs.topk(k)
        token_lp.append(logprobs[:, 0])
        ids.append(indices.int())
        listed.append(values)
    header = BlockHeader("0123456789abcdef", "fedcba9876543210", k, vocab)
    return ScoreBlock(slice(100, 100 + n), torch.cat(token_lp), torch.cat(ids), torch.cat(listed), header)


def to_json(block: ScoreBlock) -> bytes:
    listed = [
        {str(i): {"logprob": float(str(np.float32(lp)))} for i, lp in zip(row_ids, row_lp, strict=True)}
        for row_ids, row_lp in zip(block.topk_ids.tolist(), block.topk_logprobs.tolist(), strict=True)
    ]
    return json.dumps({"token_logprobs": block.token_logprobs.tolist(), "prompt_logprobs": listed}).encode()


def from_json(data: bytes) -> list[torch.Tensor]:
    content = json.loads(data)
    rows = content["prompt_logprobs"]
    return [
        torch.tensor(content["token_logprobs"]),
        torch.tensor([[int(i) for i in row] for row in rows], dtype=torch.int32),
        torch.tensor([[entry["logprob"] for entry in row.values()] for row in rows]),
    ]


def to_raw(block: ScoreBlock) -> bytes:
    arrays = (block.token_logprobs, block.topk_ids, block.topk_logprobs)
    return b"".join(array.numpy().tobytes() for array in arrays)


def from_raw(data: bytes, n: int, k: int) -> list[torch.Tensor]:
    cells, at = n * k, 4 * n
    return [
        torch.frombuffer(bytearray(data[:at]), dtype=torch.float32),
        torch.frombuffer(bytearray(data[at : at + 4 * cells]), dtype=torch.int32).view(n, k),
        torch.frombuffer(bytearray(data[at + 4 * cells :]), dtype=torch.float32).view(n, k),
    ]


def seconds(call: Callable[[], Any], runs: int) -> float:
    call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256, help="rows of the block")
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--runs", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(1)
    n, k = options.tokens, options.top_k
    block = random_block(n, k, options.vocab)
    codecs: dict[str, Codec] = {
        "float16": (lambda b: encode(b, "float16"), decode),
        "float32": (lambda b: encode(b, "float32"), decode),
        "raw": (to_raw, lambda data: from_raw(data, n, k)),
        "json": (to_json, from_json),
    }
    report: dict[str, Any] = {
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}, numpy {np.__version__}",
        "tokens": n,
        "top_k": k,
        "vocab": options.vocab,
    }
    for name, (write, read) in codecs.items():
        data = write(block)
        report[name] = {
            "bytes_per_token": round(len(data) / n, 2),
            "encoded_tokens_per_second": round(n / seconds(lambda: write(block), options.runs)),  # noqa: B023
            "decoded_tokens_per_second": round(n / seconds(lambda: read(data), options.runs)),  # noqa: B023
        }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
