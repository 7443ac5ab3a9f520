"""DistiLLM-2: skewed KLs of two directions, each on the text of the model that it suits (arXiv 2503.07067).

(2 - beta) KL(T || a T + (1 - a) S) on the teacher's completion of a prompt, beta KL(S || (1 - a) T + a sg[S]) on the
student's: raise what the teacher says, lower what the student says and the teacher would not. Token mean per sequence,
then mean over pairs. Released defaults: beta 1, a = .1; there the adaptive a never runs (METHODS 1.4), here it does.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from llmdistill.objectives.cores import kl_terms
from llmdistill.objectives.divergences import dense


def on_teacher_text(
    student_logits: Tensor, teacher_logits: Tensor, alpha: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """KL(T || a T + (1 - a) S) -> [n], for rows [n, V] and alpha [n], each in (0, 1), that of the row's sequence."""
    return dense(partial(_skew_forward, alpha=alpha), student_logits, teacher_logits, temperature)


def on_student_text(
    student_logits: Tensor, teacher_logits: Tensor, alpha: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """KL(S || (1 - a) T + a sg[S]) -> [n], for rows [n, V] and alpha [n], each in (0, 1).

    Unlike `divergences.skew_reverse_kl` the mixture carries no gradient, as in the released code: same value, and a
    gradient by which S may not lower the divergence by moving the mixture.
    """
    return dense(partial(_skew_reverse_fixed_mixture, alpha=alpha), student_logits, teacher_logits, temperature)


def pair_loss(teacher_side_P: Tensor, student_side_P: Tensor, beta: float = 1.0) -> Tensor:
    """mean over pairs of (2 - beta) x + beta y -> scalar, for per-sequence token means [P] of the two losses."""
    if teacher_side_P.shape != student_side_P.shape or teacher_side_P.dim() != 1 or not len(teacher_side_P):
        raise ValueError(
            f"the teacher's side is {tuple(teacher_side_P.shape)}, the student's {tuple(student_side_P.shape)}; "
            "both are [P], one per pair"
        )
    if not 0.0 <= beta <= 2.0:
        raise ValueError(f"beta is {beta}; the sides weigh 2 - beta and beta, so it must lie in [0, 2]")
    return ((2.0 - beta) * teacher_side_P + beta * student_side_P).mean()


def gradual_beta(step: int, total_steps: int) -> float:
    """1 + min(1, 2 step / total) / 2: the student's side gains weight until half of the training is over."""
    return 1.0 + 0.5 * min(1.0, 2.0 * step / total_steps)


def sequence_means(values_N: Tensor, counts: Sequence[int]) -> Tensor:
    """The mean of every sequence's rows -> [B], for rows [N] sequence by sequence; 0 of a sequence without any."""
    return torch.stack([rows.mean() if len(rows) else rows.sum() for rows in values_N.split(list(counts))])


def probability_gap(student_lp_mean_B: Tensor, teacher_lp_mean_B: Tensor) -> Tensor:
    """e^(mean log T) - e^(mean log S) -> [B], of per-sequence mean log-probs [B] of the sequence's tokens.

    By how much the teacher is surer of a text than the student; negate it for text of the student.
    """
    return (teacher_lp_mean_B.exp() - student_lp_mean_B.exp()).detach()


def adaptive_alpha(gap_B: Tensor, anchor: float, *, base: float = 0.1, lowest: float = 0.01) -> Tensor:
    """1 - (1 - base) anchor / (gap + 1e-5), kept in [lowest, base] -> [B]: less skew where the gap is small.

    gap_B is `probability_gap` (negated on student text); anchor is its mean over the first logged batch, of the same
    sign. Between the bounds (1 - a) gap = (1 - base) anchor, so the same share of a gap is learned as on the first
    batch; where the gap has the other sign a is `base`.
    """
    if not 0.0 < lowest <= base < 1.0:
        raise ValueError(f"lowest is {lowest} and base {base}; 0 < lowest <= base < 1 is needed")
    return (1.0 - (1.0 - base) * anchor / (gap_B.detach() + 1e-5)).clamp(lowest, base)


def _skew_forward(log_s: Tensor, log_t: Tensor, s: Tensor, *, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """A core: KL(T || M), M = a T + (1 - a) S, with an a per row."""
    share = _per_row(alpha, log_s)
    log_m = torch.logaddexp(log_t + share.log(), log_s + torch.log1p(-share))
    value = kl_terms(log_t.exp(), log_t, log_m).sum(-1)
    teacher_over_mixture = log_t.sub_(log_m).exp_()
    return value, s.sub(s * teacher_over_mixture).mul_(1.0 - share).masked_fill_(s == 0, 0.0)


def _skew_reverse_fixed_mixture(log_s: Tensor, log_t: Tensor, s: Tensor, *, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """A core: KL(S || sg[M]), M = (1 - a) T + a S."""
    share = _per_row(alpha, log_s)
    log_m = torch.logaddexp(log_t + torch.log1p(-share), log_s + share.log())
    terms = kl_terms(s, log_s, log_m, out=log_s)
    return terms.sum(-1), terms


def _per_row(alpha: Tensor, log_s: Tensor) -> Tensor:
    if alpha.shape != log_s.shape[:-1]:
        raise ValueError(f"alpha is {tuple(alpha.shape)}, the rows {tuple(log_s.shape[:-1])}; one per row is needed")
    return alpha.detach().to(log_s.dtype).unsqueeze(-1)
