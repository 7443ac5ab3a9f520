"""Texts for distillation in steps, and judges that answer about an earlier state of them.

A sequence is drawn at a time t and, with the same uniform number per token, at t - dt and the times before: what is
masked at t is a row. In which of these sub-steps a row is revealed travels as the rollout's ``step_map``. MCD's judge
reads the text as it was at t - dt; SDTT's writes on from t, each token in its sub-step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmdistill.diffusion.losses import without_mask_token
from llmdistill.diffusion.noised_view import Denoiser
from llmdistill.diffusion.noising import Noised, NoiseSettings, blocks_of, times_of, with_noise
from llmdistill.diffusion.schedules import schedule
from llmdistill.diffusion.steps import step_of_round, temperature_of_round
from llmdistill.objectives.rows import HiddenRows
from llmdistill.teachers.student import StudentTeacher
from llmdistill.texts.rollout import Prompt, Rollout, request_seed
from llmdistill.texts.sources import Round, Source

REVEALED = 0  # in the step map of such a text: in the first sub-step; 1 in the next one, and so on


@dataclass(frozen=True)
class Rounds:
    """The distance of the two times, which doubles in every round, and the teacher's temperature.

    Args:
        count: of rounds. steps: optimizer steps of one. first: the distance in the first.
        temperatures: of the teacher in the first and in the last round.
    """

    count: int
    steps: int
    first: float
    temperatures: tuple[float, float] = (1.0, 1.0)

    def number(self, step: int) -> int:
        """The round that follows ``step`` optimizer steps; the last has no end."""
        return min(step // self.steps, self.count - 1)

    def dt(self, step: int) -> float:
        return step_of_round(self.number(step), self.first)

    def temperature(self, step: int) -> float:
        return temperature_of_round(self.number(step), self.count, self.temperatures)

    def begins(self, step: int) -> bool:
        """Whether another round than the one before begins after ``step`` optimizer steps."""
        return step > 0 and self.number(step) != self.number(step - 1)


class Coupled(Noised):
    """The text of ``source`` at two times of one trajectory (MCD, arXiv 2602.00792), or at t and all sub-steps (SDTT).

    A row's ``no_suffix`` says whether the judge's answer is what it learns: with one sub-step those that are masked at
    both times, while the others have been revealed and learn the token itself; with several all of them.
    """

    def __init__(
        self,
        source: Source,
        denoiser: Denoiser,
        settings: NoiseSettings,
        eos_id: int,
        rounds: Rounds,
        sub_steps: int = 1,
    ) -> None:
        super().__init__(source, denoiser, settings, eos_id)
        self.rounds, self.sub_steps = rounds, sub_steps

    def noised(
        self,
        rollout: Rollout,
        prompts: Sequence[Prompt],
        round_: Round,
        places: Sequence[tuple[int, int]],
        everywhere: int,
    ) -> Rollout:
        s, alphas, dt = self.settings, schedule(self.settings.schedule), self.rounds.dt(round_.step)
        blocks = blocks_of(rollout, prompts, self.denoiser)
        countable = rollout.completion_mask.clone()
        countable[:, 0] = False  # nothing predicts the first token
        masked, weight = torch.zeros_like(countable), torch.zeros(countable.shape)
        steps = torch.full_like(rollout.input_ids, -1)
        turn, late = round_.chance("time of a mask"), replace(s, low=dt, high=1.0)
        seeds = [request_seed(request_seed(round_.seed, round_.step, -3), place, copy) for place, copy in places]
        for b, length in enumerate(rollout.attention_mask.sum(1).tolist()):
            place, copy = places[b]
            generator = torch.Generator().manual_seed(seeds[b])
            number = int(blocks[b].max()) + 1
            share = (place / max(everywhere, 1) + copy) / s.copies
            times = times_of(number, turn + share / number if s.stratified else None, late, generator)
            t = times[blocks[b, :length]]
            u = torch.rand(length, dtype=torch.float64, generator=generator)
            masked[b, :length] = (u < 1 - alphas.alpha(t)) & countable[b, :length]
            later = [u < 1 - alphas.alpha((t - (j + 1) * dt).clamp_min(0)) for j in range(self.sub_steps)]
            steps[b, :length] = torch.stack(later).long().sum(0)  # nested: how many sub-steps it stays masked for
            weight[b, :length] = (alphas.weight(t) if s.weighting == "elbo" else torch.ones_like(t)).float()
        steps = steps.masked_fill(~masked, -1)
        heard = masked & (steps != REVEALED) if self.sub_steps == 1 else masked
        made = with_noise(
            rollout,
            self.denoiser,
            masked,
            rows=masked,
            countable=countable,
            weight=weight,
            blocks=blocks,
            seeds=seeds,
        )
        assert made.noise is not None
        return replace(made, step_map=steps, noise=replace(made.noise, no_suffix=heard))


class EarlierState(StudentTeacher):
    """The student as it was when a round began, or its average, asked about its text at t - dt.

    Its rows are those of t: what it says of tokens that it sees revealed is not read.

    Args:
        decay: of the average of the student's weights; 1: those of a round's beginning.
    """

    mask_token_id = -1  # the trainer says which

    def __init__(self, decay: float = 1.0) -> None:
        super().__init__("ema", decay)

    def dense(self, rollout: Rollout) -> HiddenRows:
        assert rollout.noise is not None and rollout.step_map is not None
        return super().dense(with_masks(rollout, rollout.noise.masked & (rollout.step_map != REVEALED)))

    @torch.no_grad()
    def become(self) -> None:
        """The student of now is what is asked from now on: a round begins."""
        self._fit()
        for name, parameter in self._trained():
            part = getattr(parameter, "ds_tensor", parameter)
            part = part.to_local() if hasattr(part, "to_local") else part
            self.average[name].copy_(part.detach())


class SubSteps(EarlierState):
    """The student as it was, which writes on from t in ancestral sub-steps: a token learns what is said of it in the
    one that reveals it, or in the last (SDTT, arXiv 2410.21035, algorithm 1; the paper's times, not the released
    code's). Of full attention, where there is no clean copy that must stay."""

    def __init__(self, decay: float = 1.0, sub_steps: int = 2) -> None:
        super().__init__(decay)
        self.sub_steps = sub_steps

    @torch.no_grad()
    def dense(self, rollout: Rollout) -> HiddenRows:
        assert rollout.noise is not None and rollout.step_map is not None
        at = rollout.completion_mask
        step_N, state = rollout.step_map[at], rollout
        found = StudentTeacher.dense(self, state)
        hidden = found.hidden_NH
        for j in range(self.sub_steps - 1):
            revealed_N = step_N == j
            ids = state.input_ids.clone()
            of_rows = ids[at]
            chosen = self._chosen(found, revealed_N, rollout, j)
            of_rows[revealed_N] = chosen
            ids[at] = of_rows
            assert state.noise is not None
            state = with_masks(replace(state, input_ids=ids), state.noise.masked & (rollout.step_map != j))
            found = StudentTeacher.dense(self, state)
            hidden = torch.where((step_N > j).to(hidden.device).unsqueeze(-1), found.hidden_NH, hidden)
        return replace(found, hidden_NH=hidden)

    def _chosen(self, found: HiddenRows, revealed_N: Tensor, rollout: Rollout, j: int) -> Tensor:
        """A draw of the tokens that the sub-step reveals, each sequence's with a generator of its own."""
        assert rollout.noise is not None
        u = torch.stack(
            [
                torch.rand(
                    rollout.input_ids.shape[1],
                    dtype=torch.float64,
                    generator=torch.Generator().manual_seed(request_seed(int(seed), j, -1)),
                )
                for seed in rollout.noise.seeds
            ]
        )[rollout.completion_mask][revealed_N]
        chosen = list[Tensor]()
        rows = revealed_N.nonzero().flatten()
        for start in range(0, len(rows), self.chunk_tokens):
            part = rows[start : start + self.chunk_tokens]
            (logits,) = found[part.to(found.hidden_NH.device)].chunk(slice(0, len(part)), None)
            cdf = without_mask_token(logits.double(), self.mask_token_id).softmax(-1).cumsum(-1).cpu()
            threshold = u[start : start + len(part), None] * cdf[:, -1:]
            chosen.append(torch.searchsorted(cdf, threshold, right=True).clamp_max(cdf.shape[-1] - 1).squeeze(-1))
        return torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.long)


def with_masks(rollout: Rollout, masked: Tensor) -> Rollout:
    """The noised text with these masks; its rows stay."""
    assert rollout.noise is not None
    return replace(rollout, noise=replace(rollout.noise, masked=masked))
