"""The student's own text as reinforcement learns from it: rewarded, compared within its group, cut into slices.

Of every prompt there are several completions. Their rewards become advantages, groups that say nothing are left out,
and each completion becomes the slices of a slicer, whose rows have the advantage (times the slice's weight) for their
weight in the loss. What is not of this step's own draw is nowhere read, so a resumed run goes on as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmdistill.diffusion import slicers
from llmdistill.diffusion.names import named
from llmdistill.diffusion.noised_view import Denoiser
from llmdistill.diffusion.noising import blocks_of, with_noise
from llmdistill.diffusion.policy import group_advantages, last_step_rewards, step_gae
from llmdistill.diffusion.slicers import SliceSettings, Written
from llmdistill.diffusion.slicing import NEVER, Slices
from llmdistill.texts.rollout import Prompt, Rollout, collate, request_seed
from llmdistill.texts.sources import Around, Drawn, Round, Source, Stateless

Rewarded = Callable[[Rollout, Sequence[Prompt]], Sequence[float]]
Stepwise = Callable[[Rollout, Sequence[Prompt]], Sequence[Sequence[float]]]  # a number for each counted token
Valued = Callable[[Rollout], Tensor]  # of a noised rollout, [N] of its rows


@dataclass(frozen=True)
class RewardSettings:
    """How rewards become advantages; :class:`~llmdistill.diffusion.rl_stage.DiffusionRLConfig` says what each means."""

    slicing: str = "trace"
    slices: SliceSettings = SliceSettings()
    keep_low: float = 0.2
    keep_high: float = 0.8
    scale: bool = True
    gamma: float = 1.0
    lam: float = 1.0


class Reinforced(Around):
    """The text of ``source``, the student's, in slices.

    The trainer puts in who rewards (``rewarded``), and where there is one, who rewards steps and who values states.
    """

    optional = False

    def __init__(self, source: Source, denoiser: Denoiser, settings: RewardSettings, max_new_tokens: int) -> None:
        super().__init__(source)
        self.denoiser, self.settings, self.length = denoiser, settings, max_new_tokens
        self.slicer: slicers.Slicer = named(slicers, settings.slicing, "objective.slicing")
        self.rewarded: Rewarded | None = None
        self.stepwise: Stepwise | None = None
        self.valued: Valued | None = None
        self.returns: Drawn | None = None  # the same slices, with returns for weights: what a value is to learn

    def draw(self, round_: Round) -> Drawn:
        rollout, prompts = self.source.draw(round_)
        assert self.rewarded is not None and rollout.step_map is not None
        rewards = torch.tensor(list(self.rewarded(rollout, prompts)), dtype=torch.float64)
        advantages, kept, finished = self._compared(rewards, rollout, round_.samples_per_prompt)
        whole = on_canvas(rollout, prompts, self.length, round_.pad_id) if self.denoiser.block_size is None else rollout
        assert whole.step_map is not None
        blocks = blocks_of(whole, prompts, self.denoiser)
        starts = torch.tensor([len(p.ids) for p in prompts]).unsqueeze(-1)
        written = Written(
            whole.step_map,
            whole.completion_mask & kept.unsqueeze(-1),
            whole.attention_mask & (torch.arange(whole.input_ids.shape[1]) < starts),
            None if self.denoiser.block_size is None else blocks,
        )
        seed = request_seed(request_seed(round_.seed, round_.step, -2), round_.rank, 0)
        generator = torch.Generator().manual_seed(seed)
        slices = self.slicer(written, self.settings.slices, generator)
        noised = self._noised(whole, slices, blocks)
        of_tokens, returns = self._of_tokens(advantages, whole, prompts, noised, slices)
        self._numbers = {
            "reward": float(rewards.mean()),
            "right": float(torch.where(finished, rewards, 0.0).mean()),
            "kept_groups": float(kept.double().mean()),
            "slices": float(len(slices)) / max(len(rollout), 1),
        }
        row_prompts = [prompts[b] for b in slices.row.tolist()] or prompts[:1]
        if returns is not None:
            self.returns = _weighted(noised, slices, returns, 1.0), row_prompts
        scale = 3.0 if self.settings.slicing == "coupled" else 1.0  # a token is in three slices, and counts once
        return _weighted(noised, slices, of_tokens, scale, slices.weight), row_prompts

    def _compared(self, rewards: Tensor, rollout: Rollout, samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """Advantages [B], which sequences are of a group that is kept [B], and which had an end [B]."""
        s = self.settings
        finished = torch.tensor([f == "stop" for f in rollout.finish])
        groups = (-1, samples)
        found, kept = group_advantages(
            rewards.view(groups), finished.view(groups), s.keep_low, s.keep_high, scale=s.scale
        )
        return found.flatten().float(), kept.repeat_interleave(samples), finished

    def _noised(self, whole: Rollout, slices: Slices, blocks: Tensor) -> Rollout:
        """A sequence for every slice; of no slices one in which nothing counts."""
        rows = slices.row.tolist() or [0]
        some = bool(len(slices))
        width = whole.sequences(rows).input_ids.shape[1]
        nothing = torch.zeros_like(whole.completion_mask[:1])
        masked, target = ((x if some else nothing)[:, :width] for x in (slices.masked, slices.target))
        hidden = unwritten(whole)
        if self.settings.slicing != "trace":  # states that were never visited show nothing of what is behind an end
            assert whole.step_map is not None
            hidden |= (whole.step_map != NEVER) & ~whole.completion_mask
        return with_noise(
            whole.sequences(rows),
            self.denoiser,
            masked | hidden[rows][:, :width],
            rows=target,
            countable=target,
            blocks=blocks[rows][:, :width],
        )

    def _of_tokens(
        self, advantages: Tensor, whole: Rollout, prompts: Sequence[Prompt], noised: Rollout, slices: Slices
    ) -> tuple[Tensor, Tensor | None]:
        """Advantages of tokens [B, T]; and returns, where states are valued or steps rewarded."""
        shape = whole.input_ids.shape
        if self.valued is None and self.stepwise is None:
            return advantages.unsqueeze(-1).expand(shape), None
        assert whole.step_map is not None
        steps = whole.step_map.masked_fill(~whole.completion_mask, NEVER)
        rewards = last_step_rewards(steps, whole.completion_mask, advantages)
        if self.stepwise is not None:
            for b, row in enumerate(self.stepwise(whole, prompts)):
                rewards[b, whole.completion_mask[b]] += torch.tensor(list(row))
        values = torch.zeros(shape)
        if self.valued is not None:  # on every rank, slices or not: it is a forward pass
            on_rows = torch.zeros(noised.input_ids.shape)
            on_rows[noised.completion_mask] = self.valued(noised).float().cpu()
            if len(slices):  # every token is a row of one slice
                values[:, : on_rows.shape[1]].index_add_(0, slices.row, on_rows)
        returns, found = step_gae(steps, rewards, values, self.settings.gamma, self.settings.lam)
        return found, returns


class ReturnsOf(Stateless):
    """The slices that ``reinforced`` has just made, with what their tokens returned for weights."""

    optional = False

    def __init__(self, reinforced: Reinforced) -> None:
        self.reinforced, self.uses = reinforced, reinforced.uses

    def draw(self, round_: Round) -> Drawn:
        drawn = self.reinforced.returns
        assert drawn is not None  # it comes after that in the method
        round_.drawn.append("student")
        return drawn


def on_canvas(rollout: Rollout, prompts: Sequence[Prompt], length: int, pad_id: int) -> Rollout:
    """Completions up to ``length`` tokens, as full attention saw them while they were written: what no step revealed
    stands there masked, and is padding here."""
    ends = rollout.attention_mask.sum(1).tolist()
    completions = [row[len(p.ids) : end].tolist() for row, p, end in zip(rollout.input_ids, prompts, ends, strict=True)]
    made = collate(
        [p.ids for p in prompts],
        [c + [pad_id] * (length - len(c)) for c in completions],
        pad_id=pad_id,
        finish=rollout.finish,
        domain=rollout.domain,
        policy_version=rollout.policy_version,
    )
    counts = torch.zeros_like(made.completion_mask)
    steps = torch.full_like(made.input_ids, NEVER)
    width = min(rollout.input_ids.shape[1], counts.shape[1])
    assert rollout.step_map is not None
    counts[:, :width], steps[:, :width] = rollout.completion_mask[:, :width], rollout.step_map[:, :width]
    return replace(made, completion_mask=counts, step_map=steps)


def unwritten(rollout: Rollout) -> Tensor:
    """Tokens behind the last that a step revealed, [B, T] bool: masked in every state."""
    assert rollout.step_map is not None
    written = (rollout.step_map != NEVER).flip(-1).cumsum(-1).flip(-1) > 0
    begun = (rollout.step_map != NEVER).cumsum(-1) > 0
    return ~written & begun & rollout.attention_mask


def _weighted(
    noised: Rollout, slices: Slices, of_tokens: Tensor, scale: float, weight: Tensor | None = None
) -> Rollout:
    """With these numbers of tokens [B, T], times the slices' weights, for weights of rows."""
    assert noised.noise is not None
    if not len(slices):
        return noised
    width = noised.input_ids.shape[1]
    found = of_tokens[slices.row][:, :width].float() * scale
    if weight is not None:
        found = found * weight[:, :width]
    return replace(noised, noise=replace(noised.noise, weight=found.masked_fill(~noised.completion_mask, 0.0)))
