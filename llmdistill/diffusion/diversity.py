"""Samples that differ: logits of a batch are pushed apart before tokens are drawn.

``OrthogonalRepulsion`` (ODD): what a sample is about is one vector, the largest probability that any position gives a
word; each sample is pushed away from the span of those before it. ``DeterminantalRepulsion``: all at once, towards a
larger determinant of the samples' similarities. The model itself is not differentiated, only softmax and pooling.
Both go into ``generate(…, logits_processor=[…])``, over a batch of samples of one prompt, or ``groups`` of such. What
they are worth is measured by ``pass_at_k`` and ``distinct_at_k`` of :mod:`llmdistill.evals.metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from llmdistill.diffusion.sampling import StepState
from llmdistill.errors import UserError

SAME = 1e-6  # length below which a residual is no direction


def features(logits: Tensor, state: StepState, pool: str = "max") -> tuple[Tensor, Tensor]:
    """Unit vectors [B, V] of what samples are about, and how sure they are [B].

    Probabilities of masked positions, one-hot rows of revealed ones, pooled over positions by ``max`` or ``mean``.
    """
    probabilities = logits.softmax(-1)
    revealed = torch.nn.functional.one_hot(state.ids, logits.shape[-1]).to(probabilities.dtype)
    rows = torch.where(state.masked.unsqueeze(-1), probabilities, revealed)
    if pool == "max":
        pooled = rows.amax(1)
    elif pool == "mean":
        pooled = rows.mean(1)
    else:
        raise UserError(f"diffusion.pool is {pool!r}; there are max and mean. Fix: --diffusion.pool max.")
    best = torch.where(state.masked, probabilities.amax(-1), 0.0).sum(-1)
    return torch.nn.functional.normalize(pooled, dim=-1), best / state.masked.sum(-1).clamp_min(1)


class _Repulsion:
    """A step of length alpha against the gradient of a loss on the batch's features.

    Args:
        alpha: how far the token that is moved most is moved, in logits; falls to 0 over the steps where ``anneal``.
        groups: samples of one prompt that lie next to each other; None: the whole batch.
        protected_ids: columns that are left alone: ends and padding.
    """

    def __init__(
        self,
        alpha: float,
        *,
        pool: str = "max",
        quality_scale: float = 1.0,
        protected_ids: Collection[int] = (),
        anneal: bool = True,
        groups: int | None = None,
    ) -> None:
        if not alpha >= 0 or not math.isfinite(alpha):
            raise UserError(f"diffusion.alpha is {alpha}; it is a length. Fix: at least 0.")
        self.alpha, self.pool, self.quality_scale, self.anneal = alpha, pool, quality_scale, anneal
        self.protected_ids, self.groups = sorted(protected_ids), groups

    def __call__(self, logits: Tensor, state: StepState) -> Tensor:
        size = self.groups or len(logits)
        if len(logits) % size:
            raise UserError(f"{len(logits)} samples in groups of {size}. Fix: a whole number of groups in a batch.")
        parts = []
        for start in range(0, len(logits), size):
            rows = slice(start, start + size)
            parts.append(self._moved(logits[rows], StepState(state.ids[rows], state.masked[rows], state.progress)))
        return torch.cat(parts)

    @torch.enable_grad()
    def _moved(self, logits: Tensor, state: StepState) -> Tensor:
        alpha = self.alpha * (1 - state.progress) if self.anneal else self.alpha
        leaf = logits.detach().requires_grad_()
        loss = self.loss(leaf, state)
        if alpha == 0 or loss is None:
            return logits
        (gradient,) = torch.autograd.grad(loss, leaf)
        gradient = gradient.nan_to_num(0.0).masked_fill(~state.masked.unsqueeze(-1), 0.0)
        if self.protected_ids:
            gradient[..., self.protected_ids] = 0.0
        largest = gradient.norm(dim=-1).amax(-1)[:, None, None]
        return logits - alpha * torch.where(largest > 0, gradient / largest.clamp_min(1e-30), 0.0)

    def loss(self, logits: Tensor, state: StepState) -> Tensor | None:
        """To be made smaller; None where there is nothing to push."""
        raise NotImplementedError


class OrthogonalRepulsion(_Repulsion):
    """ODD: sample k is pushed along its residual to the span of samples before it; the first is left as it is.

    Identical samples (all of them, in the first step) have no residual, and the published code then does nothing;
    ``tie_break`` pushes such a sample in a random direction instead, drawn from ``generator``, that stays its own.
    """

    def __init__(
        self,
        alpha: float = 16.0,
        *,
        tie_break: bool = True,
        generator: torch.Generator | None = None,
        **options: object,
    ) -> None:
        super().__init__(alpha, **options)  # type: ignore[arg-type]
        self.tie_break = tie_break
        self.generator = generator or torch.Generator().manual_seed(0)  # not the global one: training draws from it
        self.directions: Tensor | None = None

    def loss(self, logits: Tensor, state: StepState) -> Tensor | None:
        vectors, quality = features(logits, state, self.pool)
        fixed, basis, losses = vectors.detach(), list[Tensor](), []
        for k, vector in enumerate(fixed):
            residual = vector.clone()
            for direction in basis:
                residual = residual - (vector @ direction) * direction
            length = residual.norm()
            if length > SAME:
                direction = residual / length
                if basis:
                    losses.append(-(vectors[k] @ direction) * quality[k] * self.quality_scale)
                basis.append(direction)
            elif self.tie_break and basis:
                losses.append(-(vectors[k] @ self._direction(k, fixed)) * quality[k].detach() * self.quality_scale)
        return torch.stack(losses).sum() if losses else None

    def _direction(self, k: int, like: Tensor) -> Tensor:
        if self.directions is None or len(self.directions) <= k or self.directions.shape[1] != like.shape[1]:
            drawn = torch.randn(like.shape, generator=self.generator, dtype=torch.float64)
            self.directions = torch.nn.functional.normalize(drawn, dim=-1)
        return self.directions[k].to(like)


class DeterminantalRepulsion(_Repulsion):
    """The DPP baseline: -(logdet(K' + 1e-4) - logdet(K' + 1 + 1e-4)) with K' = V V^T (1 + s q q^T), made smaller."""

    def __init__(self, alpha: float = 5.0, **options: object) -> None:
        super().__init__(alpha, **options)  # type: ignore[arg-type]

    def loss(self, logits: Tensor, state: StepState) -> Tensor | None:
        if len(logits) < 2:
            return None
        vectors, quality = features(logits, state, self.pool)
        if float((vectors - vectors[:1]).detach().abs().max()) < SAME:
            return None  # its gradient would move all of them the same way, and by the whole of alpha
        kernel = (vectors @ vectors.T) * (1 + self.quality_scale * quality[:, None] * quality[None, :])
        one = torch.eye(len(logits), dtype=kernel.dtype, device=kernel.device)
        return torch.logdet(kernel + (1 + 1e-4) * one) - torch.logdet(kernel + 1e-4 * one)
