"""Objectives made of others: towards a target beyond the teacher, or with importance weights on sampled tokens.

Each takes a per-token loss ``fn(student_logits [n, V], *evidence) -> [n]`` and returns another one that reads more
evidence (see `rows.PairedRows`). Nothing here carries gradient but the student's logits.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llmdistill.objectives.clipping import truncated_importance_weights
from llmdistill.objectives.fused import compute_dtype
from llmdistill.objectives.policy import sampled_token
from llmdistill.objectives.sampler import check_truncation, sampler_logprobs

Loss = Callable[..., Tensor]


def extrapolated_logits(
    teacher_logits: Tensor, reference_logits: Tensor, scale: float, *, plausibility: float = 0.0
) -> Tensor:
    """scale log T + (1 - scale) log R -> [..., V]: the optimum of G-OPD up to a constant (arXiv 2602.12125).

    What the teacher excludes stays excluded, and so does what the reference excludes where scale < 1.

    Past the teacher (scale > 1) the factor (T / R)^(scale - 1) is noise in the tail, where both are tiny and R may be
    far smaller than T. With plausibility alpha > 0 only tokens of the teacher's head, T >= alpha max T, are
    extrapolated; the others keep log T (the adaptive plausibility constraint of contrastive decoding, arXiv
    2210.15097 eq. 2, with T in place of -inf). Renormalised, the tail then keeps at most 1 / (h^scale + 1 - h) of its
    mass under T, h the head's mass: never more than 1.09 times at scale 1.25, 1.18 at 1.5. The likeliest token is one
    of the head wherever (max T)^(scale - 1) >= alpha. Raises ValueError for alpha outside [0, 1].
    """
    _check_plausibility(plausibility)
    dtype = compute_dtype(teacher_logits)
    log_t = teacher_logits.log_softmax(-1, dtype=dtype)
    log_r = reference_logits.log_softmax(-1, dtype=dtype)
    if scale == 1.0:  # R has no say; 0 * -inf would be NaN
        return log_t
    # Where R is 0 its logarithm pushes by (1 - scale) * -inf; a floor keeps an extrapolation finite.
    log_r = log_r.clamp_min(-100.0) if scale > 1.0 else log_r
    mixed = scale * log_t + (1.0 - scale) * log_r if scale != 0.0 else log_r
    if scale > 1.0 and plausibility > 0.0:
        implausible = log_t < log_t.amax(-1, keepdim=True) + math.log(plausibility)
        mixed = torch.where(implausible, log_t, mixed)
    return mixed.masked_fill(log_t.isneginf(), -torch.inf) if scale > 0.0 else mixed


def extrapolated(loss: Loss, scale: float, *, plausibility: float = 0.0) -> Loss:
    """``loss`` towards the extrapolated target; reads (student_logits, teacher_logits, reference_logits).

    With the reverse KL and plausibility 0 its gradient is the expectation, over y ~ student, of that of
    `sampled_token` with the same scale: A is the log-ratio to the unnormalised target, and a constant in A has no
    expected gradient. plausibility is that of `extrapolated_logits`; .1 is what training with full rows wants.
    """
    _check_plausibility(plausibility)

    def towards(student_logits: Tensor, teacher_logits: Tensor, reference_logits: Tensor) -> Tensor:
        target = extrapolated_logits(teacher_logits, reference_logits, scale, plausibility=plausibility)
        return loss(student_logits, target)

    return towards


def extrapolated_sampled(
    scale: float, temperature: float = 1.0, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Loss:
    """`sampled_token` for evidence that names the tokens twice, once with the teacher's and once with R's log-probs."""
    policy = partial(sampled_token, scale=scale, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)

    def towards(
        student_logits: Tensor, token_ids: Tensor, teacher_lp: Tensor, _ids: Tensor, reference_lp: Tensor
    ) -> Tensor:
        return policy(student_logits, token_ids, teacher_lp, reference_lp)

    return towards


def on_samples(
    loss: Loss, *, cap: float, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Loss:
    """``loss`` with truncated importance weights; two more arguments follow its evidence.

    token_ids [n]; behavior_lp [n], log-probs under the policy that drew them. The loss becomes w loss with
    w = min(S_{tau,K}(y) / behavior(y), cap), detached, see `sampler_logprobs` for the sampler's temperature (tau),
    top_k and top_p. It corrects what the engine computed differently; engines report the log-probs of what they drew
    from, after temperature, top_k and top_p. NaN in behavior_lp marks tokens nobody drew: their weight is 1.
    """
    check_truncation(top_k, top_p, min_p)
    sampler = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}

    def weighted(student_logits: Tensor, *evidence: Tensor) -> Tensor:
        *judged, token_ids, behavior_lp = evidence
        train_lp = sampler_logprobs(student_logits.detach(), token_ids, **sampler)  # type: ignore[arg-type]
        weights = truncated_importance_weights(train_lp, behavior_lp, cap)
        return loss(student_logits, *judged) * weights.masked_fill(behavior_lp.isnan(), 1.0)

    return weighted


def _check_plausibility(plausibility: float) -> None:
    if not 0.0 <= plausibility <= 1.0:
        raise ValueError(
            f"plausibility is {plausibility}; it is a share of the teacher's largest probability and must lie in [0, 1]"
        )
