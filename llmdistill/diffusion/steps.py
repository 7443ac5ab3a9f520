"""Distillation of a denoiser's many steps into few: consistency along a masking trajectory (MCD), and SDTT.

What it can do is bounded, and a forward KL to a calibrated teacher at temperature 1 does nothing: the mean of the
teacher's answers at x_s given x_t IS its answer at x_t (tower property), so the teacher itself is the fixed point. All
gain in steps comes from seeking modes: a reverse KL, or a teacher sharpened by a temperature below 1. Either costs
likelihood and entropy, which are to be reported beside it. The default is the reverse KL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmdistill.diffusion.losses import token_ce
from llmdistill.diffusion.schedules import Schedule
from llmdistill.errors import UserError
from llmdistill.objectives.divergences import reverse_kl

Divergence = Callable[..., Tensor]  # (student logits, teacher logits) [..., V] -> [...]


def mcd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    ids: Tensor,
    masked_t: Tensor,
    masked_s: Tensor,
    *,
    divergence: Divergence = reverse_kl,
    teacher_temperature: float = 1.0,
) -> Tensor:
    """Consistency between t and an earlier s of one trajectory, per token [B, L] (MCD, arXiv 2602.00792).

    Tokens masked at both times: the divergence to the teacher at x_s. Tokens revealed in between: cross-entropy on the
    token, which is what a forward KL to the teacher's certainty is; a reverse one would be infinite. The rest: 0.

    Args:
        student_logits: [B, L, V] at x_t. teacher_logits: [B, L, V] at x_s, without gradient.
        masked_t, masked_s: as :func:`~llmdistill.diffusion.masking.couple` returns them.
    """
    if bool((masked_s & ~masked_t).any()):
        raise UserError("a token is masked at s and not at t: the times are exchanged. Fix: s earlier than t.")
    still, revealed = masked_t & masked_s, masked_t & ~masked_s
    losses = torch.zeros(ids.shape, dtype=student_logits.dtype, device=ids.device)
    target = teacher_logits[still].detach() / teacher_temperature
    losses = losses.masked_scatter(still, divergence(student_logits[still], target).to(losses.dtype))
    return losses.masked_scatter(revealed, token_ce(student_logits[revealed], ids[revealed]).to(losses.dtype))


def step_of_round(number: int, first: float) -> float:
    """The distance t - s in a round, from 0 on: twice that of the round before.

    Raises:
        UserError: beyond the whole interval.
    """
    step = first * 2**number
    if not 0 < step < 1:
        raise UserError(f"diffusion.first_step is {first:g}: in round {number} that is {step:g}. Fix: fewer rounds.")
    return step


def temperature_of_round(number: int, rounds: int, ends: tuple[float, float] = (0.96, 0.75)) -> float:
    """Of the teacher, linear over the rounds. The paper gives the ends, not the way between them."""
    share = number / (rounds - 1) if rounds > 1 else 0.0
    return ends[0] + (ends[1] - ends[0]) * share


def teacher_times(t: Tensor, dt: float, sub_steps: int) -> Tensor:
    """When SDTT's teacher is asked: t, t - dt, …; [sub_steps, B] of t [B].

    As the paper has it; the released code interpolates towards 1 - t by mistake (.75 and .25 for t = .5).
    """
    return t.unsqueeze(0) - dt * torch.arange(sub_steps, dtype=t.dtype, device=t.device).unsqueeze(-1)


@torch.no_grad()
def sdtt_targets(
    teacher: Any, noisy: Tensor, t: Tensor, dt: float, schedule: Schedule, uniforms: Tensor, sub_steps: int = 2
) -> Tensor:
    """What the student at x_t learns, log-probs [B, L, V] (SDTT, arXiv 2410.21035, algorithm 1).

    The teacher takes ancestral sub-steps of dt; a token's target is what it answered in the sub-step that revealed the
    token, or in the last. ``uniforms`` [sub_steps, 2, B, L]: whether, and by its inverse distribution which token.
    """
    ids, masked = noisy.clone(), noisy == teacher.mask_token_id
    targets = None
    for time, (u_reveal, u_token) in zip(teacher_times(t, dt, sub_steps), uniforms, strict=True):
        log_probs = teacher(ids).log_softmax(-1)
        targets = log_probs if targets is None else torch.where(masked.unsqueeze(-1), log_probs, targets)
        alpha_t, alpha_s = schedule.alpha(time), schedule.alpha((time - dt).clamp_min(0))
        share = ((alpha_s - alpha_t) / (1 - alpha_t)).unsqueeze(-1)
        below = log_probs.exp().cumsum(-1) <= u_token.unsqueeze(-1)
        tokens = below.sum(-1).clamp_max(log_probs.shape[-1] - 1)
        revealed = masked & (u_reveal < share)
        ids, masked = torch.where(revealed, tokens, ids), masked & ~revealed
    assert targets is not None
    return targets
