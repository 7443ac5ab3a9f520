"""Score blocks: what a teacher says about one sequence (DESIGN idea 4: the wire format is the disk format)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

FORMAT_VERSION = 1


@dataclass(frozen=True)
class BlockHeader:
    """Who scored, with which vocabulary, and how the numbers are to be read."""

    teacher: str  # fingerprint of the teacher's weights
    tokenizer: str  # fingerprint of its vocabulary
    top_k: int
    vocab_size: int
    dtype: str = "float32"
    temperature: float = 1.0  # temperature of every log-prob in the block
    version: int = FORMAT_VERSION


@dataclass(frozen=True)
class ScoreBlock:
    """One sequence's teacher evidence. n counted tokens, K listed candidates.

    The tail mass ``1 - sum(exp(topk_logprobs))`` is never stored: it is always derivable.
    """

    positions: slice  # which tokens of the sequence
    token_logprobs: Tensor  # [n] float32, log p_T(token at t | before t)
    topk_ids: Tensor  # [n, K] int32, sorted by log-prob, descending
    topk_logprobs: Tensor  # [n, K] float32, log-softmax over the FULL vocabulary
    header: BlockHeader
