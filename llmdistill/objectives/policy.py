"""On-policy distillation as policy gradient: estimators that need log-probs of a few tokens, not full rows.

The exact per-token reverse KL is `divergences.reverse_kl`; `sampled_token` has the same expected gradient for
y ~ student at temperature 1 and top_p 1 (METHODS 2.1), `topk_policy` the same gradient at k = V. Advantages
and weights never carry gradient. Log-probs are natural logs at the temperature of the policy they describe.
"""

from typing import Literal

import torch
from torch import Tensor

from llmdistill.objectives.fused import check_temperature, compute_dtype

Support = Literal["student", "teacher", "union", "intersection"]
Weighting = Literal["student", "teacher", "none"]


def token_logprobs(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[token] -> [...] in float32, for logits [..., V] and token_ids [...]
    int64.

    Gathers before it normalises, so no [..., V] log-softmax is kept. Raises ValueError for temperature <= 0.
    """
    check_temperature(temperature)
    scaled = logits.to(compute_dtype(logits))
    if temperature != 1.0:
        scaled = scaled / temperature
    return scaled.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def gopd_advantage(
    student_lp: Tensor, teacher_lp: Tensor, reference_lp: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """A = (log T - log S) + (scale - 1)(log T - log R) per token, detached -> [...] (G-OPD, arXiv
    2602.12125).

    scale = 1 is plain OPD and needs no reference R; 0 < scale < 1 interpolates towards R; scale > 1
    extrapolates past the teacher (ExOPD). Raises ValueError if scale != 1 and there is no reference.
    """
    advantage = teacher_lp.detach() - student_lp.detach()
    if scale == 1.0:
        return advantage
    if reference_lp is None:
        raise ValueError(
            f"scale is {scale} but reference_lp is None: scale != 1 weighs log T - log R. Pass those of a "
            "reference model (the student's initial weights or the teacher's base), or set scale to 1"
        )
    return advantage + (scale - 1.0) * (teacher_lp - reference_lp).detach()


def sampled_token(
    student_logits: Tensor,
    token_ids: Tensor,
    teacher_lp: Tensor,
    reference_lp: Tensor | None = None,
    *,
    scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """-sg[A] log S(y) -> [...], A = `gopd_advantage`: policy gradient on the sampled tokens y = token_ids
    [...].

    Its gradient is an unbiased estimate of the reverse KL's; its value is no KL (monitor `kl_k1` or `kl_k3`).
    `temperature` is that of sampling: it divides the student's logits, and the given log-probs must be at
    it too. Raises ValueError for temperature <= 0, or scale != 1 without reference_lp.
    """
    student_lp = token_logprobs(student_logits, token_ids, temperature)
    return -gopd_advantage(student_lp, teacher_lp, reference_lp, scale) * student_lp


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


def truncated_importance_weights(train_lp: Tensor, behavior_lp: Tensor, cap: float) -> Tensor:
    """min(pi_train(y) / pi_behavior(y), cap) -> [...], detached: corrects for an engine that samples slightly
    off.

    Raises ValueError for cap <= 0.
    """
    if not cap > 0:
        raise ValueError(f"cap is {cap}; it bounds a probability ratio from above and must be > 0")
    return (train_lp.detach() - behavior_lp.detach()).exp().clamp(max=cap)


def clipped_policy_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, *, clip: float = 0.2, dual_clip: float = 3.0
) -> Tensor:
    """PPO's clipped loss per token -> [...] with the dual clip for negative advantages (arXiv 1707.06347,
    1912.09729).

    ratio = exp(logp - old_logp); max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip)), and where A < 0 at most
    -A dual_clip. For several updates on one rollout. Raises ValueError for clip outside (0, 1) or dual_clip
    <= 1.
    """
    if not 0.0 < clip < 1.0:
        raise ValueError(f"clip is {clip}; it bounds the ratio to [1 - clip, 1 + clip] and must lie in (0, 1)")
    if not dual_clip > 1.0:
        raise ValueError(f"dual_clip is {dual_clip}; it bounds the ratio where the advantage is < 0 and must be > 1")
    advantage = advantage.detach()
    # Far outside any clip range already; without the bound exp overflows and its masked gradient is 0 * inf.
    ratio = (logp - old_logp.detach()).clamp(-20.0, 20.0).exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1.0 - clip, 1.0 + clip))
    return torch.where(advantage < 0, torch.minimum(loss, -advantage * dual_clip), loss)


def kl_k1(student_lp: Tensor, teacher_lp: Tensor) -> Tensor:
    """log S - log T per token sampled from the student: unbiased for KL(S || T), noisy. No gradient."""
    return (student_lp - teacher_lp).detach()


def kl_k3(student_lp: Tensor, teacher_lp: Tensor) -> Tensor:
    """r - 1 - log r, r = T / S, per token sampled from the student: unbiased, >= 0. No gradient."""
    log_ratio = (teacher_lp - student_lp).detach()
    return log_ratio.expm1() - log_ratio


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
