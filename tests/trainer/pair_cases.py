"""Pairs, a trainer over tiny models, and what it must compute: one sequence and one position at a time."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmdistill.recipe.data_config import DataConfig
from llmdistill.redi import REDIConfig, REDITrainer
from llmdistill.texts import Prompt, Rollout
from llmdistill.texts.pair import Pair
from llmdistill.texts.pairs import pair_encoder
from tests import tiny
from tests.trainer.batches import pair_batch


def pair_rows(n: int) -> list[dict[str, Any]]:
    """Prompts and both sides differ in length, within a pair and between pairs."""
    return [
        {**row, "chosen": row["completion"], "rejected": f"{i * 9 + 1}{' no' * ((i + 1) % 3)}"}
        for i, row in enumerate(tiny.rows(n))
    ]


def trainer(tmp_path: Path, student: Any = None, rows: Any = None, heldout: Any = None, **settings: Any) -> REDITrainer:
    data = settings.pop("data", DataConfig())
    callbacks = settings.pop("callbacks", None)
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", **settings}
    return REDITrainer(
        student or tiny.llama(1),
        REDIConfig(output_dir=str(tmp_path / "run"), logging_steps=1, **settings),
        train_dataset=pair_rows(16) if rows is None else rows,
        eval_dataset=heldout,
        processing_class=tiny.tokenizer(),
        callbacks=callbacks,
        data=data,
    )


def pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> Pair:
    return Pair(Prompt(prompt, ""), tuple(chosen), tuple(rejected))


PAIRS = [
    pair([5, 6, 7, 8], [9, 10, 1], [9, 11, 12, 13, 1]),
    pair([11, 12], [13, 14, 15, 16, 17], [1]),
    pair([20] * 9, [1], [40, 41]),
]


def by_hand(student: Any, pairs: list[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean log-probs [P] of both sides, one unpadded sequence and one position at a time."""

    def mean(prompt: list[int], completion: tuple[int, ...]) -> torch.Tensor:
        logits = student(torch.tensor([[*prompt, *completion]])).logits[0]
        start = len(prompt)
        terms = [logits[start + i - 1].log_softmax(-1)[token] for i, token in enumerate(completion)]
        return torch.stack(terms).sum() / len(completion)

    chosen = [mean(p.prompt.ids, p.chosen) for p in pairs]
    return torch.stack(chosen), torch.stack([mean(p.prompt.ids, p.rejected) for p in pairs])


def loss_and_gradients(
    t: REDITrainer, pairs: list[Pair], left: int = 0, right: int = 0
) -> tuple[float, dict[str, torch.Tensor]]:
    """Of the pairs as one micro-batch, with columns of padding added that hold an id which is a word elsewhere."""
    t.model.zero_grad()
    t.model.train()
    batch = pair_batch(t, pairs)
    batch.rollout = padded(batch.rollout, left, right)
    loss = t.compute_loss(t.model, {"micro_batch": batch})
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in t.model.named_parameters() if p.grad is not None}


def padded(rollout: Rollout, left: int, right: int) -> Rollout:
    pad = partial(torch.nn.functional.pad, pad=(left, right))
    return Rollout(pad(rollout.input_ids, value=77), pad(rollout.attention_mask), pad(rollout.completion_mask))


def assert_same_gradients(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    scale = max(g.abs().max() for g in a.values())
    assert scale > 1e-3
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance * scale, name


def encoded(rows: list[dict[str, Any]]) -> list[Pair]:
    return pair_encoder(tiny.tokenizer(), DataConfig()).encode_all(rows, "rows")
