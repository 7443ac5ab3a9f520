"""Sampling with transformers' ``generate``: the engine that runs wherever the model does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel

from llmdistill.rollouts.engine import request_seed
from llmdistill.rollouts.rollout import Finish, Prompt, Rollout, Sampling, collate


class HFRollouts:
    """The student samples from itself, in place.

    Args:
        eos_ids, pad_id: of the student's tokenizer.
        ready: context manager around generation that yields the model to generate with; it gathers parameters that
            are sharded (ZeRO-3).
    """

    def __init__(
        self,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        ready: Callable[[nn.Module], AbstractContextManager[nn.Module]] = nullcontext,
    ) -> None:
        self.eos_ids, self.pad_id, self.ready = tuple(eos_ids), pad_id, ready
        self.model: nn.Module | None = None
        self.policy_version = 0

    def sync(self, model: nn.Module, policy_version: int) -> None:
        self.model, self.policy_version = model, policy_version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        assert self.model is not None, "sync() comes before generate()"
        with self.ready(self.model) as model:
            return generate(
                model,  # type: ignore[arg-type]
                prompts,
                sampling,
                eos_ids=self.eos_ids,
                pad_id=self.pad_id,
                policy_version=self.policy_version,
            )

    def close(self) -> None:
        self.model = None


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    policy_version: int = 0,
) -> Rollout:
    """Completions of every prompt (samples of one prompt adjacent), the ending eos included and counted.

    The global random state is left as it was found: a run draws the same samples whatever else uses it.
    """
    n = sampling.samples_per_prompt
    width = max(len(p.ids) for p in prompts)
    ids = torch.tensor([[pad_id] * (width - len(p.ids)) + p.ids for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=model.device)
    ids, mask = ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
    greedy = sampling.temperature == 0
    drawing = {} if greedy else dict(temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(request_seed(sampling.seed, 0, 0))
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            do_sample=not greedy,
            eos_token_id=list(eos_ids),
            pad_token_id=pad_id,
            use_cache=True,
            **drawing,
        )
    model.train(was_training)
    completions, finish = [], []
    for row in out[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in eos_ids), None)
        completions.append(row if end is None else row[: end + 1])
        finish.append("length" if end is None else "stop")
    reasons: list[Finish] = ["length" if f == "length" else "stop" for f in finish]
    return collate(
        [p.ids for p in prompts for _ in range(n)],
        completions,
        pad_id=pad_id,
        finish=reasons,
        domain=[p.domain for p in prompts for _ in range(n)],
        policy_version=policy_version,
    )
