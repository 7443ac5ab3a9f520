"""Every f-divergence as policy gradient: from the log-probs of sampled tokens alone.

For y ~ S and u = T(y) / S(y) the loss sg[f(u) - u f'(u)] log S(y) has the expected gradient of D_f(T || S) =
sum_v S f(T / S) (OPD+, arXiv 2606.01039; METHODS-2026 9.0). With f(u) alone as the weight, as several published
estimators have it, only the reverse KL comes out right.
"""

import torch
from torch import Tensor

from llmdistill.objectives.f_cores import f_divergence
from llmdistill.objectives.fused import compute_dtype
from llmdistill.objectives.policy import policy_gradient
from llmdistill.objectives.sampler import token_logprobs

WIDEST_LOG_RATIO = 70.0  # exp(70) is still a float32
LARGEST_ADVANTAGE = 1e30  # and so is this, times a log-prob


def f_advantage(log_ratio: Tensor, name: str) -> Tensor:
    """-(f(u) - u f'(u)) + f(1) - f'(1) -> [n], u = exp(log_ratio [n]), for a name of `divergences.f_divergence`.

    The constant makes it vanish at u = 1; a constant has no expected gradient. Against overflow |log_ratio| counts as
    70 beyond that, and A as 1e30. Raises ValueError for an unknown name.
    """
    log_u = log_ratio.detach().clamp(-WIDEST_LOG_RATIO, WIDEST_LOG_RATIO).unsqueeze(-1)
    # S f(T / S) scales with (S, T): its slope at S = 1, T = u is that at S, divided by S.
    _, slope = f_divergence(torch.zeros_like(log_u), log_u, torch.ones_like(log_u), name=name)
    return -slope.squeeze(-1).clamp(-LARGEST_ADVANTAGE, LARGEST_ADVANTAGE)


def sampled_f(
    student_logits: Tensor,
    token_ids: Tensor,
    teacher_lp: Tensor,
    *,
    name: str,
    log_ratio_clip: float | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """-sg[`f_advantage`] log S(y) -> [n]: an unbiased gradient of D_f(T || S) from y = token_ids [n] drawn from S.

    `name` as in `divergences.f_divergence`; with kl_reverse it is `policy.sampled_token`. teacher_lp [n] is log T(y) at
    temperature 1. Forward-like f (kl_forward, pearson_chi2, alpha >= 1) weigh a token by u, u^2, ...: few samples
    carry all of the gradient. log_ratio_clip bounds |log u|, and biases the gradient: what T likes more than
    exp(clip) times as much as S is pulled up no harder than that.

    temperature (tau), top_k and top_p are the sampler's. Then S is S_{tau,K} and u = (T / S)^(1/tau) at temperature 1,
    a constant times T_tau / S_{tau,K}: the gradient is that of sum_K S_{tau,K} f(c T_tau / S_{tau,K}), whose optimum is
    T_tau on the nucleus for any c (f(u) - u f'(u) falls in u, so it is constant only where u is). Raises ValueError for
    an unknown name, log_ratio_clip <= 0, and as `sampler.sampler_logprobs` does.
    """
    if log_ratio_clip is not None and not log_ratio_clip > 0:
        raise ValueError(f"log_ratio_clip is {log_ratio_clip}; it bounds |log T - log S| and must be > 0, or None")
    student_lp = token_logprobs(student_logits.detach(), token_ids)
    log_ratio = (teacher_lp.detach().to(compute_dtype(student_logits)) - student_lp) / temperature
    if log_ratio_clip is not None:
        log_ratio = log_ratio.clamp(-log_ratio_clip, log_ratio_clip)
    advantage = f_advantage(log_ratio, name)
    return policy_gradient(
        student_logits, token_ids, advantage, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
