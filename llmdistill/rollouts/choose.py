"""The rollout engine that a recipe names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from llmdistill.compat.models import generation_ready
from llmdistill.compat.vllm import require_vllm
from llmdistill.errors import UserError
from llmdistill.models.generation import BATCH_TOKENS, HFRollouts
from llmdistill.models.saving import quantised
from llmdistill.ranks import on_every_rank
from llmdistill.recipe.config import RolloutConfig, bearer_token
from llmdistill.rollouts.engine import RolloutEngine
from llmdistill.rollouts.lazy import LazyEngine
from llmdistill.texts import Sampling


def sampling_of(config: RolloutConfig, seed: int = 0) -> Sampling:
    """How the student's completions are drawn, as the recipe says it."""
    names = [f.name for f in fields(Sampling) if hasattr(config, f.name)]
    return Sampling(**{name: getattr(config, name) for name in names}, seed=seed)


def make_rollout_engine(
    config: RolloutConfig,
    student: nn.Module,
    accelerator: Any,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    longest: int,
    seed: int,
    lazy: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> RolloutEngine:
    """The engine ``rollouts.engine`` names. How often it is synced (``push_every``) is the trainer's business.

    Args:
        longest: prompt and completion together, for an engine that reserves memory for them.
        tokenizer: of the student, for stop strings.
        lazy: make it when it is first sampled from, for a run whose texts are not the student's own. What is missing
            here is said at once all the same.

    Raises:
        UserError: no engine, or no service, that takes the student.
    """
    if config.engine == "hf":
        return HFRollouts(
            eos_ids=eos_ids,
            pad_id=pad_id,
            ready=lambda model: generation_ready(model, accelerator),
            tokenizer=tokenizer,
            batch_tokens=config.batch_tokens or BATCH_TOKENS,
        )
    if quantised(student):
        raise UserError(
            f"rollouts.engine is {config.engine}, which is given whole weights, and the student's are quantised "
            "(student.load_in_4bit, load_in_8bit). Fix: --rollouts.engine hf."
        )
    if config.engine == "remote":
        from llmdistill.rollouts.remote import RemoteRollouts

        make: Callable[[], RolloutEngine] = partial(
            RemoteRollouts,
            config.url,
            eos_ids=eos_ids,
            pad_id=pad_id,
            token=bearer_token(config.token_env, "rollouts.token_env"),
            folder=config.push_folder or None,
            transfer=config.transfer,
            batch_tokens=config.batch_tokens,
        )
    else:
        from llmdistill.rollouts.vllm import VLLMRollouts

        require_vllm()
        make = partial(
            VLLMRollouts,
            student,
            eos_ids=eos_ids,
            pad_id=pad_id,
            dtype=config.dtype,
            max_model_len=longest,
            kv_cache_gib=config.kv_cache_gib,
            gpu_memory_utilization=config.gpu_memory_utilization,
            seed=seed,
            tokenizer=tokenizer,
            batch_tokens=config.batch_tokens,
            sleeps=config.sleep and torch.cuda.is_available(),
            tensor_parallel_size=config.tensor_parallel_size,
            as_adapter=config.lora == "adapter",
        )
    return LazyEngine(make) if lazy else on_every_rank(make)  # the service may not be there yet
