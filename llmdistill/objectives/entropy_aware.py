"""Entropy-aware OPD: the sampled reverse KL everywhere, and a forward KL where the teacher is unsure (arXiv
2603.07079)."""

import torch
from torch import Tensor

from llmdistill.objectives.fused import compute_dtype
from llmdistill.objectives.policy import sampled_token


def entropy_aware(
    student_logits: Tensor,
    token_ids: Tensor,
    teacher_lp: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    teacher_entropy: Tensor,
    *,
    threshold: float = 0.8,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """`policy.sampled_token` + [H(T) > threshold] sum_listed T (log T - log S) -> [n] (METHODS-2026 9.1.5).

    topk_ids, topk_logprobs [n, K]: the teacher's likeliest tokens, padded with -1, with log-probs of the whole
    softmax and not renormalised, so the sum is no divergence and may be negative. teacher_entropy [n] is over the
    whole vocabulary, in nats; the threshold is absolute, so another vocabulary selects another share. temperature,
    top_k and top_p are the sampler's and concern the first term alone. Both terms are divided by all counted tokens.
    """
    sampled = sampled_token(
        student_logits, token_ids, teacher_lp, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    dtype, listed = compute_dtype(student_logits), topk_ids >= 0
    logits = student_logits.to(dtype)
    log_s = logits.gather(-1, topk_ids.long().clamp_min(0)) - logits.logsumexp(-1, keepdim=True)
    log_t = topk_logprobs.detach().to(dtype).masked_fill(~listed, -torch.inf)
    t = log_t.exp()
    possible = t > 0  # elsewhere 0 * -inf would be NaN, also in the gradient
    covering = (t * (log_t.where(possible, 0.0) - log_s.where(possible, 0.0))).sum(-1)
    return sampled + torch.where(teacher_entropy > threshold, covering, 0.0)
