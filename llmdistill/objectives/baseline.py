"""Baselines for the sampled-token estimator: the same expected gradient, less variance.

A_y - b in place of A_y changes nothing in expectation, whatever b, as long as b does not depend on y: E[grad log S] is
0. It needs the teacher's full row, or its log-probs on a list that the student chose. Who has the full row can form
the exact `divergences.reverse_kl`, without any variance, from the same evidence: a baseline is for where that gradient
costs too much, or where the list is short. At KL .1 vOPD's baseline leaves 84 % of the variance and the optimal one
75 %; at KL 6 both leave 20 % (METHODS-2026 9.0).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llmdistill.objectives import divergences, sparse
from llmdistill.objectives.cores import kl_terms
from llmdistill.objectives.fused import compute_dtype
from llmdistill.objectives.policy import gopd_advantage, policy_gradient
from llmdistill.objectives.sampler import token_logprobs

Baseline = Callable[..., Tensor]


def with_baseline(
    baseline: Baseline, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Callable[..., Tensor]:
    """`policy.sampled_token` with advantage A - b; reads (student_logits, token_ids, teacher_lp, *evidence).

    b = baseline(student_logits, *evidence) [n], at temperature 1 like all log-probs. The sampler's temperature, top_k
    and top_p may be any: b is no function of y. The gain was measured at temperature 1 and without truncation.
    """

    def sampled(student_logits: Tensor, token_ids: Tensor, teacher_lp: Tensor, *evidence: Tensor) -> Tensor:
        student_lp = token_logprobs(student_logits.detach(), token_ids)
        advantage = gopd_advantage(student_lp, teacher_lp) - baseline(student_logits, *evidence)
        return policy_gradient(
            student_logits,
            token_ids,
            advantage / temperature,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )

    return sampled


@torch.no_grad()
def kl_baseline(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """-KL(S || T) -> [n] from full rows [n, V], the mean of A over y ~ S (vOPD, arXiv 2605.07865)."""
    return -divergences.reverse_kl(student_logits, teacher_logits)


@torch.no_grad()
def topk_kl_baseline(student_logits: Tensor, topk_ids: Tensor, topk_logprobs: Tensor) -> Tensor:
    """-KL(S || T) -> [n] over a list [n, K] that the student chose, renormalised on both sides (vOPD's top-k form).

    topk_ids are the student's likeliest tokens (the paper's K is 100), padded with -1; topk_logprobs the teacher's
    log-probs of them. A list without any token gives 0. No longer the mean of A, and still unbiased.
    """
    return -sparse.reverse_kl(student_logits, topk_ids, topk_logprobs, tail="renormalize")


@torch.no_grad()
def optimal_baseline(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The scalar b of least gradient variance -> [n] from full rows [n, V]: E[A w] / E[w] (METHODS-2026 9.0).

    w_y = |grad_z log S(y)|^2 = 1 - 2 S_y + |S|^2. A student certain of one token has w = 0 there, and no gradient to
    lose: the limit, A of that token, is 0 then.
    """
    dtype = compute_dtype(student_logits)
    log_s, log_t = student_logits.log_softmax(-1, dtype=dtype), teacher_logits.log_softmax(-1, dtype=dtype)
    s = log_s.exp()
    # In this form no digits cancel as S_y tends to 1.
    w = (1.0 - s).square() + (s.square().sum(-1, keepdim=True) - s.square()).clamp_min(0.0)
    total = (s * w).sum(-1)
    weighed = -(kl_terms(s, log_s, log_t) * w).masked_fill(w == 0, 0.0).sum(-1)
    return torch.where(total > 0, weighed / total.clamp_min(torch.finfo(dtype).tiny), 0.0)
