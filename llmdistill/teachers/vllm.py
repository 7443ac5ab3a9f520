"""A teacher on vLLM in this process: top-k evidence and text at speed.

vLLM's prompt log-probs are the full-vocabulary log-softmax at temperature 1 whatever the sampling temperature, which is
what a score block holds. The whole vocabulary can be asked for too (K = V), slowly: on CPU transformers' forward pass
is the faster exact scorer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from llmdistill.compat import close_vllm, load_vllm, random_state_kept, vllm_model
from llmdistill.config import TeacherConfig
from llmdistill.errors import UserError
from llmdistill.rollouts import Prompt, Rollout, Sampling
from llmdistill.rollouts.vllm import vllm_generate
from llmdistill.service.blocks import BlockHeader, ScoreBlock
from llmdistill.teachers.base import TeacherInfo
from llmdistill.teachers.fingerprint import template_hash, tokenizer_fingerprint, weights_fingerprint
from llmdistill.tokenization.special import context_length, eos_ids, pad_id


class VLLMTeacher:
    """Implements :class:`~llmdistill.teachers.base.Teacher` over an in-process vLLM engine.

    Args:
        path: folder or hub name of the model.
        dtype: of its weights.
        max_model_len: longest sequence to score or generate.
    """

    def __init__(
        self, path: str, *, dtype: str = "bfloat16", max_model_len: int, trust_remote_code: bool = False
    ) -> None:
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise UserError(f"teacher.model {path!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
        self.llm = load_vllm(
            path,
            dtype=dtype,
            # Scoring decodes one token it does not need, and vLLM refuses a prompt that leaves no room for it.
            max_model_len=min(max_model_len + 1, context_length(config)),
            max_logprobs=-1,
            trust_remote_code=trust_remote_code,
        )
        with_generation = type("Configured", (), {"generation_config": _generation_config(path)})
        self._info = TeacherInfo(
            name=path,
            fingerprint=weights_fingerprint(vllm_model(self.llm)),
            tokenizer=tokenizer_fingerprint(self.tokenizer),
            vocab_size=config.get_text_config().vocab_size,
            eos_ids=eos_ids(with_generation, self.tokenizer),
            context_length=context_length(config),
            template=template_hash(self.tokenizer),
        )

    @classmethod
    def load(cls, config: TeacherConfig, max_model_len: int) -> VLLMTeacher:
        """The teacher a recipe names."""
        if not config.model:
            raise UserError("teacher.model is empty; it must be a folder or a hub name. Fix: --teacher.model PATH.")
        return cls(
            config.model, dtype=config.dtype, max_model_len=max_model_len, trust_remote_code=config.trust_remote_code
        )

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        return vllm_generate(self.llm, prompts, sampling, self._info.eos_ids, pad_id(self.tokenizer))

    def score(self, rollout: Rollout, top_k: int) -> list[ScoreBlock]:
        """One block per sequence; ``top_k`` 0 gives token log-probs only, the vocabulary size everything.

        Raises:
            UserError: ``top_k`` above the number of logit columns.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        vocab = self._info.vocab_size
        if top_k > vocab:
            raise UserError(f"objective.top_k is {top_k}; the teacher has {vocab} logit columns. Fix: at most {vocab}.")
        asked = SamplingParams(
            max_tokens=1,
            temperature=0,
            prompt_logprobs=-1 if top_k == vocab else top_k,
            flat_logprobs=True,
            detokenize=False,
        )
        sequences = [ids[real].tolist() for ids, real in zip(rollout.input_ids, rollout.attention_mask, strict=True)]
        requests = [TokensPrompt(prompt_token_ids=ids) for ids in sequences]
        with random_state_kept():
            outputs = self.llm.generate(requests, asked, use_tqdm=False)
        header = BlockHeader(self._info.fingerprint, self._info.tokenizer, top_k, vocab)
        return [
            _block(output.prompt_logprobs, mask[real], int(real.int().argmax()), top_k, header)
            for output, mask, real in zip(outputs, rollout.completion_mask, rollout.attention_mask, strict=True)
        ]

    def info(self) -> TeacherInfo:
        return self._info

    def close(self) -> None:
        close_vllm(self.llm)


def _block(flat: object, counted_T: torch.Tensor, offset: int, top_k: int, header: BlockHeader) -> ScoreBlock:
    """vLLM lists, per position, the prompt's own token first and then the likeliest, descending."""
    starts, ids, logprobs = flat.start_indices, flat.token_ids, flat.logprobs  # type: ignore[attr-defined]
    at = [t for t in counted_T.nonzero().flatten().tolist() if t >= 1]
    token = torch.tensor([logprobs[starts[t]] for t in at], dtype=torch.float32)
    listed = [slice(starts[t] + 1, starts[t] + 1 + top_k) for t in at]
    return ScoreBlock(
        slice(at[0] + offset, at[-1] + 1 + offset) if at else slice(0, 0),
        token,
        torch.tensor([ids[s] for s in listed], dtype=torch.int32).reshape(len(at), top_k),
        torch.tensor([logprobs[s] for s in listed], dtype=torch.float32).reshape(len(at), top_k),
        header,
    )


def _generation_config(path: str) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return None
