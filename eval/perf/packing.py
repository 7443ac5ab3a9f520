"""Training passes against sequence length, packed and padded: tokens a second, peak memory, model FLOPs utilisation.

    python eval/perf/packing.py --threads 2

Sequences are as long as a long-tailed law says, log-normal with median LONGEST / 8, of at least 32 tokens and at most
LONGEST (256 ... 8192), one of which is LONGEST long; a round has as many as come to 4 * LONGEST tokens, a quarter of
each being its prompt. One run is the round as the trainer makes it: micro-batches of at most ``--budget`` tokens are
planned (padding counts unless packed), the teacher is asked, the loss (reverse KL, full vocabulary) goes forward and
backward. Only tokens that are there are counted, as all of their states are computed.

- ``padded``: objective.batch_tokens alone, neighbours in length together. ``packed``: objective.packing too.
- ``rows``: packed for attention that takes no sequence apart, in rows as long as the longest ("eager").

Each cell runs in a process of its own; its peak memory is what it needed above what it had before its first round. MFU
is the student's and the teacher's floating-point operations (6 and 2 per weight and token, and what attention does
within each sequence) over what a matrix product of this dtype reaches here.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from eval.perf.record import add_results_option, note  # noqa: E402

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
MODES = ("padded", "packed", "rows")
VOCAB, HIDDEN, LAYERS, HEADS = 8192, 256, 4, 4


def lengths_of_a_round(longest: int, seed: int = 0) -> list[int]:
    """Tokens of every sequence: 4 * ``longest`` in all, or the few more that the last one has."""
    draw, found = random.Random(seed), [longest]
    while sum(found) < 4 * longest:
        found.append(int(min(longest, max(32, draw.lognormvariate(0, 1) * longest / 8))))
    return found


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--modes", nargs="*", default=["padded", "packed"], choices=MODES)
    parser.add_argument("--budget", type=int, default=8192, help="tokens of a pass; at least LONGEST")
    parser.add_argument("--runs", type=int, default=5, help="timed rounds, after one that is not")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cell", nargs=2, metavar=("MODE", "LONGEST"), help="only this one, as JSON, in this process")
    add_results_option(parser)
    options = parser.parse_args(words)
    if options.cell:
        print(json.dumps(measured(options.cell[0], int(options.cell[1]), options)))
        return
    for longest in options.lengths:
        for mode in options.modes:
            found = in_a_process(mode, longest, options)
            cell = f"{mode}, up to {longest} tokens, passes of {options.budget}, {options.threads} threads"
            note("packing", cell, "tokens/s", [found["tokens"] / s for s in found["seconds"]], options.results)
            note("packing", cell, "GiB", [found["peak_gib"]], options.results)
            note("packing", cell, "MFU", [found["work"] / s / found["rate"] for s in found["seconds"]], options.results)
            note("packing", cell, "share of padding", [found["padding"]], options.results)


def in_a_process(mode: str, longest: int, options: argparse.Namespace) -> dict[str, Any]:
    words = ["--cell", mode, str(longest)]
    words += [w for name in ("budget", "runs", "threads") for w in (f"--{name}", str(getattr(options, name)))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(
        [sys.executable, __file__, *words], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def measured(mode: str, longest: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each round, and what they were spent on."""
    import torch

    from llmdistill.composition import plan
    from llmdistill.models.packing import view_of

    torch.set_num_threads(options.threads)
    lengths = lengths_of_a_round(longest)
    trainer, text = round_of(mode, lengths, max(options.budget, longest))
    model = trainer.model.train()
    before, seconds, read = peak_gib(), [], 0
    for _ in range(options.runs + 1):
        start = time.perf_counter()
        texts = plan.in_order({"main": text}, trainer.method.terms, trainer.passes.packed)
        batches = trainer.batches(texts, 1)
        for batch in batches:
            trainer.compute_loss(model, {"micro_batch": batch}).backward()
        seconds.append(time.perf_counter() - start)
        model.zero_grad()
        read = sum(view_of(model, batch.rollout).input_ids.numel() for batch in batches)
    weights = sum(p.numel() for p in model.parameters()) - VOCAB * HIDDEN  # the embedding is looked up
    attention = 2 * LAYERS * HIDDEN * sum(n * n for n in lengths)  # causal: half of 4 * n * n * H forward
    return {
        "seconds": seconds[1:],
        "tokens": sum(lengths),
        "peak_gib": peak_gib() - before,
        "work": (6 + 2) * weights * sum(lengths) + (3 + 1) * attention,
        "rate": matmul_rate(),
        "padding": 1 - sum(lengths) / read,
    }


def round_of(mode: str, lengths: list[int], budget: int) -> tuple[Any, Any]:
    """A trainer of a small Llama, and a text of sequences of these lengths."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmdistill import Ask, DistillationConfig, DistillationTrainer, Method, Term
    from llmdistill.composition.batch import Text
    from llmdistill.models.packing import can_be_packed
    from llmdistill.objectives.divergences import reverse_kl
    from llmdistill.texts import Prompt, collate
    from llmdistill.texts.sources import Only

    def llama(seed: int) -> Any:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=3 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS // 2,
            max_position_embeddings=max(LENGTHS),
        )
        model = LlamaForCausalLM(config)
        model.set_attn_implementation("eager" if mode == "rows" else "sdpa")
        return model

    args = DistillationConfig(
        output_dir=tempfile.mkdtemp(),
        report_to="none",
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        batch_tokens=budget,
        packing=mode != "padded",
    )
    method = Method((Term("kl", reverse_kl, (Ask(),)),), {"main": Only("dataset")})
    trainer = DistillationTrainer(llama(1), args, llama(2), method=method, processing_class=words())
    for judge in trainer.judges.values():
        judge.packs = args.packing and can_be_packed(judge.model)
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, VOCAB, (n,), generator=g).tolist() for n in lengths]
    starts = [n // 4 for n in lengths]
    prompts = [Prompt(x[:k], "") for x, k in zip(ids, starts, strict=True)]
    completions = [x[k:] for x, k in zip(ids, starts, strict=True)]
    return trainer, Text(collate([p.ids for p in prompts], completions, pad_id=0), prompts)


def words() -> Any:
    """A tokenizer of as many words, which nothing here is written with."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t1"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="t0", unk_token="t1", eos_token="t2")


def peak_gib() -> float:
    """Of this process so far; of the GPU's memory where there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def matmul_rate(size: int = 1024, runs: int = 5) -> float:
    """Floating-point operations a second of a float32 matrix product, the best of some."""
    import torch

    a = torch.randn(size, size)
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


if __name__ == "__main__":
    main()
