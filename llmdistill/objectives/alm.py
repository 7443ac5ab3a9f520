"""Approximate likelihood matching: chunks of text are as likely under both models, whatever tokens they have (ALM).

Minixhofer et al., arXiv 2503.20083. A chunk is the smallest stretch of text that ends at a token of both sides; its
log-probability is the sum of its tokens'. Numbers here are per chunk, [C], in nats; nothing carries gradient but the
student's.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from llmdistill.objectives.fused import check_temperature, compute_dtype

BinaryDivergence = Literal["binary_kl", "binary_ce", "reverse_binary_kl", "total_variation"]
NORM_EPSILON = 1e-8
EPSILON = 1e-6  # keeps 1 - p above 0 for a chunk that is certain


def binary_divergence(
    student_C: Tensor, teacher_C: Tensor, *, temperature: float = 100.0, divergence: BinaryDivergence = "binary_kl"
) -> Tensor:
    """Divergence of (p, 1 - p) from (q, 1 - q) -> [C], p = exp(teacher / temperature), q = exp(student / temperature).

    The temperature spreads chunks of a few nats over (0, 1): at 100 their probabilities are .9 and more, and the loss
    is nearly that of the log-probabilities (paper, section 3.2). binary_kl: KL(p || q), paper eq. 5 without the
    teacher's entropy, which has no gradient; binary_ce: with it, as the authors' code has it; reverse_binary_kl:
    KL(q || p); total_variation: |p - q|. All but binary_ce are 0 where student and teacher agree.

    Raises ValueError for a temperature <= 0 or another divergence.
    """
    check_temperature(temperature)
    dtype = compute_dtype(student_C)
    log_q = student_C.to(dtype).clamp_max(0.0) / temperature - EPSILON
    log_p = teacher_C.detach().to(dtype).clamp_max(0.0) / temperature - EPSILON
    log_no_q, log_no_p = _log1m(log_q), _log1m(log_p)
    p, no_p = log_p.exp(), log_no_p.exp()
    if divergence == "binary_ce":
        return -(p * log_q + no_p * log_no_q)
    if divergence == "binary_kl":
        return p * (log_p - log_q) + no_p * (log_no_p - log_no_q)
    if divergence == "reverse_binary_kl":
        return log_q.exp() * (log_q - log_p) + log_no_q.exp() * (log_no_q - log_no_p)
    if divergence == "total_variation":
        return (p - log_q.exp()).abs()
    raise ValueError(f"divergence is {divergence!r}; it must be one of {', '.join(get_args(BinaryDivergence))}")


def alm_loss(
    student_chunk_logprobs: Tensor,
    teacher_chunk_logprobs: Tensor,
    *,
    temperature: float = 100.0,
    divergence: BinaryDivergence = "binary_kl",
) -> Tensor:
    """Mean over chunks [C] of `binary_divergence` -> scalar; 0 where there are none."""
    losses_C = binary_divergence(
        student_chunk_logprobs, teacher_chunk_logprobs, temperature=temperature, divergence=divergence
    )
    return losses_C.sum() / max(len(losses_C), 1)


def chunk_credit(student_C: Tensor, teacher_C: Tensor) -> Tensor:
    """-(log T - log S) log S of chunks -> [C], the first factor without gradient: sampled on-policy distillation.

    For chunks of a text that the student wrote its expected gradient is that of the reverse KL of the distributions
    over texts cut there: every token of a chunk gets the whole log T - log S of the chunk (METHODS-2026 9.3.4, 9.3.7).
    """
    advantage_C = (teacher_C - student_C).detach()
    return -advantage_C * student_C


def chunk_sums(values_N: Tensor, chunk_N: Tensor, chunks: int) -> Tensor:
    """Sum of the values of every chunk -> [C]. chunk_N [N] int64 names each row's chunk; -1: it has none."""
    kept_N = chunk_N >= 0
    return values_N.new_zeros(chunks).index_add(0, chunk_N[kept_N], values_N[kept_N])


def merged(boundary_C: Tensor, last_C: Tensor, threshold: float) -> Tensor:
    """Which chunk every chunk becomes a part of -> [C] int64, counted from 0 (paper, section 3.3).

    boundary_C [C]: the teacher's probability that a word could end at a chunk's end; last_C [C] bool: the last chunk of
    its sequence. A chunk that ends where that is not more than the threshold goes on into the next of its sequence.
    """
    closed_C = (boundary_C > threshold) | last_C
    return torch.cat([closed_C.new_zeros(1, dtype=torch.int64), closed_C.long().cumsum(0)[:-1]])[: len(closed_C)]


def inverse_norm_weights(norms: Sequence[float]) -> list[float]:
    """1 / norm of every loss's gradient, over their sum: weights under which all pull alike (GradMag, section 4).

    Of the variants of the authors' code the one that keeps the size: "no aggregation" there averages, so that the loss
    shrinks with the number of terms (METHODS 6.1).
    """
    inverse = [1.0 / (norm + NORM_EPSILON) for norm in norms]
    return [x / sum(inverse) for x in inverse]


def _log1m(log_p: Tensor) -> Tensor:
    """log(1 - exp(log_p)) for log_p < 0, exact at both ends."""
    near = log_p > -math.log(2.0)
    small = torch.where(near, log_p, -1.0)
    large = torch.where(near, -1.0, log_p)
    return torch.where(near, (-torch.expm1(small)).log(), torch.log1p(-large.exp()))
