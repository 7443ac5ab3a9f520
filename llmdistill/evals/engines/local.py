"""Engines in this process: vLLM, and transformers where vLLM is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from llmdistill.evals.engines.base import Asked, batches
from llmdistill.evals.records import Sample
from llmdistill.models.generation import generate
from llmdistill.models.vllm_engine import InProcessVLLM
from llmdistill.models.vllm_requests import generation_params
from llmdistill.texts.rollout import Prompt, Sampling
from llmdistill.tokenization.special import eos_ids, pad_id

IN_FLIGHT = 512  # requests handed to vLLM at one time: more than it runs, so that its queue is never empty
LOOK_EVERY = 16  # tokens between two looks for a stop string


class VLLMSampler:
    """vLLM in this process, fed as it goes: a sample is there as soon as it is finished.

    Args:
        engine: with the weights that are evaluated; closed with this where it was loaded for it.
        tokenizer: the model's.
        eos_ids: every id that ends a completion.
    """

    def __init__(self, engine: InProcessVLLM, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> None:
        self.engine, self.tokenizer, self.eos_ids, self._owned = engine, tokenizer, tuple(eos_ids), False

    @classmethod
    def load(
        cls,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: str,
        max_model_len: int,
        kv_cache_gib: float,
        gpu_memory_utilization: float,
        **options: Any,
    ) -> VLLMSampler:
        """An engine of its own.

        Args:
            model: folder or hub name.
            max_model_len: longest prompt and completion together.
            options: of :class:`~llmdistill.models.vllm_engine.InProcessVLLM`.

        Raises:
            UserError: vLLM is missing or refuses the model.
        """
        engine = InProcessVLLM(
            model,
            "evaluation",
            dtype=dtype,
            longest=max_model_len,
            kv_cache_gib=kv_cache_gib,
            gpu_memory_utilization=gpu_memory_utilization,
            **options,
        )
        made = cls(engine, tokenizer, checkpoint_eos_ids(model, tokenizer))
        made._owned = True
        return made

    def draw(self, asked: Sequence[Asked], sampling: Sampling, stop: Sequence[str]) -> Iterator[Sample]:
        by_id = {f"{one.problem}#{one.index}": one for one in asked}
        assert len(by_id) == len(asked)
        requests = (
            (name, list(one.ids), self._params(replace(sampling, max_new_tokens=one.room), one.seed, bool(stop)))
            for name, one in by_id.items()
        )
        stopped = self._has_stop(stop) if stop else None
        for name, output in self.engine.stream(requests, IN_FLIGHT, stopped):
            ids = list(output.token_ids)
            text = decoded(self.tokenizer, ids)
            yield by_id[name].sample(text, len(ids), output.finish_reason or "stop", stop)

    def close(self) -> None:
        if self._owned:
            self.engine.close()

    def _params(self, sampling: Sampling, seed: int, watched: bool) -> Any:
        from vllm.sampling_params import RequestOutputKind

        params = generation_params(sampling, seed, self.eos_ids)
        params.logprobs = None
        if watched:
            params.output_kind = RequestOutputKind.CUMULATIVE
        return params

    def _has_stop(self, stop: Sequence[str]) -> Callable[[Sequence[int]], bool]:
        """Whether ids end in a text with a stop string; looked at now and then, since decoding costs."""
        longest = max(map(len, stop)) + LOOK_EVERY

        def look(ids: Sequence[int]) -> bool:
            if len(ids) % LOOK_EVERY:
                return False
            text = decoded(self.tokenizer, ids[-2 * longest :])
            return any(word in text for word in stop)

        return look


class HFEngine:
    """transformers' ``generate``, batch by batch, longest prompts first (what does not fit fails at once).

    A stop string cuts the text, not the work: every sample is written to its eos or its limit.

    Args:
        model: the model, or one that a trainer holds.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 16,
    ) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.eos_ids, self.pad_id = eos_ids(model, tokenizer), pad_id(tokenizer)

    def draw(self, asked: Sequence[Asked], sampling: Sampling, stop: Sequence[str]) -> Iterator[Sample]:
        for batch in batches(asked, self.batch_size):
            yield from self._batch(batch, sampling, stop)

    def _batch(self, batch: Sequence[Asked], sampling: Sampling, stop: Sequence[str]) -> Iterator[Sample]:
        drawn = generate(
            self.model,  # type: ignore[arg-type]
            [Prompt(list(one.ids), one.text) for one in batch],
            replace(sampling, max_new_tokens=batch[0].room, samples_per_prompt=1, seed=0),
            eos_ids=self.eos_ids,
            pad_id=self.pad_id,
            rows=[one.seed for one in batch],
        )
        for one, ids, mask, finish in zip(batch, drawn.input_ids, drawn.completion_mask, drawn.finish, strict=True):
            completion = ids[mask].tolist()
            yield one.sample(decoded(self.tokenizer, completion), len(completion), finish, stop)

    def close(self) -> None:
        pass


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of a completion. Thinking tags are ordinary tokens in the tokenizers that have them, so they stay."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def checkpoint_eos_ids(model: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a generation, read without loading the model."""
    try:
        config = GenerationConfig.from_pretrained(model)
    except OSError:  # a checkpoint need not have one
        config = None
    return eos_ids(SimpleNamespace(generation_config=config), tokenizer)
