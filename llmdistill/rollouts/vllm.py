"""Sampling with vLLM inside the training process: faster than ``generate``, fed with the student's weights."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from llmdistill.compat.patching import random_state_kept
from llmdistill.compat.vllm import close_vllm, load_vllm
from llmdistill.compat.vllm_weights import forget_prefixes, push_weights, takes_partial_push
from llmdistill.errors import UserError
from llmdistill.models.vllm_requests import generation_params
from llmdistill.models.weights import base_model, named_weights
from llmdistill.rollouts.probe import check_engine
from llmdistill.texts import request_seed
from llmdistill.texts.rollout import Finish, Prompt, Rollout, Sampling, collate


class VLLMRollouts:
    """A vLLM copy of the student. Implements :class:`~llmdistill.rollouts.engine.RolloutEngine`.

    Args:
        student: the student's checkpoint (folder or hub name), or the model itself, of which only the configuration is
            read: its weights come with the first :meth:`sync`.
        eos_ids, pad_id: every id that ends a completion, and the padding id.
        dtype: of the engine's weights; "auto" is the checkpoint's. In bfloat16 the engine's log-probs differ from a
            float32 student's by 0.05 on average, which ``behavior_logprobs`` shows.
        max_model_len: longest prompt and completion together.
        kv_cache_gib: key-value cache on CPU; on a GPU ``gpu_memory_utilization`` is the share of memory for everything.
        seed: of the engine itself; requests carry their own seeds.

    Raises:
        UserError: vLLM is missing or refuses the model.
    """

    def __init__(
        self,
        student: str | nn.Module,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        dtype: str = "bfloat16",
        max_model_len: int = 2048,
        kv_cache_gib: float = 0.5,
        gpu_memory_utilization: float = 0.3,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.eos_ids, self.pad_id, self.max_model_len = tuple(eos_ids), pad_id, max_model_len
        self.policy_version = 0
        self._has_weights = isinstance(student, str)
        self._was_pushed = False
        settings = dict(
            seed=seed,
            max_model_len=max_model_len,
            logprobs_mode="processed_logprobs",  # of the distribution sampled from: at its temperature, after top-p/k
            kv_cache_bytes=int(kv_cache_gib * (1 << 30)),
            gpu_memory_utilization=gpu_memory_utilization,
            updatable=True,
            **options,
        )
        if isinstance(student, str):
            self.llm = load_vllm(student, dtype=dtype, **settings)  # type: ignore[arg-type]
        else:
            with tempfile.TemporaryDirectory() as folder:
                config = copy.deepcopy(base_model(student).config)
                config.architectures = [type(base_model(student)).__name__]  # vLLM goes by it; one made here has none
                config.save_pretrained(folder)
                self.llm = load_vllm(folder, dtype=dtype, load_format="dummy", **settings)  # type: ignore[arg-type]

    def sync(self, model: nn.Module, policy_version: int) -> None:
        """Pushes the weights of ``model``; after the first time, where the engine can, only those that are trained.

        ``model`` is always the same student, as the trainer holds it: adapters and sharding are handled.

        Raises:
            UserError: after the first push the engine's log-probs are not the student's.
        """
        partial = self._was_pushed and takes_partial_push(self.llm)
        push_weights(self.llm, named_weights(model, trainable_only=partial), partial=partial)
        first = not self._was_pushed
        self.policy_version, self._was_pushed, self._has_weights = policy_version, True, True
        if first:
            check_engine(self, model, float32=self.llm.llm_engine.model_config.dtype == torch.float32)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        """Completions with the eos that ended them. ``behavior_logprobs`` are those of the distribution sampled from:
        softmax(logits / temperature) after top-p and top-k filtering; of softmax(logits) when greedy.

        Every sample is a request with a seed of its own, so what it draws does not depend on its company, up to
        rounding (a batch of another size adds in another order).

        Raises:
            UserError: a prompt leaves no room for ``max_new_tokens``.
        """
        assert self._has_weights, "sync() comes before generate()"
        outputs = complete(self.llm, prompts, sampling, self.eos_ids, self.max_model_len)
        return to_rollout(prompts, sampling, outputs, self.pad_id, self.policy_version)

    def close(self) -> None:
        close_vllm(self.llm)


def complete(
    llm: Any, prompts: Sequence[Prompt], sampling: Sampling, eos_ids: Sequence[int], max_model_len: int
) -> list[Any]:
    """vLLM's ``CompletionOutput`` of every prompt and sample, samples of one prompt adjacent."""
    longest = max((len(p.ids) for p in prompts), default=0) + sampling.max_new_tokens
    if longest > max_model_len:
        raise UserError(
            f"rollouts.max_new_tokens is {sampling.max_new_tokens}; the longest prompt makes that {longest} tokens, "
            f"the vLLM engine holds {max_model_len}. Fix: lower it or data.max_prompt_tokens, or raise max_model_len."
        )
    forget_prefixes(llm)  # what earlier calls left would change the rounding, and a resumed run has not got it
    requests = [
        (
            {"prompt_token_ids": list(prompt.ids)},
            generation_params(sampling, request_seed(sampling.seed, i, j), eos_ids),
        )
        for i, prompt in enumerate(prompts)
        for j in range(sampling.samples_per_prompt)
    ]
    with random_state_kept():  # the CPU sampler draws from the global state even for requests with a seed
        outputs = llm.generate([p for p, _ in requests], [s for _, s in requests], use_tqdm=False)
    return [o.outputs[0] for o in outputs]


def to_rollout(
    prompts: Sequence[Prompt], sampling: Sampling, outputs: Sequence[Any], pad_id: int, policy_version: int = 0
) -> Rollout:
    """What :func:`complete` returned, with the log-probs of the sampled tokens."""
    n = sampling.samples_per_prompt
    finish: list[Finish] = ["stop" if o.finish_reason == "stop" else "length" for o in outputs]
    return collate(
        [p.ids for p in prompts for _ in range(n)],
        [o.token_ids for o in outputs],
        pad_id=pad_id,
        behavior_logprobs=[o.logprobs.logprobs for o in outputs],
        finish=finish,
        domain=[p.domain for p in prompts for _ in range(n)],
        policy_version=policy_version,
    )
