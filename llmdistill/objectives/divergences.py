"""Divergences between the next-token distributions of student S and teacher T, from both full logit rows.

Every function is `fn(student_logits [..., V], teacher_logits [..., V], *, temperature=1.0, ...) -> [...]`, in
nats per token, without reduction, in float32 (float64 stays float64). Gradients reach the student only.
Temperature divides both logits; there is no temperature^2 factor. A column at -inf on both sides contributes
nothing; on one side it gives the true value (+inf for a KL whose support is violated). All raise ValueError
for a temperature <= 0, rows of different shape, or a parameter outside its range.

    loss = reverse_kl(student_logits, teacher_logits, temperature=1.0)[completion_mask].mean()
"""

from functools import partial

import torch
from torch import Tensor

from llmdistill.objectives import cores
from llmdistill.objectives.accelerated import dense_rows
from llmdistill.objectives.f_cores import f_divergence as f_divergence_core
from llmdistill.objectives.fused import check_temperature, compute_dtype, through_softmax


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(T || S), mass-covering; the distillation loss of arXiv 1503.02531, without its temperature^2."""
    return dense(cores.forward_kl, student_logits, teacher_logits, temperature)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(S || T), mode-seeking; the objective of on-policy distillation (MiniLLM, arXiv 2306.08543)."""
    return dense(cores.reverse_kl, student_logits, teacher_logits, temperature)


def jsd(student_logits: Tensor, teacher_logits: Tensor, *, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649), in TRL's direction of beta.

    beta KL(T || M) + (1 - beta) KL(S || M), M = beta T + (1 - beta) S; by definition KL(T || S) at beta = 0
    and KL(S || T) at beta = 1. The formula itself tends to 0 at both ends, so the scale of the loss jumps
    there: beta = .1 gives about a tenth of the KL.
    """
    return dense(partial(cores.jsd, beta=beta), student_logits, teacher_logits, temperature)


def skew_forward_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, alpha: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """KL(T || alpha T + (1 - alpha) S): DistiLLM's SKL (arXiv 2402.03898); at most log(1 / alpha)."""
    return dense(partial(cores.skew_forward_kl, alpha=alpha), student_logits, teacher_logits, temperature)


def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, alpha: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """KL(S || (1 - alpha) T + alpha S): DistiLLM's SRKL (arXiv 2402.03898); at most log(1 / alpha)."""
    return dense(partial(cores.skew_reverse_kl, alpha=alpha), student_logits, teacher_logits, temperature)


def total_variation(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """sum |S - T| / 2 in [0, 1]; 1 - TV is the acceptance rate of speculative decoding (arXiv 2310.08461)."""
    return dense(cores.total_variation, student_logits, teacher_logits, temperature)


def adaptive_kl(
    student_logits: Tensor, teacher_logits: Tensor, *, head_mass: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """AKL (arXiv 2404.02657): forward and reverse KL, weighted per token by where S and T differ.

    Head: the teacher's likeliest tokens while their cumulative mass stays <= head_mass, always including the
    first. The weight of the forward KL is the head's share of sum |T - S|, that of the reverse KL the rest;
    no gradient flows through the weights.
    """
    return dense(partial(cores.adaptive_kl, head_mass=head_mass), student_logits, teacher_logits, temperature)


def f_divergence(student_logits: Tensor, teacher_logits: Tensor, *, name: str, temperature: float = 1.0) -> Tensor:
    """D_f(T || S) = sum_v S f(T / S) for the generator called `name` (f-distill, arXiv 2307.15190).

    kl_forward, kl_reverse, jensen_shannon (at most log 2), jeffreys_sum, total_variation (at most 1),
    pearson_chi2, neyman_chi2, squared_hellinger (at most 2), triangular (at most 2), or alpha_<number>, such
    as alpha_0.5. pearson_chi2, neyman_chi2 and alpha outside (0, 1) explode where one side is tiny; see
    `f_cores.power`.
    """
    return dense(partial(f_divergence_core, name=name), student_logits, teacher_logits, temperature)


def dense(core: cores.Core, student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    check_temperature(temperature)
    student_width, teacher_width = student_logits.shape[-1], teacher_logits.shape[-1]
    if student_width != teacher_width:
        raise ValueError(
            f"student logits have {student_width} columns, teacher logits {teacher_width}: cut both to the "
            "shared width first (`vocab_size` of the streaming engine does)"
        )
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits are {tuple(student_logits.shape)}, the teacher's {tuple(teacher_logits.shape)}; "
            "they must hold the same rows"
        )
    return dense_rows(formula, core, student_logits, teacher_logits.detach(), temperature)


def formula(
    core: cores.Core, student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(values [...], d values / d student_logits [..., V]), both in float32 (float64 stays)."""
    dtype = compute_dtype(student_logits)
    log_s = _log_softmax(student_logits, temperature, dtype)
    log_t = _log_softmax(teacher_logits, temperature, dtype)
    s = log_s.exp()
    value, slope = core(log_s, log_t, s)
    grad_logits = through_softmax(slope, s)
    return value, grad_logits if temperature == 1.0 else grad_logits.div_(temperature)


def _log_softmax(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    if temperature != 1.0:
        logits = logits.to(dtype) / temperature
    return logits.log_softmax(-1, dtype=dtype)
