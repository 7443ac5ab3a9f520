"""Student and teacher as distributions over K listed tokens and a bucket for all others."""

from typing import Literal, get_args

import torch
from torch import Tensor

Tail = Literal["bucket", "renormalize"]


def student_buckets(
    student_logits: Tensor, topk_ids: Tensor, *, tail: Tail = "bucket", temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probs [..., K+1] (renormalised: [..., K]) and the softmax [..., V] over the unlisted tokens.

    The tail is summed from the unlisted logits, not taken as 1 - listed, so that it keeps its relative
    precision when it is small, and is exactly 0 (log-prob -inf) when all tokens are listed. No gradient.
    """
    listed = topk_ids >= 0
    index = topk_ids.long().clamp_min(0)
    logits = student_logits.detach() / temperature  # a copy, overwritten below
    listed_logits = logits.gather(-1, index).masked_fill_(~listed, -torch.inf)
    if tail == "renormalize":
        return _normalize(listed_logits), logits.zero_()
    # Strikes out the listed tokens. `amin` because padding points at token 0, which must survive it.
    logits.scatter_reduce_(-1, index, torch.where(listed, -torch.inf, torch.inf).to(logits.dtype), "amin")
    top = logits.amax(-1, keepdim=True)
    top = top.masked_fill_(top.isneginf(), 0.0)
    unlisted = logits.sub_(top).exp_()
    mass = unlisted.sum(-1, keepdim=True)  # >= 1 by the subtraction of the largest, or 0 if nothing is left
    log_s = torch.cat([listed_logits, mass.log() + top], -1).log_softmax(-1)
    return log_s, unlisted.div_(mass.clamp_min(1.0))


def teacher_buckets(
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    vocab_size: int,
    *,
    tail: Tail = "bucket",
    temperature: float = 1.0,
) -> Tensor:
    """Log-probs [..., K+1] (renormalised: [..., K]) in the dtype of topk_logprobs. No gradient.

    Log-probs rounded to 16 bits may sum to a little over 1. Unless the whole vocabulary is listed, the tail
    keeps at least the mass that rounding could hide, and the buckets are normalised after it. Raises
    ValueError for temperature != 1 unless every row lists the whole vocabulary.
    """
    listed = topk_ids >= 0
    logprobs = topk_logprobs.detach().masked_fill(~listed, -torch.inf)
    complete = listed.sum(-1, keepdim=True) == vocab_size
    if temperature != 1.0:
        if not complete.all():
            raise ValueError(
                f"temperature is {temperature}, but the teacher lists {topk_ids.shape[-1]} of {vocab_size} "
                "tokens. Log-probs at temperature 1 do not tell the unlisted tokens' mass at another one: "
                "set temperature to 1, or list the whole vocabulary"
            )
        logprobs = _normalize(logprobs / temperature)
    if tail == "renormalize":
        return _normalize(logprobs)
    # In float64: a tail of 1e-5 is what is left of 1, and a reverse KL weighs its logarithm with the student's tail.
    exact = logprobs.double()
    tail_mass = -exact.logsumexp(-1, keepdim=True).expm1()
    tail_mass = tail_mass.clamp_min_(torch.finfo(logprobs.dtype).eps).masked_fill_(complete, 0.0)
    return torch.cat([exact, tail_mass.log_()], -1).log_softmax(-1).to(logprobs.dtype)


def spread(grad_buckets: Tensor, topk_ids: Tensor, unlisted: Tensor) -> Tensor:
    """Gradient [..., V] of the logits from that of the buckets' logits. Overwrites `unlisted`.

    A listed token receives its bucket's gradient, the others share the tail's in proportion to their
    probability.
    """
    k = topk_ids.shape[-1]
    if grad_buckets.shape[-1] > k:
        unlisted.mul_(grad_buckets[..., k:])
    grad_listed = grad_buckets[..., :k].masked_fill(topk_ids < 0, 0.0)
    return unlisted.scatter_add_(-1, topk_ids.long().clamp_min(0), grad_listed)


def check_evidence(student_logits: Tensor, topk_ids: Tensor, topk_logprobs: Tensor, tail: Tail) -> None:
    """Raises ValueError for an unknown tail or shapes that do not fit."""
    if tail not in get_args(Tail):
        raise ValueError(f"tail is '{tail}'; it must be one of {', '.join(get_args(Tail))}")
    if topk_ids.shape != topk_logprobs.shape:
        raise ValueError(
            f"topk_ids are {tuple(topk_ids.shape)}, topk_logprobs {tuple(topk_logprobs.shape)}; both must be [..., K]"
        )
    if topk_ids.shape[:-1] != student_logits.shape[:-1]:
        raise ValueError(
            f"topk_ids are {tuple(topk_ids.shape)}, student logits {tuple(student_logits.shape)}; "
            "they must hold the same rows"
        )


def _normalize(logprobs: Tensor) -> Tensor:
    """log-softmax that leaves a row without any token at -inf instead of NaN."""
    total = logprobs.logsumexp(-1, keepdim=True)
    return logprobs - total.masked_fill(total.isneginf(), 0.0)
