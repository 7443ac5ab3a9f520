"""PowerOPD: policy gradient with the bounded reward T(y)^a - S(y)^a (arXiv 2606.17199)."""

from torch import Tensor

from llmdistill.objectives.policy import policy_gradient
from llmdistill.objectives.sampler import token_logprobs


def power_reward(student_lp: Tensor, teacher_lp: Tensor, alpha: float) -> Tensor:
    """T^a - S^a -> [n] in [-1, 1], detached, from log-probs [n]. Raises ValueError for alpha <= 0."""
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}; it is the power of the probabilities and must be > 0")
    return (alpha * teacher_lp.detach()).exp() - (alpha * student_lp.detach()).exp()


def power_sampled(
    student_logits: Tensor,
    token_ids: Tensor,
    teacher_lp: Tensor,
    *,
    alpha: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """-sg[T(y)^a - S(y)^a] log S(y) -> [n], for tokens y = token_ids [n] drawn from S at temperature 1.

    Its expected gradient is that of sum_v S^(a+1) / (a+1) - S T^a, the density-power divergence to T (METHODS-2026
    9.1.1): a = 1 is half the squared distance, a -> 0 the reverse KL times a. At large a only tokens that one side is
    nearly sure of carry any. With top_k and top_p the gradient is taken under the truncated sampler, and S in the
    reward is that of the whole softmax, the scale on which T is known.
    """
    student_lp = token_logprobs(student_logits.detach(), token_ids)
    reward = power_reward(student_lp, teacher_lp, alpha)
    return policy_gradient(student_logits, token_ids, reward, top_k=top_k, top_p=top_p, min_p=min_p)
