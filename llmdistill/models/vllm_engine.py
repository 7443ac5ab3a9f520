"""vLLM in this process, for whoever needs it: a teacher, the student's rollouts, an evaluation.

What these roles have in common is here once: loading with what each needs, requests whose draws depend on nothing but
their seed, pushes that leave no old prefix behind, and the end. The service's engine runs in processes of its own
(:mod:`llmdistill.service.vllm_engine`); both ask with the parameters of :mod:`llmdistill.models.vllm_requests`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from llmdistill.compat.patching import random_state_kept
from llmdistill.compat.vllm import close_vllm, completions, load_vllm
from llmdistill.compat.vllm_adapters import adapter_options, put_adapter
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


class EngineGroup(Protocol):
    """Processes that hold one engine together: :class:`llmdistill.rollouts.tensor_parallel.RanksOfAnEngine`."""

    size: int

    def asked(
        self, prompts: list[list[int]], sampling: Sampling
    ) -> tuple[list[tuple[list[list[int]], Sampling]], int]: ...


class InProcessVLLM:
    """A vLLM engine in this process, token in, token out.

    Args:
        model_path: folder or hub name.
        role: what it is loaded for.
        dtype: of the weights; "auto" is the checkpoint's.
        longest: prompt and completion together, or the sequence that is scored.
        kv_cache_gib: key-value cache on CPU; on a GPU ``gpu_memory_utilization`` is the share of memory for everything.
        adapter_rank: the highest of what :meth:`put_adapter` will bring; 0: nothing.
        sleeps: it sleeps until it is asked for something, and again afterwards.
        tensor_parallel: of several processes that hold one engine together, each a part of every layer: takes what this
            one asks for, and returns what each of them does, and which of it is this one's.
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
        adapter_rank: int = 0,
        sleeps: bool = False,
        tensor_parallel: EngineGroup | None = None,
        **options: Any,
    ) -> None:
        self.longest, self.sleeps, self.group = longest, sleeps, tensor_parallel
        self.pushed = False  # the student's weights, all of them, or its adapter
        if tensor_parallel is not None:
            options["tensor_parallel_size"] = tensor_parallel.size
        if adapter_rank:
            options |= adapter_options(adapter_rank)
        spare = 1 if role == "teacher" else 0  # vLLM insists on generating a token after what it scores
        self.llm = load_vllm(
            model_path,
            dtype=dtype,
            seed=seed,
            max_model_len=longest + spare,
            kv_cache_bytes=int(kv_cache_gib * (1 << 30)),
            gpu_memory_utilization=gpu_memory_utilization,
            sleeps=sleeps,
            **_NEEDS[role],
            **options,
        )
        self._asleep, self._adapter = set[str](), None
        self.sleep()

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
        asked = [([list(p.ids) for p in prompts], sampling)]
        mine = 0
        if self.group is not None:
            asked, mine = self.group.asked(*asked[0])
        longest = max((len(ids) for prompts, _ in asked for ids in prompts), default=0) + sampling.max_new_tokens
        if longest > self.longest:
            raise UserError(
                f"rollouts.max_new_tokens is {sampling.max_new_tokens}; the longest prompt makes that {longest} "
                f"tokens, the vLLM engine holds {self.longest}. Fix: lower it or data.max_prompt_tokens, or raise "
                "max_model_len."
            )
        requests = [
            [
                (ids, generation_params(drawing, request_seed(drawing.seed, i, j), eos_ids))
                for i, ids in enumerate(prompts_of_one)
                for j in drawing.numbers
            ]
            for prompts_of_one, drawing in asked
        ]
        start = sum(map(len, requests[:mine]))
        with self._awake():
            found = self._complete(
                [r for of_one in requests for r in of_one], sampling, tokenizer, batch_tokens, longest
            )
        return found[start : start + len(requests[mine])]

    def _complete(
        self,
        requests: Sequence[tuple[list[int], Any]],
        sampling: Sampling,
        tokenizer: PreTrainedTokenizerBase | None,
        batch_tokens: int,
        longest: int,
    ) -> list[Drawn]:
        forget_prefixes(self.llm)  # they would change the rounding, and a resumed run has not got them
        stops = stop_strings(tokenizer, sampling.stop)
        if stops is None and not batch_tokens:
            with random_state_kept():  # the CPU sampler draws from the global state even for requests with a seed
                outputs = self.llm.generate(
                    [{"prompt_token_ids": ids} for ids, _ in requests],
                    [s for _, s in requests],
                    use_tqdm=False,
                    lora_request=self._adapter,
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
        return completions(self.llm, requests, in_flight, stopped, self._adapter)

    def push(self, model: nn.Module) -> None:
        """Has it sample from the weights of ``model``. After the first time, where the engine can, only those that are
        trained are pushed.

        ``model`` is always the same student, as a trainer holds it: adapters and sharding are handled.

        Raises:
            RuntimeError: weights are missing, or vLLM does not let go of what it cached of the old ones.
        """
        self.wake("weights")
        partial = self.pushed and takes_partial_push(self.llm)
        push_weights(self.llm, named_weights(model, trainable_only=partial), partial=partial)
        self.pushed = True

    def put_adapter(self, folder: Path) -> None:
        """Has it sample with the LoRA in a folder, in place of the one before. It was loaded with ``adapter_rank``.

        Raises:
            UserError: vLLM does not run it.
        """
        self.wake("weights")
        try:
            self._adapter = put_adapter(self.llm, folder)
        except (ValueError, RuntimeError) as error:
            reason = next(iter(str(error).strip().splitlines()), "")
            raise UserError(f"vLLM does not run the student's adapter: {reason} Fix: rollouts.lora merged.") from error
        self.pushed = True

    def sleep(self) -> None:
        """Of an engine that sleeps: its cache is given up, and its weights wait in the host's memory."""
        if self.sleeps:
            self.llm.sleep(level=1)
            self._asleep = {"weights", "kv_cache"}

    def wake(self, *parts: str) -> None:
        """Brings back its weights, its cache, or both: what of them sleeps."""
        parts = tuple(part for part in parts or ("weights", "kv_cache") if part in self._asleep)
        if parts:
            self.llm.wake_up(tags=list(parts))
            self._asleep -= set(parts)

    @contextmanager
    def _awake(self) -> Iterator[None]:
        self.wake()
        try:
            yield
        finally:
            self.sleep()

    def close(self) -> None:
        """Closing twice is harmless."""
        close_vllm(self.llm)
