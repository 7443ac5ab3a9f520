"""Sampling from a masked diffusion model: tokens in a second and forward passes a token, by block, cache and threshold.

    OMP_NUM_THREADS=1 python eval/perf/diffusion.py [--model FOLDER] [--new 128] [--table]

Prints JSON, or with ``--table`` what docs/diffusion.md has of it. Without ``--model`` a random Llama of ``--hidden`` by
``--layers``: its texts mean nothing, and its times are those of any model of that size; thresholds then hold as often
as ``--sure`` makes its logits sure. ``tokens_per_second``: of all sequences of a batch together, by the CPU time of the
one thread (which other work on the machine does not change much), the median of ``--runs``; ``forwards_per_token``: of
a sequence.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llmdistill.diffusion.backbone import MaskedDiffusionLM
from llmdistill.diffusion.generation_config import DiffusionGenerationConfig
from llmdistill.diffusion.sampling import generate

BLOCKS = (4, 16, 32, 128)
THRESHOLDS = (None, 0.95, 0.9, 0.7, 0.5)  # None: one token a step


def random_model(hidden: int, layers: int, vocab: int, sure: float, block_size: int | None) -> MaskedDiffusionLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab + 1,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        model.lm_head.weight *= sure
    return MaskedDiffusionLM(model, vocab, block_size=block_size)


def measured(model: MaskedDiffusionLM, prompts: torch.Tensor, runs: int, **settings: Any) -> dict[str, float]:
    config = DiffusionGenerationConfig(temperature=0.0, **settings)
    taken, out = [], None
    for _ in range(runs + 1):  # the first is not counted
        start = time.process_time()
        out = generate(model, prompts, config=config)
        taken.append(time.process_time() - start)
    assert out is not None
    tokens = len(prompts) * config.max_new_tokens
    return {
        "tokens_per_second": round(tokens / statistics.median(taken[1:]), 1),
        "forwards_per_token": round(float(out.nfe.double().mean()) / config.max_new_tokens, 4),
    }


def table(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The rows as markdown, under what they are of."""
    lines = [
        f"{about['model']}, {about['batch']} sequences, {about['prompt']} + {about['new']} tokens, {about['machine']}:"
    ]
    lines += [
        "",
        "| attention | block | cache | threshold | tokens a second | forwards a token |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["attention"], row["block"], row["cache"], row["threshold"] or "one token a step"]
        cells += [row["tokens_per_second"], f"{row['forwards_per_token']:.3f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a denoiser's folder")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--sure", type=float, default=30.0, help="factor on the random head")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="print markdown")
    options = parser.parse_args()
    torch.set_num_threads(1)

    def model_of(block: int | None) -> MaskedDiffusionLM:
        if options.model:
            return MaskedDiffusionLM.from_pretrained(options.model, block_size=block)[0]
        return random_model(options.hidden, options.layers, options.vocab, options.sure, block)

    prompts = torch.randint(
        5, options.vocab // 2, (options.batch, options.prompt), generator=torch.Generator().manual_seed(1)
    )
    shared: dict[str, Any] = {"max_new_tokens": options.new}
    full, found = model_of(None), list[dict[str, Any]]()
    for block in (b for b in BLOCKS if b <= options.new):
        for cache in ("none", "prefix", "dual"):
            row = measured(full, prompts, options.runs, block_length=block, cache=cache, **shared)
            found.append({"attention": "full", "block": block, "cache": cache, "threshold": None, **row})
        causal = model_of(block)
        for cache in ("none", "block"):
            row = measured(causal, prompts, options.runs, cache=cache, **shared)
            found.append({"attention": "blocks", "block": block, "cache": cache, "threshold": None, **row})
    for threshold in THRESHOLDS[1:]:
        settings = {"select": "threshold", "threshold": threshold, "block_length": 32, "cache": "dual"}
        row = measured(full, prompts, options.runs, **settings, **shared)
        found.append({"attention": "full", "block": 32, "cache": "dual", "threshold": threshold, **row})
    about = {
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
        "model": options.model or f"random Llama {options.hidden} x {options.layers}, {options.vocab} words",
        "batch": options.batch,
        "prompt": options.prompt,
        "new": options.new,
    }
    print(table(about, found) if options.table else json.dumps({**about, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
