"""From a written sequence to the masked inputs that its log-probs are taken on: one interface for all estimators.

A slice is one noised copy of a completion: what is masked in it, which tokens it is asked about, and with what weight.
Training, likelihood and reinforcement differ only in how slices are made.

TraceRL's (arXiv 2509.06949, section 3) are those that the sampler went through: ``step_map`` says in which step a token
was revealed, so a slice masks what came in that step or later and asks about what came in it. B sequences, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmdistill.errors import UserError

NEVER = -1  # in a step map: a prompt's token, or one that no step revealed


@dataclass(frozen=True)
class Slices:
    """S noised copies of sequences."""

    row: Tensor  # [S] int64: of which sequence
    masked: Tensor  # [S, L] bool: the mask stands here in the input
    target: Tensor  # [S, L] bool: the tokens asked about, a part of those masked
    weight: Tensor  # [S, L] float32 of a target's log-prob

    def __len__(self) -> int:
        return len(self.row)

    def of_sequences(self, values: Tensor) -> Tensor:
        """[B, …] -> [S, …]."""
        return values[self.row]


def shrink(step_map: Tensor, k: int, blocks: Tensor | None = None) -> Tensor:
    """The steps of every sequence, or of every of its blocks, k at a time as one, called by the last of them.

    step_map [B, L]; blocks [B, L] numbers; :data:`NEVER` stays.

    Raises:
        UserError: k < 1.
    """
    if k < 1:
        raise UserError(f"diffusion.shrink is {k}; it counts steps that become one. Fix: at least 1.")
    shrunk = step_map.clone()
    for row in range(len(step_map)):
        for block in [None] if blocks is None else blocks[row].unique().tolist():
            inside = step_map[row] != NEVER
            if block is not None:
                inside &= blocks[row] == block  # type: ignore[index]
            steps, number = step_map[row][inside].unique(return_inverse=True)
            last = torch.arange(len(steps), device=steps.device).div(k, rounding_mode="floor").mul(k).add(k - 1)
            if len(steps):
                shrunk[row, inside] = steps[last.clamp_max(len(steps) - 1)][number]
    return shrunk


def trace_slices(step_map: Tensor, valid: Tensor, *, shrink_by: int = 1, blocks: Tensor | None = None) -> Slices:
    """The slices of the trajectory. Every valid token is the target of exactly one.

    Args:
        step_map: [B, L]. valid: [B, L] bool: tokens that count (up to the first end; a prompt has :data:`NEVER`).
        shrink_by: steps that become one slice: fewer forwards, of states a little later than those that were visited.
        blocks: [B, L] with block attention: slice r then takes the r-th step of every block at once, the earlier
            blocks being read from the clean copy.
    """
    steps = shrink(step_map, shrink_by, blocks)
    if blocks is not None:
        steps = _rank_in_block(steps, blocks)
    rows, masked, targets = [], [], []
    for row in range(len(steps)):
        for step in steps[row][(steps[row] != NEVER) & valid[row]].unique().tolist():
            rows.append(row)
            masked.append(steps[row] >= step)
            targets.append((steps[row] == step) & valid[row])
    return _slices(rows, masked, targets, step_map)


def random_slices(valid: Tensor, u: Tensor, u_time: Tensor, low: float = 0.1, high: float = 0.9) -> Slices:
    """One slice a sequence, masked at random at a time in [low, high] (dLLM-RL's baseline); the weight is 1.

    valid [B, L]; u [B, L] and u_time [B] uniform.
    """
    masked = (u < (low + (high - low) * u_time).unsqueeze(-1)) & valid
    return Slices(torch.arange(len(valid), device=valid.device), masked, masked, masked.float())


def coupled_slices(valid: Tensor, u: Tensor, u_time: Tensor, low: float = 0.2, high: float = 0.8) -> Slices:
    """Three slices a sequence: all masked, a random part masked, and the rest of it (coupled-GRPO, arXiv 2506.20639).

    A token's log-prob is half of that with all masked and half of that in its part, over the part's chance:
    (log p_full + [in M] log p_M / t + [not in M] log p_rest / (1 - t)) / 2, of mean weight 3/2. Every token is in one
    part.
    """
    t = (low + (high - low) * u_time).unsqueeze(-1)
    part = (u < t) & valid
    rest = valid & ~part
    masked = torch.stack([valid, part, rest], 1).flatten(0, 1)
    weight = torch.stack([valid.float(), part / t, rest / (1 - t)], 1).flatten(0, 1).float() / 2
    rows = torch.arange(len(valid), device=valid.device).repeat_interleave(3)
    return Slices(rows, masked, masked, weight)


def full_slices(
    valid: Tensor, prompt: Tensor | None = None, u: Tensor | None = None, prompt_share: float = 0.0
) -> Slices:
    """One slice a sequence, with the completion masked whole (diffu-GRPO, arXiv 2504.12216): cheap, and of a state in
    which no token that was sampled later than the first step ever was. The weakest where it was measured.

    ``prompt`` [B, L] bool and ``u`` [B, L] uniform: tokens of the prompt are masked too, each with ``prompt_share``
    (section 3.2 of the paper: .15), and never asked about. The numbers of old and new log-probs must be the same.
    """
    masked = valid
    if prompt is not None and u is not None:
        masked = valid | (prompt & (u < prompt_share))
    return Slices(torch.arange(len(valid), device=valid.device), masked, valid, valid.float())


def _rank_in_block(steps: Tensor, blocks: Tensor) -> Tensor:
    """Of every token: the how-manieth step of its block revealed it."""
    ranks = torch.full_like(steps, NEVER)
    for row in range(len(steps)):
        for block in blocks[row].unique().tolist():
            inside = (blocks[row] == block) & (steps[row] != NEVER)
            ranks[row, inside] = steps[row][inside].unique(return_inverse=True)[1]
    return ranks


def _slices(rows: list[int], masked: list[Tensor], targets: list[Tensor], like: Tensor) -> Slices:
    if not rows:
        nothing = torch.zeros(0, like.shape[1], dtype=torch.bool, device=like.device)
        return Slices(torch.zeros(0, dtype=torch.long, device=like.device), nothing, nothing, nothing.float())
    target = torch.stack(targets)
    return Slices(torch.tensor(rows, device=like.device), torch.stack(masked), target, target.float())
