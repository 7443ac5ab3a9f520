"""On-policy distillation as policy gradient: estimators that need log-probs of a few tokens, not full rows.

The exact per-token reverse KL is `divergences.reverse_kl`; `sampled_token` has the same expected gradient for
y ~ student at temperature 1 and top_p 1 (METHODS 2.1). Advantages never carry gradient. Log-probs are natural logs at
the temperature of the policy they describe.
"""

from torch import Tensor

from llmdistill.objectives.fused import check_temperature, compute_dtype


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


def kl_k1(student_lp: Tensor, teacher_lp: Tensor) -> Tensor:
    """log S - log T per token sampled from the student: unbiased for KL(S || T), noisy. No gradient."""
    return (student_lp - teacher_lp).detach()


def kl_k3(student_lp: Tensor, teacher_lp: Tensor) -> Tensor:
    """r - 1 - log r, r = T / S, per token sampled from the student: unbiased, >= 0. No gradient."""
    log_ratio = (teacher_lp - student_lp).detach()
    return log_ratio.expm1() - log_ratio
