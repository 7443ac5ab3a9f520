"""On-policy distillation as policy gradient: estimators that need log-probs of a few tokens, not full rows.

The exact per-token reverse KL is `divergences.reverse_kl`; `sampled_token` has the same expected gradient for tokens
drawn from the student at temperature 1, top_k 0 and top_p 1 (METHODS 2.1), and that of the reverse KL between the
sampler and the tempered teacher at any other setting. Advantages never carry gradient. Teacher and reference give
natural logs at temperature 1, as scoring services do.
"""

from torch import Tensor

from llmdistill.objectives.sampler import sampler_logprobs, token_logprobs


def gopd_advantage(
    student_lp: Tensor, teacher_lp: Tensor, reference_lp: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """A = (log T - log S) + (scale - 1)(log T - log R) per token, detached -> [...] (G-OPD, arXiv
    2602.12125).

    scale = 1 is plain OPD and needs no reference R; 0 < scale < 1 interpolates towards R; scale > 1
    extrapolates past the teacher (ExOPD). Raises ValueError if scale != 1 and there is no reference.
    """
    if scale == 1.0:
        return teacher_lp.detach() - student_lp.detach()
    if reference_lp is None:
        raise ValueError(
            f"scale is {scale} but reference_lp is None: scale != 1 weighs log T - log R. Pass those of a "
            "reference model (the student's initial weights or the teacher's base), or set scale to 1"
        )
    if scale == 0.0:  # 0 * -inf is NaN where the teacher excludes the token
        return (reference_lp - student_lp).detach()
    return (scale * teacher_lp + (1.0 - scale) * reference_lp - student_lp).detach()


def policy_gradient(
    student_logits: Tensor,
    token_ids: Tensor,
    advantage: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """-sg[A] log S_{tau,K}(y) -> [n], for tokens y = token_ids [n] that a sampler with these settings drew."""
    drawn_lp = sampler_logprobs(
        student_logits, token_ids, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    return -advantage.detach() * drawn_lp


def sampled_token(
    student_logits: Tensor,
    token_ids: Tensor,
    teacher_lp: Tensor,
    reference_lp: Tensor | None = None,
    *,
    scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """-sg[A / tau] log S_{tau,K}(y) -> [...], A = `gopd_advantage`: policy gradient on the sampled tokens y =
    token_ids [...].

    temperature (tau), top_k and top_p are the sampler's; all log-probs in A are those of temperature 1. The gradient
    is an unbiased estimate of that of KL(S_{tau,K} || T_tau), with T_tau the softmax of the target's log-probs divided
    by tau: A / tau differs from log T_tau(y) - log S_{tau,K}(y) by a constant of the position, which has no expected
    gradient. The optimum is the target on the nucleus; logits outside it get no gradient. That A / tau and no other
    of these is taken because it vanishes for a student that equals its teacher. The value is no KL (monitor
    `metrics.kl_k1` or `kl_k3`). Raises ValueError for temperature <= 0, top_k < 0, top_p outside (0, 1],
    min_p outside [0, 1], or scale != 1 without reference_lp.
    """
    drawn_lp = sampler_logprobs(
        student_logits, token_ids, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    plain = temperature == 1.0 and not top_k and top_p == 1.0 and not min_p  # then the two log-probs are one
    student_lp = drawn_lp if plain else token_logprobs(student_logits.detach(), token_ids)
    return -gopd_advantage(student_lp, teacher_lp, reference_lp, scale) / temperature * drawn_lp
