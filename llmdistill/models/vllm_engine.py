"""vLLM in this process, for whoever needs it: a teacher, the student's rollouts, an evaluation.

What these roles have in common is here once: loading with what each needs, requests whose draws depend on nothing but
their seed, pushes that leave no old prefix behind, and the end. The service's engine runs in processes of its own
(:mod:`llmdistill.service.vllm_engine`); both ask with the parameters of :mod:`llmdistill.models.vllm_requests`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from llmdistill.compat.patching import random_state_kept
from llmdistill.compat.vllm import close_vllm, completions, load_vllm
from llmdistill.compat.vllm_weights import forget_prefixes, push_weights, takes_partial_push
from llmdistill.errors import UserError
from llmdistill.models.vllm_requests import Drawn, drawn, generation_params
from llmdistill.models.weights import named_weights
from llmdistill.texts import request_seed
from llmdistill.texts.rollout import Prompt, Rollout, Sampling, collate
from llmdistill.texts.stops import stop_strings

Role = Literal["teacher", "rollouts", "evaluation"]

# Of the tokens generated: log-probs of the distribution they are drawn from, at its temperature and after top-p and
# top-k. Those of prompts, which a teacher scores, are never processed.
_DRAWN_FROM = {"logprobs_mode": "processed_logprobs"}
_NEEDS: dict[Role, dict[str, Any]] = {
    "teacher": _DRAWN_FROM,
    "rollouts": {**_DRAWN_FROM, "updatable": True},
    "evaluation": {},  # texts are all that is asked of it
}


class InProcessVLLM:
    """A vLLM engine in this process, token in, token out.

    Args:
        model_path: folder or hub name.
        role: what it is loaded for.
        dtype: of the weights; "auto" is the checkpoint's.
        longest: prompt and completion together, or the sequence that is scored.
        kv_cache_gib: key-value cache on CPU; on a GPU ``gpu_memory_utilization`` is the share of memory for everything.
        options: further arguments of :func:`llmdistill.compat.vllm.load_vllm`.

    Raises:
        UserError: vLLM is missing or refuses the model.
    """

    def __init__(
        self,
        model_path: str,
        role: Role,
        *,
        dtype: str,
        longest: int,
        kv_cache_gib: float,
        gpu_memory_utilization: float,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.longest = longest
        self.pushed = False  # the student's weights, all of them
        spare = 1 if role == "teacher" else 0  # vLLM insists on generating a token after what it scores
        self.llm = load_vllm(
            model_path,
            dtype=dtype,
            seed=seed,
            max_model_len=longest + spare,
            kv_cache_bytes=int(kv_cache_gib * (1 << 30)),
            gpu_memory_utilization=gpu_memory_utilization,
            **_NEEDS[role],
            **options,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights as they are computed with."""
        return self.llm.llm_engine.model_config.dtype  # type: ignore[no-any-return]

    def score(self, sequences: Sequence[list[int]], params: Sequence[Any]) -> list[Any]:
        """vLLM's outputs of sequences with prompt log-probs, in their order."""
        with random_state_kept():
            return self.llm.generate(  # type: ignore[no-any-return]
                [{"prompt_token_ids": ids} for ids in sequences], list(params), use_tqdm=False
            )

    def complete(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        eos_ids: Sequence[int],
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_tokens: int = 0,
    ) -> list[Drawn]:
        """A completion of every prompt and sample, samples of one prompt adjacent.

        Every sample is a request with a seed of its own, so what it draws does not depend on its company, up to
        rounding (a batch of another size adds in another order).

        Args:
            tokenizer: of the model, for stop strings.
            batch_tokens: only so many requests are in the engine at one time that each could be as long as the longest
                may become; 0: the engine takes all, and runs as many as its cache of keys and values holds.

        Raises:
            UserError: a prompt leaves no room for ``max_new_tokens``, or stop strings without a tokenizer.
        """
        longest = max((len(p.ids) for p in prompts), default=0) + sampling.max_new_tokens
        if longest > self.longest:
            raise UserError(
                f"rollouts.max_new_tokens is {sampling.max_new_tokens}; the longest prompt makes that {longest} "
                f"tokens, the vLLM engine holds {self.longest}. Fix: lower it or data.max_prompt_tokens, or raise "
                "max_model_len."
            )
        forget_prefixes(self.llm)  # they would change the rounding, and a resumed run has not got them
        stops = stop_strings(tokenizer, sampling.stop)
        requests = [
            (list(prompt.ids), generation_params(sampling, request_seed(sampling.seed, i, j), eos_ids))
            for i, prompt in enumerate(prompts)
            for j in sampling.numbers
        ]
        if stops is None and not batch_tokens:
            with random_state_kept():  # the CPU sampler draws from the global state even for requests with a seed
                outputs = self.llm.generate(
                    [{"prompt_token_ids": ids} for ids, _ in requests], [s for _, s in requests], use_tqdm=False
                )
            return [drawn(o.outputs[0]) for o in outputs]
        ends = None if stops is None else stops.ends
        at_once = max(batch_tokens // longest, 1) if batch_tokens else len(requests)
        named = ((str(i), *request) for i, request in enumerate(requests))
        found = {name: drawn(o, stops) for name, o in self.stream(named, at_once, ends)}
        return [found[str(i)] for i in range(len(requests))]

    def rollout(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        eos_ids: Sequence[int],
        pad_id: int,
        policy_version: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_tokens: int = 0,
    ) -> Rollout:
        """What :meth:`complete` draws, with the log-probs of the sampled tokens.

        Raises:
            UserError: as :meth:`complete`.
        """
        outputs = self.complete(prompts, sampling, eos_ids, tokenizer, batch_tokens)
        n = sampling.samples_per_prompt
        return collate(
            [p.ids for p in prompts for _ in range(n)],
            [o.ids for o in outputs],
            pad_id=pad_id,
            behavior_logprobs=[o.logprobs for o in outputs],
            finish=[o.finish for o in outputs],
            domain=[p.domain for p in prompts for _ in range(n)],
            policy_version=policy_version,
        )

    def stream(
        self,
        requests: Iterable[tuple[str, list[int], Any]],
        in_flight: int,
        stopped: Callable[[list[int]], bool] | None = None,
    ) -> Iterator[tuple[str, Any]]:
        """As :func:`llmdistill.compat.vllm.completions`: each request as it is finished."""
        return completions(self.llm, requests, in_flight, stopped)

    def push(self, model: nn.Module) -> None:
        """Has it sample from the weights of ``model``. After the first time, where the engine can, only those that are
        trained are pushed.

        ``model`` is always the same student, as a trainer holds it: adapters and sharding are handled.

        Raises:
            RuntimeError: weights are missing, or vLLM does not let go of what it cached of the old ones.
        """
        partial = self.pushed and takes_partial_push(self.llm)
        push_weights(self.llm, named_weights(model, trainable_only=partial), partial=partial)
        self.pushed = True

    def close(self) -> None:
        """Closing twice is harmless."""
        close_vllm(self.llm)
