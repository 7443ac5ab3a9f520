"""Policy gradient over a small support: the estimator between the sampled token and the full vocabulary."""

from typing import Literal

import torch
from torch import Tensor

from llmdistill.objectives.fused import compute_dtype

Support = Literal["student", "teacher", "union", "intersection"]
Weighting = Literal["student", "teacher", "none"]


def topk_policy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    k: int,
    support: Support = "student",
    weighting: Weighting = "student",
) -> Tensor:
    """-sum over a small support of sg[A_k w_k] S_k / sg[S_k] -> [...], A_k = log T_k - log S_k (METHODS 2.1).

    support: the top-k tokens of student or teacher, or their union or intersection. w sums to 1 over it: the
    student's or the teacher's probabilities renormalised, or ("none") equal weights. Log-probs come from the
    full softmax. With k = V and student weights, value and gradient are those of the reverse KL. An empty
    intersection gives 0. Raises ValueError for k outside [1, V] or an unknown support or weighting.
    """
    if not 1 <= k <= student_logits.shape[-1]:
        raise ValueError(f"k is {k}; it must lie between 1 and the vocabulary size {student_logits.shape[-1]}")
    if weighting not in ("student", "teacher", "none"):
        raise ValueError(f"weighting is '{weighting}'; it must be 'student', 'teacher' or 'none'")
    ids, counted = _support(student_logits.detach(), teacher_logits.detach(), k, support)
    student_lp = _logprobs_of(student_logits, ids)
    teacher_lp = _logprobs_of(teacher_logits.detach(), ids)
    fixed_lp = student_lp.detach()
    if weighting == "none":
        weights = counted / counted.sum(-1, keepdim=True).clamp_min(1)
    else:
        weigher_lp = fixed_lp if weighting == "student" else teacher_lp
        weights = weigher_lp.masked_fill(~counted, -torch.inf).softmax(-1).masked_fill(~counted, 0.0)
    advantage = (weights * (teacher_lp - fixed_lp)).masked_fill(~counted, 0.0)
    return -(advantage * (student_lp - fixed_lp).exp()).sum(-1)


def _logprobs_of(logits: Tensor, ids: Tensor) -> Tensor:
    scaled = logits.to(compute_dtype(logits))
    return scaled.gather(-1, ids) - scaled.logsumexp(-1, keepdim=True)


def _support(student_logits: Tensor, teacher_logits: Tensor, k: int, support: str) -> tuple[Tensor, Tensor]:
    """Token ids [..., K or 2K] and which of them count: the others repeat a token or lie outside."""
    if support == "teacher":
        ids = teacher_logits.topk(k).indices
        return ids, torch.ones_like(ids, dtype=torch.bool)
    ids = student_logits.topk(k).indices
    if support == "student":
        return ids, torch.ones_like(ids, dtype=torch.bool)
    teacher_ids = teacher_logits.topk(k).indices
    shared = teacher_ids.unsqueeze(-1) == ids.unsqueeze(-2)  # [..., K teacher, K student]
    if support == "intersection":
        return ids, shared.any(-2)
    if support == "union":
        return torch.cat([ids, teacher_ids], -1), torch.cat(
            [torch.ones_like(ids, dtype=torch.bool), ~shared.any(-1)], -1
        )
    raise ValueError(f"support is '{support}'; it must be 'student', 'teacher', 'union' or 'intersection'")
