"""The arena's models: Llamas of a few thousand weights, trained here from nothing and kept under runs/arena/.

The loop below only makes teachers and starting points. What is compared in the arena is trained by the trainers of
``methods.py``.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from task import GROUP, VOCABULARY, Problem, longest, tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmdistill.models.generation import generate
from llmdistill.texts import Prompt, Rollout, Sampling, predicting_rows
from llmdistill.texts.prompts import completed

PAD_ID, EOS_ID = 0, 1
TOKENIZER = tokenizer()
GROUPED = tokenizer(GROUP)
CACHE = Path(__file__).resolve().parents[2] / "runs" / "arena"


@dataclass(frozen=True)
class Size:
    """Width, layers, heads and the width of the feed-forward part of a Llama with tied embeddings."""

    hidden: int
    layers: int
    heads: int
    inner: int

    def build(self, seed: int, vocabulary: int = VOCABULARY) -> PreTrainedModel:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=PAD_ID,
            eos_token_id=EOS_ID,
            bos_token_id=None,
        )
        return LlamaForCausalLM(config).float()


def parameters(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters())


def tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """That of the arena's two which the model reads."""
    return {len(t): t for t in (TOKENIZER, GROUPED)}[model.config.vocab_size]


def ids(text: str, tok: PreTrainedTokenizerBase = TOKENIZER) -> list[int]:
    return list(tok(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]


def as_prompt(problem: Problem, completion: str | None = None, tok: PreTrainedTokenizerBase = TOKENIZER) -> Prompt:
    text = problem.completion if completion is None else completion
    return Prompt(ids(problem.prompt, tok), problem.prompt, problem.operation, completion=(*ids(text, tok), EOS_ID))


def texts(rollout: Rollout, tok: PreTrainedTokenizerBase = TOKENIZER) -> list[str]:
    """The completions as text."""
    found = [row[mask].tolist() for row, mask in zip(rollout.input_ids, rollout.completion_mask, strict=True)]
    return tok.batch_decode(found, skip_special_tokens=True)


def answers(
    model: PreTrainedModel, problems: Sequence[Problem], *, temperature: float = 0.0, seed: int = 0, batch: int = 512
) -> list[str]:
    """A completion of every problem, sampled by llmdistill's own rollout code; greedy at temperature 0."""
    found, tok = list[str](), tokenizer_of(model)
    for start in range(0, len(problems), batch):
        part = [as_prompt(p, tok=tok) for p in problems[start : start + batch]]
        sampling = Sampling(longest(), temperature=temperature, seed=seed + start)
        found += texts(generate(model, part, sampling, eos_ids=(EOS_ID,), pad_id=PAD_ID), tok)
    return found


def accuracy(model: PreTrainedModel, problems: Sequence[Problem], *, temperature: float = 0.0, seed: int = 0) -> float:
    """Share of the problems whose answer is exactly right."""
    found = answers(model, problems, temperature=temperature, seed=seed)
    return sum(p.solved_by(text) for p, text in zip(problems, found, strict=True)) / len(problems)


def _loss(model: PreTrainedModel, batch: Sequence[Prompt]) -> Tensor:
    """Cross-entropy of the completions, mean over their tokens."""
    rollout = completed(batch, PAD_ID)
    logits = model(input_ids=rollout.input_ids, attention_mask=rollout.attention_mask, use_cache=False).logits
    return torch.nn.functional.cross_entropy(predicting_rows(logits, rollout.completion_mask), rollout.token_rows())


def train(
    model: PreTrainedModel,
    batches: Iterator[Sequence[Prompt]],
    steps: int,
    lr: float,
    *,
    after: Callable[[int], bool] = lambda step: False,
    decay: bool = True,
) -> float:
    """Plain cross-entropy training with a warm-up and a cosine ``decay``; returns the CPU seconds.

    ``after`` is called with the number of steps done, on no clock; True ends the training there.
    """
    start, aside = time.process_time(), 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    warmup = max(1, steps // 20)
    model.train()
    for step in range(1, steps + 1):
        progress = max(0.0, (step - warmup) / max(1, steps - warmup))
        left = 0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2 if decay else 1.0
        optimizer.param_groups[0]["lr"] = lr * min(1.0, step / warmup) * left
        optimizer.zero_grad()
        _loss(model, next(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        paused = time.process_time()
        ended = after(step)
        model.train()
        aside += time.process_time() - paused
        if ended:
            break
    model.eval()
    return time.process_time() - start - aside


def shuffled(rows: Sequence[Prompt], batch: int, seed: int) -> Iterator[list[Prompt]]:
    """Batches of the rows, over and over, in a new order every time."""
    rng = random.Random(seed)
    while True:
        order = list(rows)
        rng.shuffle(order)
        yield from (order[i : i + batch] for i in range(0, len(order) - min(batch, len(order)) + 1, batch))


def kept_text(name: str, make: Callable[[], list[Any]]) -> tuple[list[Any], float]:
    """The texts kept under ``name`` and the CPU seconds that they took; made and kept when they are not there yet."""
    file = CACHE / "texts" / f"{name}.json"
    if not file.exists():
        began = time.process_time()
        made = {"texts": make(), "cpu_seconds": time.process_time() - began}
        file.parent.mkdir(parents=True, exist_ok=True)
        mine = file.with_suffix(f".{os.getpid()}.tmp")
        mine.write_text(json.dumps(made))
        mine.replace(file)
    made = json.loads(file.read_text())
    return made["texts"], made["cpu_seconds"]


def cached(
    key: str, make: Callable[[], tuple[PreTrainedModel, dict[str, Any]]]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model kept under ``key`` and what is known of it; made and kept when it is not there yet."""
    folder = CACHE / "models" / key
    if not (folder / "about.json").exists():
        model, about = make()
        # Two workers may make the same model: each writes a folder of its own, and the first to finish is kept.
        mine = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        model.save_pretrained(mine)
        (mine / "about.json").write_text(json.dumps({"parameters": parameters(model), **about}, indent=1))
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            mine.rename(folder)
        except OSError:
            shutil.rmtree(mine)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, json.loads((folder / "about.json").read_text())
