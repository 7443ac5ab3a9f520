"""Texts as a denoiser is trained on them: which tokens are masked, at which time, and what that weighs.

A sequence's draw depends on the run's seed, the step and its place in the global batch, and on nothing else: not on
micro-batches, on processes, or on what was drawn before a run was resumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from llmdistill.diffusion.ar_teacher import without_visible_suffix
from llmdistill.diffusion.attention import block_ids
from llmdistill.diffusion.losses import cart_weight
from llmdistill.diffusion.noised_view import Denoiser
from llmdistill.diffusion.schedules import EPS, Schedule, schedule
from llmdistill.texts.noise import Noise
from llmdistill.texts.rollout import Prompt, Rollout, collate, request_seed
from llmdistill.texts.sources import Around, Drawn, Round, Source

Norm = Literal["token", "sequence", "batch", "masked"]
Weighting = Literal["elbo", "uniform", "cart"]


@dataclass(frozen=True)
class NoiseSettings:
    """How masks are drawn; :class:`~llmdistill.diffusion.stages.DiffusionConfig` says what each means."""

    schedule: str = "linear"
    weighting: Weighting = "elbo"
    norm: Norm = "token"
    low: float = EPS
    high: float = 1.0
    stratified: bool = True
    copies: int = 1
    anneal_steps: int = 0
    fill: int = 0


@dataclass
class Draw:
    """The draw of one sequence of L tokens: [L] each."""

    masked: Tensor
    weight: Tensor


class Noised(Around):
    """The text of ``source`` with masks in it, each sequence ``copies`` times.

    Args:
        denoiser: how the student reads.
        eos_id: fills completions up to a multiple of ``fill`` tokens, and is trained there.
    """

    def __init__(self, source: Source, denoiser: Denoiser, settings: NoiseSettings, eos_id: int) -> None:
        super().__init__(source)
        self.denoiser, self.settings, self.eos_id = denoiser, settings, eos_id
        self.optional: bool = getattr(source, "optional", False)

    def draw(self, round_: Round) -> Drawn:
        rollout, prompts = self.source.draw(round_)
        s, samples = self.settings, max(len(rollout) // max(len(round_.prompts), 1), 1)
        # A teacher whose head is wider than its vocabulary may write the id, which no denoiser predicts.
        rollout, cut = rollout.ended_before(rollout.input_ids == self.denoiser.mask_token_id, round_.pad_id)
        if s.fill:
            rollout, prompts = filled(rollout, prompts, self.eos_id, s.fill, round_.pad_id)
        every = range(len(rollout))
        rollout = rollout.sequences([b for b in every for _ in range(s.copies)])
        prompts = [prompts[b] for b in every for _ in range(s.copies)]
        places = [(round_.places[b // samples] * samples + b % samples, c) for b in every for c in range(s.copies)]
        noised = self.noised(rollout, prompts, round_, places, round_.prompts_everywhere * samples)
        noise = noised.noise
        assert noise is not None
        counts = max(int(noise.countable.sum()), 1)
        share = float((noise.masked & noise.countable).sum()) / counts
        self._numbers = {"masked_share": share, "cut_at_mask_token": float(cut)}
        return noised, prompts

    def noised(
        self,
        rollout: Rollout,
        prompts: Sequence[Prompt],
        round_: Round,
        places: Sequence[tuple[int, int]],
        everywhere: int,
    ) -> Rollout:
        """With one draw for each sequence.

        Args:
            places: of each sequence in the global batch of ``everywhere``, and which copy of it this is.
        """
        s, alphas = self.settings, schedule(self.settings.schedule)
        seeds = [request_seed(request_seed(round_.seed, round_.step, -1), place, copy) for place, copy in places]
        blocks_BT = blocks_of(rollout, prompts, self.denoiser)
        masked_BT = torch.zeros_like(rollout.completion_mask)
        weight_BT = torch.zeros(rollout.input_ids.shape)
        countable_BT = rollout.completion_mask.clone()
        countable_BT[:, 0] = False  # nothing predicts the first token
        turn = round_.chance("time of a mask")
        for b, length in enumerate(rollout.attention_mask.sum(1).tolist()):
            generator = torch.Generator().manual_seed(seeds[b])
            number = int(blocks_BT[b].max()) + 1
            place, copy = places[b]
            share = (place / max(everywhere, 1) + copy) / s.copies
            times = times_of(number, turn + share / number if s.stratified else None, s, generator)
            draw = drawn(alphas, times[blocks_BT[b, :length]], countable_BT[b, :length], s.weighting, generator)
            masked_BT[b, :length], weight_BT[b, :length] = draw.masked, draw.weight
        ahead = min(1.0, (round_.step + 1) / s.anneal_steps) if s.anneal_steps else 1.0
        return with_noise(
            rollout,
            self.denoiser,
            masked_BT,
            rows=masked_BT,
            countable=masked_BT if s.norm == "masked" else countable_BT,
            weight=weight_BT,
            blocks=blocks_BT,
            ahead=ahead,
            seeds=seeds,
        )


def with_noise(
    rollout: Rollout,
    denoiser: Denoiser,
    masked: Tensor,
    *,
    rows: Tensor,
    countable: Tensor,
    weight: Tensor | None = None,
    blocks: Tensor,
    ahead: float = 1.0,
    seeds: Sequence[int] = (),
) -> Rollout:
    """The clean rollout read with masks. All tensors [B, T].

    Args:
        masked: what is not read. rows: what is asked for, a part of that. countable: what losses are divided by.
        weight: of the rows' losses; 1. blocks: of :func:`blocks_of`.
    """
    no_suffix = without_visible_suffix(masked, rollout.attention_mask, None if denoiser.block_size is None else blocks)
    noise = Noise(
        masked,
        countable,
        torch.ones(masked.shape) if weight is None else weight,
        no_suffix,
        blocks,
        torch.full((len(rollout),), ahead, dtype=torch.float64),
        torch.tensor(list(seeds) or [0] * len(rollout), dtype=torch.int64),
        denoiser,
    )
    return replace(rollout, completion_mask=rows, noise=noise)


def blocks_of(rollout: Rollout, prompts: Sequence[Prompt], denoiser: Denoiser) -> Tensor:
    """The block of every token, [B, T]; -1 on padding. Full attention has one; else a prompt is block 0, and the
    completion's blocks are counted from its end, as they are when a completion is written."""
    if denoiser.block_size is None:
        return torch.zeros_like(rollout.input_ids).masked_fill(~rollout.attention_mask, -1)
    lengths = torch.tensor([len(p.ids) for p in prompts], device=rollout.input_ids.device)
    return block_ids(rollout.attention_mask, denoiser.block_size, lengths)


def times_of(number: int, turn: float | None, s: NoiseSettings, generator: torch.Generator) -> Tensor:
    """A time for each of a sequence's blocks, [number] float64, each uniform on [low, high).

    ``turn``: the blocks' times are equally far apart and turned together by it, which is uniform; None: independent.
    """
    if turn is None:
        u = torch.rand(number, dtype=torch.float64, generator=generator)
    else:
        u = (torch.arange(number, dtype=torch.float64) / number + turn) % 1
    return s.low + (s.high - s.low) * u


def drawn(alphas: Schedule, times: Tensor, countable: Tensor, weighting: Weighting, generator: torch.Generator) -> Draw:
    """Which tokens are masked, each with probability 1 - alpha of its time, and the weights. All [L]."""
    u = torch.rand(len(times), dtype=torch.float64, generator=generator)
    masked = (u < 1 - alphas.alpha(times)) & countable
    if weighting == "cart":
        return Draw(masked, cart_weight(masked.unsqueeze(0))[0])
    weight = alphas.weight(times) if weighting == "elbo" else torch.ones_like(times)
    return Draw(masked, weight.float().masked_fill(~masked, 0.0))


def filled(
    rollout: Rollout, prompts: Sequence[Prompt], eos_id: int, size: int, pad_id: int
) -> tuple[Rollout, list[Prompt]]:
    """Completions with ends up to the next multiple of ``size`` tokens, which count: what is written in blocks has to
    go on behind its end (LLaDA, arXiv 2502.09992, appendix B.1). Weights of tokens get 1 there."""
    longer, completions, counts = list[Prompt](), list[list[int]](), list[list[bool]]()
    lengths = rollout.attention_mask.sum(1).tolist()
    for b, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        start = len(prompt.ids)
        more = -(length - start) % size
        completions.append([*rollout.input_ids[b, start:length].tolist(), *[eos_id] * more])
        counts.append([*rollout.completion_mask[b, start:length].tolist(), *[True] * more])
        weighted = isinstance(prompt.weight, tuple) and more
        longer.append(replace(prompt, weight=(*prompt.weight, *[1.0] * more)) if weighted else prompt)  # type: ignore[misc]
    made = collate(
        [p.ids for p in prompts],
        completions,
        pad_id=pad_id,
        counts=counts,
        finish=rollout.finish,
        domain=rollout.domain,
        policy_version=rollout.policy_version,
    )
    return made, longer
