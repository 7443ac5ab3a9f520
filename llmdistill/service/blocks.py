"""Score blocks: what a teacher says about one sequence (DESIGN idea 4: the wire format is the disk format)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

FORMAT_VERSION = 1

Support = Literal["teacher", "caller", "union"]


@dataclass(frozen=True)
class BlockHeader:
    """Who scored, with which vocabulary, and how the numbers are to be read."""

    teacher: str  # fingerprint of the teacher's weights
    tokenizer: str  # fingerprint of its vocabulary
    top_k: int  # columns of the block, K
    vocab_size: int
    dtype: str = "float32"  # of the listed log-probs as encoded: "float16" or "float32"
    temperature: float = 1.0  # temperature of every log-prob in the block
    support: Support = "teacher"  # who chose the listed tokens; "union": the teacher's top-k and the caller's
    version: int = FORMAT_VERSION


@dataclass(frozen=True)
class ScoreBlock:
    """One sequence's teacher evidence. n counted tokens, K listed candidates.

    The tail mass ``1 - sum(exp(topk_logprobs))`` is never stored: it is always derivable. The listed ids of a row are
    distinct; a row with fewer than K of them is padded at its end with id -1 and log-prob -inf.
    """

    positions: slice  # first to last counted token of the sequence; n is smaller where tokens between do not count
    token_logprobs: Tensor  # [n] float32, log p_T(token at t | before t)
    topk_ids: Tensor  # [n, K] int32, sorted by log-prob, descending
    topk_logprobs: Tensor  # [n, K] float32, log-softmax over the FULL vocabulary
    header: BlockHeader
