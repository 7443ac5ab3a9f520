"""Objectives made of others: towards a target beyond the teacher, with weights on sampled tokens, with a task reward.

Each takes a per-token loss ``fn(student_logits [n, V], *evidence) -> [n]`` and returns another one that reads more
evidence (see `rows.PairedRows`). Nothing here carries gradient but the student's logits.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llmdistill.objectives.clipping import truncated_importance_weights
from llmdistill.objectives.fused import compute_dtype
from llmdistill.objectives.policy import sampled_token, token_logprobs

Loss = Callable[..., Tensor]


def extrapolated_logits(teacher_logits: Tensor, reference_logits: Tensor, scale: float) -> Tensor:
    """scale log T + (1 - scale) log R -> [..., V]: the optimum of G-OPD up to a constant (arXiv 2602.12125).

    What the teacher excludes stays excluded, and so does what the reference excludes where scale < 1.
    """
    dtype = compute_dtype(teacher_logits)
    log_t = teacher_logits.log_softmax(-1, dtype=dtype)
    log_r = reference_logits.log_softmax(-1, dtype=dtype)
    if scale == 1.0:  # R has no say; 0 * -inf would be NaN
        return log_t
    # Where R is 0 its logarithm pushes by (1 - scale) * -inf; a floor keeps an extrapolation finite.
    log_r = log_r.clamp_min(-100.0) if scale > 1.0 else log_r
    mixed = scale * log_t + (1.0 - scale) * log_r if scale != 0.0 else log_r
    return mixed.masked_fill(log_t.isneginf(), -torch.inf) if scale > 0.0 else mixed


def extrapolated(loss: Loss, scale: float) -> Loss:
    """``loss`` towards the extrapolated target; reads (student_logits, teacher_logits, reference_logits).

    With the reverse KL its gradient is the expectation, over y ~ student, of that of `sampled_token` with the same
    scale: A is the log-ratio to the unnormalised target, and a constant in A has no expected gradient.
    """

    def towards(student_logits: Tensor, teacher_logits: Tensor, reference_logits: Tensor) -> Tensor:
        return loss(student_logits, extrapolated_logits(teacher_logits, reference_logits, scale))

    return towards


def extrapolated_sampled(scale: float, temperature: float = 1.0) -> Loss:
    """`sampled_token` for evidence that names the tokens twice, once with the teacher's and once with R's log-probs."""
    policy = partial(sampled_token, scale=scale, temperature=temperature)

    def towards(
        student_logits: Tensor, token_ids: Tensor, teacher_lp: Tensor, _ids: Tensor, reference_lp: Tensor
    ) -> Tensor:
        return policy(student_logits, token_ids, teacher_lp, reference_lp)

    return towards


def on_samples(loss: Loss, *, cap: float = 0.0, reward_weight: float = 0.0, temperature: float = 1.0) -> Loss:
    """``loss`` with what is known of the sampled tokens; three more arguments follow its evidence.

    token_ids [n]; behavior_lp [n], log-probs under the policy that drew them; advantage [n], of the task reward. The
    loss becomes w (loss - reward_weight advantage log S(y)), w = min(S(y) / behavior(y), cap); w = 1 at cap 0. NaN in
    behavior_lp marks tokens nobody drew: their weight is 1.
    """

    def weighted(student_logits: Tensor, *evidence: Tensor) -> Tensor:
        *teacher, token_ids, behavior_lp, advantage = evidence
        value = loss(student_logits, *teacher)
        if not (cap or reward_weight):
            return value
        logp = token_logprobs(student_logits, token_ids, temperature)
        if reward_weight:
            value = value - reward_weight * advantage.to(value.dtype) * logp
        if cap:
            weights = truncated_importance_weights(logp, behavior_lp, cap)
            value = value * weights.masked_fill(behavior_lp.isnan(), 1.0)
        return value

    return weighted
