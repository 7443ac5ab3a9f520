"""Runs of tiny students as denoisers, and the naive loss that the streamed one is compared with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor

from llmdistill import RolloutConfig
from llmdistill.diffusion.backbone import MaskedDiffusionLM
from llmdistill.diffusion.denoising import of_noisy_copy
from llmdistill.diffusion.losses import token_ce
from llmdistill.diffusion.stages import SFTConfig
from llmdistill.diffusion.trainers import MaskedDiffusionTrainer
from llmdistill.texts import Rollout
from tests import tiny

COMMON: dict[str, Any] = dict(
    max_steps=4,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=1e-2,
    lr_scheduler_type="constant",
    logging_steps=1,
    save_strategy="no",
    max_grad_norm=0.0,
)


def trainer(
    out: Path,
    config: Any = SFTConfig,
    trainer_class: Any = MaskedDiffusionTrainer,
    *,
    teacher: Any = None,
    **given: Any,
) -> Any:
    """A trainer of a tiny Llama on 16 rows of chat; ``given``: settings, or arguments of the trainer."""
    arguments = ("train_dataset", "eval_dataset", "data", "peft_config", "model", "processing_class")
    own = {name: given.pop(name) for name in arguments if name in given}
    rows = tiny.rows(20)
    rollouts = RolloutConfig(max_new_tokens=8, samples_per_prompt=given.pop("samples", 1))
    args = config(output_dir=str(out), rollouts=rollouts, **(COMMON | given))
    known: dict[str, Any] = dict(train_dataset=rows[:16], eval_dataset=rows[16:], processing_class=tiny.tokenizer())
    known |= own
    return trainer_class(known.pop("model", None) or tiny.llama(1), args, teacher, preflight=False, **known)


def examples(t: Any, count: int = 8) -> list[Any]:
    return list(t.train_dataset[:count])


def gradients(t: Any, parts: int, texts: Any) -> dict[str, Tensor]:
    """Of the trainer's own loss on a round, split into micro-batches."""
    t.model.zero_grad()
    for batch in t.batches(texts, parts):
        t.compute_loss(t.model, {"micro_batch": batch}).backward()
    return {name: p.grad.clone() for name, p in t.model.named_parameters() if p.grad is not None}


def naive(t: Any, rollout: Rollout, denominator: float, per_sequence: Tensor | None = None) -> tuple[Tensor, Any]:
    """The same loss with whole logits of the library's denoiser, over ``denominator``, and its gradients."""
    model, noise, d = copy.deepcopy(t.model), rollout.noise, t.denoiser
    assert noise is not None
    model.zero_grad()
    lm = MaskedDiffusionLM(model, d.mask_token_id, shift=d.shift, block_size=d.block_size, probe=False)
    noisy, mask = rollout.input_ids.masked_fill(noise.masked, d.mask_token_id), rollout.attention_mask.long()
    if d.block_size is None:
        logits = lm(noisy, attention_mask=mask)
    else:
        logits = of_noisy_copy(lm, rollout.input_ids, noisy, mask, noise.blocks)
    ce = token_ce(logits, rollout.input_ids).masked_fill(~rollout.completion_mask, 0.0) * noise.weight
    sums = ce.sum(-1) if per_sequence is None else ce.sum(-1) / per_sequence
    loss = sums.sum() / denominator
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
