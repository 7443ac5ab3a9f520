"""Distances between hidden states of student and teacher, of one width; a projection between widths is the caller's.

In float32 (float64 stays), per token, without gradient to the teacher.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmdistill.objectives.fused import compute_dtype

CHANNEL_EPSILON = 1e-6  # a channel that is 0 throughout


def cosine_distance(student_NH: Tensor, teacher_NH: Tensor) -> Tensor:
    """1 - cos(student, teacher) -> [N] in [0, 2], as DistilBERT has it (arXiv 1910.01108); blind to the lengths."""
    student_NH, teacher_NH = _alike(student_NH, teacher_NH)
    return 1.0 - F.cosine_similarity(student_NH, teacher_NH, dim=-1)


def mse(student_NH: Tensor, teacher_NH: Tensor) -> Tensor:
    """mean over H of (student - teacher)^2 -> [N], as TinyBERT has it (arXiv 1909.10351, eq. 8)."""
    student_NH, teacher_NH = _alike(student_NH, teacher_NH)
    return (student_NH - teacher_NH).square().mean(-1)


def channelwise(student_NH: Tensor, teacher_NH: Tensor, mean_square_H: Tensor) -> Tensor:
    """mean over H of (student - teacher)^2 / mean_square_H -> [N], ALM's loss on hidden states (arXiv 2503.20083).

    mean_square_H is that of the teacher's states over the batch (`mean_square`): a channel counts by how far it is off
    in units of its own size, not by how large it is.
    """
    student_NH, teacher_NH = _alike(student_NH, teacher_NH)
    return ((student_NH - teacher_NH).square() / (mean_square_H.to(student_NH) + CHANNEL_EPSILON)).mean(-1)


def mean_square(states_NH: Tensor) -> Tensor:
    """The mean over N of states^2 -> [H]; ones of no states."""
    return states_NH.to(compute_dtype(states_NH)).square().mean(0) if len(states_NH) else torch.ones(1)


def mi_alpha_loss(scores_BB: Tensor, baseline_B: Tensor, alpha_logit: Tensor | float) -> Tensor:
    """Minus a lower bound of the mutual information of hidden states -> scalar (DISTILLER, METHODS 5.11; the
    interpolated bound of arXiv 1905.06922, section 2.5).

    scores_BB[i, j] is a critic's score of the student's state i with the teacher's j, baseline_B its learned log
    baseline; both and alpha_logit carry gradient. a_ij = log(w mean_{k != j} e^f_ik + (1 - w) e^b_i), w =
    sigmoid(alpha_logit); the bound is 1 + mean_{i != j} (f_ii - a_ij) - mean_{i != j} e^(f_ij - a_ii). At alpha_logit
    -> +inf it is InfoNCE, at most log(B - 1), of little variance; at -inf it is that of Nguyen, Wainwright and Jordan.
    Raises ValueError unless scores_BB is square with B >= 2 and baseline_B has B entries.
    """
    size = len(scores_BB)
    if scores_BB.shape != (size, size) or size < 2 or baseline_B.shape != (size,):
        raise ValueError(
            f"scores are {tuple(scores_BB.shape)}, baselines {tuple(baseline_B.shape)}; needed: [B, B] and [B], B >= 2"
        )
    scores = scores_BB.to(compute_dtype(scores_BB))
    logit = torch.as_tensor(alpha_logit, dtype=scores.dtype, device=scores.device)
    log_denominator = torch.logaddexp(
        _log_mean_of_others(scores) + F.logsigmoid(logit),
        baseline_B.to(scores.dtype).unsqueeze(-1) + F.logsigmoid(-logit),
    )
    is_negative = ~torch.eye(size, dtype=torch.bool, device=scores.device)
    joint = (scores.diagonal().unsqueeze(-1) - log_denominator)[is_negative].mean()
    marginal = (scores - log_denominator.diagonal().unsqueeze(-1))[is_negative].exp().mean()
    return -(1.0 + joint - marginal)


class MIAlphaHead(nn.Module):
    """Critic and baseline of `mi_alpha_loss`: f(s, t) = s W t / sqrt(H_T), b(s) = v s, and the logit of alpha."""

    def __init__(self, student_size: int, teacher_size: int) -> None:
        super().__init__()
        self.critic = nn.Linear(student_size, teacher_size, bias=False)
        self.baseline = nn.Linear(student_size, 1)
        self.alpha_logit = nn.Parameter(torch.zeros(1))  # DeepSpeed shares no parameter without a dimension

    def forward(self, student_nH: Tensor, teacher_NH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [n, N] of n student states with N teacher states, baselines [n], alpha_logit, a scalar."""
        scores = self.critic(student_nH) @ teacher_NH.T / math.sqrt(teacher_NH.shape[-1])
        # Not the parameter itself: ZeRO-3 has let go of it by the time that a caller reads it.
        return scores, self.baseline(student_nH).squeeze(-1), self.alpha_logit.sum()


def mi_alpha_rows(head: MIAlphaHead | nn.Module, student_nH: Tensor, teacher_NH: Tensor, index_n: Tensor) -> Tensor:
    """`mi_alpha_loss` as a mean over rows -> [n]: for n of the student's states and all N of the teacher's, detached.

    index_n [n] says which of the N each of them goes with. Row i of the loss reads row i of the scores only, so the
    mean over all N rows, however they are split, is the loss of the whole matrix. Fewer than 2 rows have no bound: 0.
    """
    scores, baseline, logit = head(student_nH, teacher_NH.detach())
    if scores.shape[-1] < 2:
        return scores.sum(-1) * 0.0
    is_positive = F.one_hot(index_n, scores.shape[-1]).bool()
    log_denominator = torch.logaddexp(
        _log_mean_of_others(scores) + F.logsigmoid(logit), baseline.unsqueeze(-1) + F.logsigmoid(-logit)
    )
    f_ii, a_ii = scores[is_positive].unsqueeze(-1), log_denominator[is_positive].unsqueeze(-1)
    row_bounds = (f_ii - log_denominator - (scores - a_ii).exp()).masked_fill(is_positive, 0.0)
    return -(1.0 + row_bounds.sum(-1) / (scores.shape[-1] - 1))


def _log_mean_of_others(scores_BB: Tensor) -> Tensor:
    """log mean_{k != j} exp(scores[i, k]) -> [B, B]."""
    total = scores_BB.logsumexp(-1, keepdim=True)
    largest = F.one_hot(scores_BB.argmax(-1), scores_BB.shape[-1]).bool()
    # Taking one term from a sum is exact to rounding unless it is most of the sum: that one is left out beforehand.
    share = (scores_BB - total).masked_fill(largest, -torch.inf).exp()
    without = torch.where(
        largest, scores_BB.masked_fill(largest, -torch.inf).logsumexp(-1, keepdim=True), total + torch.log1p(-share)
    )
    return without - math.log(scores_BB.shape[-1] - 1)


def _alike(student_NH: Tensor, teacher_NH: Tensor) -> tuple[Tensor, Tensor]:
    if student_NH.shape != teacher_NH.shape:
        raise ValueError(
            f"student states are {tuple(student_NH.shape)}, the teacher's {tuple(teacher_NH.shape)}; "
            "project one to the width of the other, and give both for the same tokens"
        )
    dtype = compute_dtype(student_NH)
    return student_NH.to(dtype), teacher_NH.detach().to(dtype)
