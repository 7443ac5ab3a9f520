"""Sequence-level losses over pairs of completions: a correct (chosen) and a wrong one (rejected) of the same prompt.

With a = log p(chosen) / |chosen| and b = log p(rejected) / |rejected|, REDI (arXiv 2505.24850) minimises -a + alpha b:
alpha = 0 is fine-tuning on the chosen side alone, alpha = 1 weighs both sides alike. The second term has no lower
bound: log p(rejected) may fall without end and take log p(chosen) with it. alpha < 1 slows that down, and no alpha > 0
rules it out, so watch log p(chosen).

SimPO and DPO are the baselines: both saturate where a pair is told apart. DPO is trained by TRL; its loss is here as an
independent reference.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def redi_loss(chosen_logp_mean: Tensor, rejected_logp_mean: Tensor, alpha: float, *, gamma: float = 0.0) -> Tensor:
    """mean over pairs of -a + alpha b exp(gamma b) -> scalar, for per-token mean log-probs a and b [P].

    gamma > 0 weakens the push on what is unlikely already. That weight carries gradient, as in the authors' code, so
    the second term is at least -alpha / (e gamma), reached at b = -1 / gamma; below that b is pushed up again. Raises
    ValueError for alpha < 0, gamma < 0, or other shapes.
    """
    _check(chosen_logp_mean, rejected_logp_mean)
    if not (alpha >= 0.0 and gamma >= 0.0):
        raise ValueError(f"alpha is {alpha} and gamma {gamma}; both must be >= 0")
    if alpha == 0.0:  # 0 * -inf is NaN
        return -chosen_logp_mean.mean()
    negative = rejected_logp_mean
    if gamma > 0.0:
        negative = negative * (gamma * negative).exp()
    return (alpha * negative - chosen_logp_mean).mean()


def simpo_loss(chosen_mean: Tensor, rejected_mean: Tensor, *, beta: float, margin: float) -> Tensor:
    """mean over pairs of -log sigmoid(beta (a - b) - margin) -> scalar, for a and b [P].

    SimPO, arXiv 2405.14734, eq. 6. Raises ValueError for beta <= 0 or other shapes.
    """
    _check(chosen_mean, rejected_mean)
    if not beta > 0.0:
        raise ValueError(f"beta is {beta}; it must be > 0")
    return -logsigmoid(beta * (chosen_mean - rejected_mean) - margin).mean()


def dpo_loss(
    chosen_logp: Tensor, rejected_logp: Tensor, ref_chosen_logp: Tensor, ref_rejected_logp: Tensor, *, beta: float
) -> Tensor:
    """mean over pairs of -log sigmoid(beta ((w - w_ref) - (l - l_ref))) -> scalar (DPO, arXiv 2305.18290, eq. 7).

    Of SUMMED log-probs [P] of the student and of the reference, which carries no gradient. Raises ValueError for
    beta <= 0 or other shapes.
    """
    _check(chosen_logp, rejected_logp)
    _check(ref_chosen_logp, ref_rejected_logp)
    if not beta > 0.0:
        raise ValueError(f"beta is {beta}; it must be > 0")
    reference = (ref_chosen_logp - ref_rejected_logp).detach()
    return -logsigmoid(beta * (chosen_logp - rejected_logp - reference)).mean()


def sequence_means(values_N: Tensor, counts: Sequence[int]) -> Tensor:
    """The mean of every sequence's rows -> [B], for rows [N] sequence by sequence and their counts, all >= 1."""
    return torch.stack([rows.mean() for rows in values_N.split(list(counts))])


def _check(chosen: Tensor, rejected: Tensor) -> None:
    if chosen.shape != rejected.shape or chosen.dim() != 1 or not len(chosen):
        raise ValueError(
            f"chosen is {tuple(chosen.shape)}, rejected {tuple(rejected.shape)}; both are [P], one per pair"
        )
