"""Sampling with vLLM in this process, the student's weights pushed in before each round."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from llmdistill.compat import close_vllm, load_vllm, named_weights, push_weights, random_state_kept
from llmdistill.rollouts.engine import request_seed
from llmdistill.rollouts.rollout import Finish, Prompt, Rollout, Sampling, collate


class VLLMRollouts:
    """A vLLM copy of the student.

    Args:
        model: the student; vLLM reads its architecture from it. Only its configuration is written to disk, the
            weights come by :meth:`sync`.
        eos_ids, pad_id: of the student's tokenizer.
        dtype: of the copy.
        max_model_len: longest prompt + completion.
        kv_cache_gib, gpu_memory_utilization: memory on CPU and on GPU.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        dtype: str = "bfloat16",
        max_model_len: int,
        kv_cache_gib: float = 0.5,
        gpu_memory_utilization: float = 0.3,
        seed: int = 0,
    ) -> None:
        self.eos_ids, self.pad_id, self.policy_version = tuple(eos_ids), pad_id, 0
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.max_model_len = max_model_len
        with tempfile.TemporaryDirectory() as folder:
            base.config.save_pretrained(folder)
            self.llm = load_vllm(
                str(Path(folder)),
                dtype=dtype,
                max_model_len=max_model_len,
                seed=seed,
                logprobs_mode="processed_logprobs",  # the behaviour policy's: after temperature, top-p and top-k
                kv_cache_gib=kv_cache_gib,
                gpu_memory_utilization=gpu_memory_utilization,
                prepack=False,
                load_format="dummy",
            )

    def sync(self, model: nn.Module, policy_version: int) -> None:
        """Pushes the weights of ``model`` and drops the prefix cache, which holds keys and values of the old ones."""
        push_weights(self.llm, named_weights(model))
        self.policy_version = policy_version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        """One request per sample, each with a seed of its own: what it draws does not depend on its neighbours."""
        return vllm_generate(self.llm, prompts, sampling, self.eos_ids, self.pad_id, self.policy_version)

    def close(self) -> None:
        close_vllm(self.llm)


def vllm_generate(
    llm: Any,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    eos_ids: Sequence[int],
    pad_id: int,
    policy_version: int = 0,
) -> Rollout:
    """Completions of every prompt (samples of one prompt adjacent), the ending eos included and counted."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    requests, parameters, owners = [], [], []
    for i, prompt in enumerate(prompts):
        for j in range(sampling.samples_per_prompt):
            requests.append(TokensPrompt(prompt_token_ids=prompt.ids))
            owners.append(prompt)
            parameters.append(
                SamplingParams(
                    max_tokens=sampling.max_new_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k or -1,
                    seed=request_seed(sampling.seed, i, j),
                    stop_token_ids=list(eos_ids),
                    logprobs=0,
                    detokenize=False,
                )
            )
    with random_state_kept():
        outputs = llm.generate(requests, parameters, use_tqdm=False)
    completions = [list(o.outputs[0].token_ids) for o in outputs]
    logprobs = [
        [at[token].logprob for token, at in zip(ids, o.outputs[0].logprobs, strict=True)]
        for ids, o in zip(completions, outputs, strict=True)
    ]
    finish: list[Finish] = ["stop" if ids and ids[-1] in eos_ids else "length" for ids in completions]
    return collate(
        [p.ids for p in owners],
        completions,
        pad_id=pad_id,
        behavior_logprobs=logprobs,
        finish=finish,
        domain=[p.domain for p in owners],
        policy_version=policy_version,
    )
