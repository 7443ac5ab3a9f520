"""A teacher in a vLLM engine: top-k evidence and generation at speed.

On a CPU the embedded teacher (``teacher.engine: hf``) is the faster scorer; this one pays on a GPU and for generating.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from llmdistill.errors import UserError
from llmdistill.models.loading import adapter_base
from llmdistill.models.missing import why_not_loaded
from llmdistill.models.vllm_engine import InProcessVLLM
from llmdistill.models.vllm_requests import scored_rows, scoring_params
from llmdistill.recipe.config import TeacherConfig
from llmdistill.teachers.base import TeacherInfo
from llmdistill.teachers.fingerprint import template_hash, tokenizer_fingerprint, weights_fingerprint
from llmdistill.texts import Prompt, Rollout, Sampling, span
from llmdistill.tokenization.special import context_length, eos_ids, pad_id
from llmdistill.wire.blocks import BlockHeader, ScoreBlock
from llmdistill.wire.listing import columns, support_of


class VLLMTeacher:
    """Implements :class:`~llmdistill.teachers.base.Teacher`. Log-probs are float32, of the full softmax.

    In bfloat16 they differ from the float32 model's by 0.05 on average and by 1 at most where both are unlikely.

    Args:
        model_path: folder or hub name of a model, no adapter.
        revision: of a hub model; empty: its main branch.
        tokenizer: folder or hub name of its tokenizer; empty: the model's.
        dtype: of the engine's weights; "auto" is the checkpoint's.
        max_top_k: largest ``top_k`` that :meth:`score` will be asked for; None: the whole vocabulary.
        max_model_len: longest sequence; None: the model's context length.
        kv_cache_gib: key-value cache on CPU; on a GPU ``gpu_memory_utilization`` is the share of memory for everything.
        options: further arguments of ``vllm.LLM``.

    Raises:
        UserError: vLLM or the model cannot be loaded.
    """

    def __init__(
        self,
        model_path: str,
        *,
        dtype: str = "bfloat16",
        max_top_k: int | None = None,
        max_model_len: int | None = None,
        kv_cache_gib: float = 0.5,
        gpu_memory_utilization: float = 0.5,
        trust_remote_code: bool = False,
        revision: str = "",
        tokenizer: str = "",
        **options: Any,
    ) -> None:
        self._info, self.tokenizer = describe(model_path, trust_remote_code, revision=revision, tokenizer=tokenizer)
        self.max_top_k = min(max_top_k or self._info.vocab_size, self._info.vocab_size)
        self.max_model_len = max_model_len or self._info.context_length
        self.engine = InProcessVLLM(
            model_path,
            "teacher",
            dtype=dtype,
            longest=self.max_model_len,
            max_logprobs=-1 if self.max_top_k == self._info.vocab_size else self.max_top_k,
            kv_cache_gib=kv_cache_gib,
            gpu_memory_utilization=gpu_memory_utilization,
            trust_remote_code=trust_remote_code,
            **(options | ({"revision": revision} if revision else {})),
        )

    @classmethod
    def load(cls, config: TeacherConfig, max_model_len: int, max_top_k: int | None = None) -> VLLMTeacher:
        """The teacher a recipe names."""
        if not config.model:
            raise UserError("teacher.model is empty; it must be a folder or a hub name. Fix: --teacher.model PATH.")
        return cls(
            config.model,
            dtype=config.dtype,
            max_model_len=max_model_len,
            max_top_k=max_top_k,
            trust_remote_code=config.trust_remote_code,
            revision=config.revision,
            tokenizer=config.tokenizer,
        )

    def score(self, rollout: Rollout, top_k: int, chosen: Tensor | None = None) -> list[ScoreBlock]:
        """One block per sequence. ``top_k`` 0 gives token log-probs only, the vocabulary size all of them.

        Raises:
            UserError: ``top_k`` or the number of ``chosen`` ids above ``max_top_k``, or a sequence longer than
                ``max_model_len``.
        """
        vocab = self._info.vocab_size
        if top_k > vocab:
            raise UserError(f"objective.top_k is {top_k}; the teacher has {vocab} logit columns. Fix: at most {vocab}.")
        wide = max(top_k, 0 if chosen is None else chosen.shape[1])
        if wide > self.max_top_k:
            raise UserError(
                f"objective.top_k is {wide}; this vLLM teacher was loaded for at most {self.max_top_k}. "
                f"Fix: load it with a larger max_top_k, or set teacher.engine to 'hf'."
            )
        sequences = [ids[real].tolist() for ids, real in zip(rollout.input_ids, rollout.attention_mask, strict=True)]
        longest = max(map(len, sequences), default=0)
        if longest > self.max_model_len:
            raise UserError(
                f"a sequence has {longest} tokens; the vLLM teacher holds {self.max_model_len}. "
                f"Fix: lower data.max_prompt_tokens or rollouts.max_new_tokens."
            )
        places = [_places(*masks) for masks in zip(rollout.completion_mask, rollout.attention_mask, strict=True)]
        ids = [None] * len(rollout) if chosen is None else chosen.split(rollout.row_counts)
        params = [
            scoring_params(len(sequence), at, top_k, vocab, mine)
            for sequence, at, mine in zip(sequences, places, ids, strict=True)
        ]
        outputs = self.engine.score(sequences, params)
        width = columns(top_k, chosen, vocab)
        header = BlockHeader(
            self._info.fingerprint, self._info.tokenizer, width, vocab, support=support_of(top_k, chosen)
        )
        return [
            ScoreBlock(span(mask), *scored_rows(output, at, top_k, vocab, mine), header)
            for output, at, mine, mask in zip(outputs, places, ids, rollout.completion_mask, strict=True)
        ]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        return self.engine.rollout(
            prompts, sampling, self._info.eos_ids, pad_id(self.tokenizer), tokenizer=self.tokenizer
        )

    def info(self) -> TeacherInfo:
        return self._info

    def close(self) -> None:
        self.engine.close()


def describe(
    model_path: str, trust_remote_code: bool = False, *, revision: str = "", tokenizer: str = ""
) -> tuple[TeacherInfo, PreTrainedTokenizerBase]:
    """What is known of a model without loading its weights, and its tokenizer.

    Raises:
        UserError: nothing loadable there, or an adapter, which an engine that loads for itself cannot merge.
    """
    if base := adapter_base(model_path, "teacher", revision):
        raise UserError(
            f"teacher.model {model_path!r} is an adapter of {base!r}, and a vLLM engine loads whole models. "
            "Fix: teacher.engine hf, which merges it, or the merged model."
        )
    hub: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or None}
    try:
        config = AutoConfig.from_pretrained(model_path, **hub)
        found = AutoTokenizer.from_pretrained(tokenizer or model_path, **({} if tokenizer else hub))
    except (OSError, ValueError) as error:
        reason = why_not_loaded(model_path, error)
        raise UserError(f"teacher.model {model_path!r} cannot be loaded: {reason}") from error
    try:
        generation = GenerationConfig.from_pretrained(model_path, revision=revision or "main")
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    info = TeacherInfo(
        name=model_path,
        fingerprint=weights_fingerprint(model_path, revision),
        tokenizer=tokenizer_fingerprint(found),
        vocab_size=config.get_text_config().vocab_size,
        eos_ids=eos_ids(SimpleNamespace(generation_config=generation), found),
        context_length=context_length(config),
        template=template_hash(found),
    )
    return info, found


def _places(counted_T: Tensor, real_T: Tensor) -> np.ndarray:
    """Where the counted tokens stand among the real ones; the first has nothing before it."""
    return ((counted_T & (real_T.cumsum(0) > 1))[real_T]).nonzero().flatten().cpu().numpy()
