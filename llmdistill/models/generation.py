"""Sampling with transformers' ``generate``: the engine that runs wherever the model does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmdistill.errors import UserError
from llmdistill.models.weights import base_model
from llmdistill.texts import request_seed
from llmdistill.texts.rollout import Finish, Prompt, Rollout, Sampling, collate


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
    rows: Sequence[int] | None = None,
) -> Rollout:
    """Completions of every prompt (samples of one prompt adjacent), the ending eos included and counted.

    ``behavior_logprobs`` are those of the distribution drawn from: softmax(logits / temperature) after top-k and
    top-p; of softmax(logits) when greedy. The global random state is left as it was found: a run draws the same
    samples whatever else uses it.

    Args:
        rows: number of each prompt in the call its seed speaks of, where this call is only a part of that.
    """
    n = sampling.samples_per_prompt
    width = max(len(p.ids) for p in prompts)
    ids = torch.tensor([[pad_id] * (width - len(p.ids)) + p.ids for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=model.device)
    ids, mask = ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
    # Drawing is ours (one uniform number per request and token), so transformers only has to take the best score.
    draw = _Draw(sampling, range(len(prompts)) if rows is None else rows).to(model.device)
    was_training = model.training
    model.eval()
    holders = [model, base_model(model)]  # adapters hand their wrapper's settings down to the model below
    own = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig()
        out = _generated(model, ids, mask, sampling, draw, eos_ids, pad_id)
    finally:
        for holder, config in zip(holders, own, strict=True):
            holder.generation_config = config
    model.train(was_training)
    completions: list[list[int]] = []
    logprobs: list[list[float]] = []
    finish: list[Finish] = []
    for row, row_logprobs in zip(out[:, width:].tolist(), draw.logprobs(), strict=True):  # type: ignore[union-attr]
        end = next((i for i, token in enumerate(row) if token in eos_ids), None)
        completions.append(row if end is None else row[: end + 1])
        logprobs.append(row_logprobs[: len(completions[-1])])
        finish.append("length" if end is None else "stop")
    return collate(
        [p.ids for p in prompts for _ in range(n)],
        completions,
        pad_id=pad_id,
        behavior_logprobs=logprobs,
        finish=finish,
        domain=[p.domain for p in prompts for _ in range(n)],
        policy_version=policy_version,
    )


def _generated(
    model: PreTrainedModel,
    ids_BT: Tensor,
    mask_BT: Tensor,
    sampling: Sampling,
    draw: _Draw,
    eos_ids: Sequence[int],
    pad_id: int,
) -> Tensor:
    """Prompts and completions, [B, T + new]. Nothing of the checkpoint's own generation settings is in force: vLLM does
    not apply them either, and a repetition penalty would make what is drawn another distribution than the policy's."""
    return model.generate(  # type: ignore[operator,no-any-return]
        input_ids=ids_BT,
        attention_mask=mask_BT,
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        eos_token_id=list(eos_ids),
        pad_token_id=pad_id,
        use_cache=True,
        logits_processor=LogitsProcessorList([_finite, *_warpers(sampling), draw]),
        synced_gpus=False,  # parameters are gathered: ranks need not take equally many steps
    )


def _warpers(sampling: Sampling) -> list[LogitsProcessor]:
    """Temperature, then top-k, then top-p, as transformers and vLLM order them."""
    found: list[LogitsProcessor] = []
    if sampling.temperature not in (0, 1):
        found.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    return found


class _Draw(LogitsProcessor):
    """Turns scores into the drawn token: inverse-CDF sampling with a random stream of its own for every request.

    What a request draws does not depend on its neighbours, on its place in the batch, or on the global random state,
    which is not touched.
    """

    def __init__(self, sampling: Sampling, rows: Sequence[int]) -> None:
        requests = [(i, j) for i in rows for j in range(sampling.samples_per_prompt)]
        streams = [torch.Generator().manual_seed(request_seed(sampling.seed, i, j)) for i, j in requests]
        shape = sampling.max_new_tokens
        self.uniform_BL = torch.stack([torch.rand(shape, generator=g, dtype=torch.float64) for g in streams])
        self.greedy, self.step = sampling.temperature == 0, 0
        self.drawn_lp: list[Tensor] = []  # [B] of every step

    def to(self, device: torch.device) -> _Draw:
        self.uniform_BL = self.uniform_BL.to(device)
        return self

    def logprobs(self) -> list[list[float]]:
        """Of every token drawn, [B, steps]."""
        return torch.stack(self.drawn_lp, 1).tolist()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        if self.greedy:
            best_B = scores.argmax(-1, keepdim=True)
            self.drawn_lp.append((scores.gather(-1, best_B) - scores.logsumexp(-1, keepdim=True)).squeeze(-1).float())
            return scores
        # float64: over 150k columns a float32 running sum loses the tail.
        probabilities_BV = scores.double().softmax(-1)
        cdf_BV = probabilities_BV.cumsum(-1)
        threshold_B1 = self.uniform_BL[:, self.step, None] * cdf_BV[:, -1:]
        self.step += 1
        drawn_B1 = torch.searchsorted(cdf_BV, threshold_B1, right=True).clamp(max=scores.shape[-1] - 1)
        self.drawn_lp.append(probabilities_BV.gather(-1, drawn_B1).log().squeeze(-1).float())
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn_B1, 0.0)


def _finite(ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
    """Refuses to sample from weights that have exploded, with a word on why, before torch's assertion does."""
    if not bool(scores_BV.amax(-1).isfinite().all()):
        raise UserError(
            "the model's logits are not finite; it cannot be sampled from. "
            "Fix: lower train.learning_rate, then --resume."
        )
    return scores_BV
