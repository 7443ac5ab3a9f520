"""Settings of ``stage: distill_steps``, and the method they name: many denoising steps distilled into few.

A forward KL to a calibrated teacher at temperature 1 teaches nothing: see :mod:`llmdistill.diffusion.steps`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from llmdistill.composition.method import Measured, Method, Schedule
from llmdistill.composition.term import Ask, Term
from llmdistill.diffusion.losses import without_mask_token
from llmdistill.diffusion.noised_view import Denoiser
from llmdistill.diffusion.noising import NoiseSettings, Norm, Weighting
from llmdistill.diffusion.stages import DiffusionConfig, ScheduleName
from llmdistill.diffusion.step_states import Coupled, EarlierState, Rounds, SubSteps
from llmdistill.diffusion.terms import MEANS, masked_ce
from llmdistill.objectives.divergences import forward_kl, reverse_kl
from llmdistill.recipe.settings import Conflict, setting
from llmdistill.texts.sources import Only

Apart = Literal["reverse_kl", "forward_kl", "jeffreys"]


@dataclass
class StepDistillationConfig(DiffusionConfig):
    """Settings of ``stage: distill_steps``: the student is its own teacher, a step earlier on its trajectory."""

    unread: ClassVar = ("teacher", "teachers")

    stage: str = setting(
        "distill_steps", "from_ar, sft, rl, distill_ar, opd or distill_steps: which settings these are"
    )
    algorithm: Literal["mcd", "sdtt"] = setting(
        "mcd", "mcd: the teacher reads the text at t - dt; sdtt: it writes on from t, in sub-steps of dt"
    )
    divergence: Apart = setting("reverse_kl", "what is minimised at tokens that are masked at both times")
    first_step: float = setting(1 / 64, "dt in the first round; it doubles in every one", above=0, below=1)
    rounds: int = setting(1, "how often the teacher becomes the student of then, and dt doubles, the first included")
    round_steps: int = setting(1000, "optimizer steps of a round", at_least=1)
    teacher_decay: float = setting(
        1.0, "of the average of the student's weights that is the teacher; 1: those of a round's beginning", above=0
    )
    teacher_temperature: float = setting(1.0, "divides the teacher's logits in the first round", above=0)
    last_temperature: float | None = setting(None, "and in the last one, linearly; unset: the same", above=0)
    sub_steps: int = setting(2, "of the teacher", at_least=2, read_by={"algorithm": ("sdtt",)})
    schedule: ScheduleName = setting("linear", "masked share over time: a schedule of diffusion.schedules")
    weighting: Weighting = setting("uniform", "of times: uniform, or elbo (-alpha' / (1 - alpha))")
    norm: Norm = setting("token", "token, sequence, batch or masked: what the weighted sum is divided by")
    stratified: bool = setting(True, "times of a batch, and of a sequence's blocks and copies, cover the interval")
    copies: int = setting(1, "noised copies of every sequence in a step", at_least=1)

    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict(
            lambda s: s.rounds < 1 or s.first_step * 2 ** (s.rounds - 1) >= 1,
            "objective.rounds is {rounds} and objective.first_step {first_step}: in the last round dt must be below 1",
            "fewer rounds, or a smaller first_step",
        ),
        Conflict(lambda s: s.teacher_decay > 1, "objective.teacher_decay is {teacher_decay}", "--teacher_decay 0.999"),
        Conflict(
            lambda s: s.weighting == "cart",
            "objective.weighting is {weighting}, which weighs one mask, and there are two",
            "--weighting uniform",
        ),
        Conflict(
            lambda s: s.algorithm == "sdtt" and s.block_size,
            "objective.algorithm is sdtt and objective.block_size {block_size}: what the teacher writes would stand in "
            "the clean text of later blocks",
            "--algorithm mcd",
        ),
    )

    def plan(self) -> Rounds:
        """The rounds these settings name."""
        last = self.teacher_temperature if self.last_temperature is None else self.last_temperature
        return Rounds(self.rounds, self.round_steps, self.first_step, (self.teacher_temperature, last))

    def judge(self) -> EarlierState:
        """The teacher, not bound to a student yet."""
        if self.algorithm == "mcd":
            return EarlierState(self.teacher_decay)
        return SubSteps(self.teacher_decay, self.sub_steps)

    def build(self, denoiser: Denoiser, eos_id: int, *, documents: bool = False) -> Method:
        rounds, fill = RoundsSchedule(self.plan()), 0 if documents else denoiser.block_size or 0
        noise = NoiseSettings(
            schedule=self.schedule,
            weighting=self.weighting,
            norm=self.norm,
            stratified=self.stratified,
            copies=self.copies,
            fill=fill,
        )
        sub_steps = 1 if self.algorithm == "mcd" else self.sub_steps
        source = Coupled(Only("dataset"), denoiser, noise, eos_id, rounds.rounds, sub_steps)
        term = consistency(denoiser.mask_token_id, self.divergence, lambda: rounds.temperature, self.norm)
        return Method((term,), {"main": source}, {"rounds": rounds})


class RoundsSchedule(Schedule):
    """Which round it is. It follows from the number of steps, and is kept so that a checkpoint says it."""

    state = ("step",)

    def __init__(self, rounds: Rounds) -> None:
        self.rounds, self.step = rounds, 0

    def update(self, measured: Measured) -> None:
        self.step = measured.step

    @property
    def temperature(self) -> float:
        """Of the teacher, now."""
        return self.rounds.temperature(self.step)

    def numbers(self) -> dict[str, float]:
        return {
            "round": float(self.rounds.number(self.step)),
            "dt": self.rounds.dt(self.step),
            "teacher_temperature": self.temperature,
        }


def consistency(mask_id: int, divergence: Apart, temperature: Callable[[], float], norm: Norm) -> Term:
    """The divergence to the teacher where the row's token is masked at both times, cross-entropy where it was revealed
    in between: a forward KL to the teacher's certainty, whose reverse is infinite."""
    ce = masked_ce(mask_id)

    def apart(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        if divergence == "jeffreys":
            return (forward_kl(student_logits, teacher_logits) + reverse_kl(student_logits, teacher_logits)) / 2
        return (forward_kl if divergence == "forward_kl" else reverse_kl)(student_logits, teacher_logits)

    def loss(
        student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor, noise_weight: Tensor, heard: Tensor
    ) -> Tensor:
        target = without_mask_token(teacher_logits, mask_id) / temperature()
        values = apart(without_mask_token(student_logits, mask_id), target)
        return torch.where(heard, values, ce(student_logits, tokens)) * noise_weight

    def of_labels(student_logits: Tensor, *evidence: Tensor) -> Tensor:
        return ce(student_logits, *evidence, tokens=1)

    reads = ("tokens", "noise_weight", "no_suffix")
    measures = {"masked_ce": of_labels}
    return Term("consistency", loss, (Ask("teacher"),), reads, mean=MEANS[norm], measures=measures, vanishes=False)
