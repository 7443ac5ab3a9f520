"""StepDistillationTrainer: a masked diffusion student that learns to need fewer steps, over the one loop."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from llmdistill.diffusion.step_states import EarlierState, Rounds
from llmdistill.diffusion.steps_stage import StepDistillationConfig
from llmdistill.diffusion.trainers import MaskedDiffusionTrainer
from llmdistill.errors import UserError


class StepDistillationTrainer(MaskedDiffusionTrainer):
    """Distils ``model``, a denoiser, into one that needs fewer steps; the teacher is the model itself.

    ``args`` are a :class:`~llmdistill.diffusion.steps_stage.StepDistillationConfig`. The teacher's weights are in
    checkpoints and never in what is saved as the student.

    Example::

        args = StepDistillationConfig(output_dir="run", first_step=1 / 16, rounds=3, round_steps=200)
        StepDistillationTrainer("denoiser", args, train_dataset=rows).train()

    Raises:
        UserError: a teacher, and what :class:`~llmdistill.diffusion.trainers.MaskedDiffusionTrainer` raises.
    """

    args: StepDistillationConfig  # type: ignore[assignment]

    def __init__(self, model: Any, args: StepDistillationConfig, teacher: Any = None, **kwargs: Any) -> None:
        if teacher is not None:
            raise UserError(
                "stage distill_steps has the student's own start for its teacher, and another was given. "
                "Fix: leave teacher out, and begin with that model as the student."
            )
        judge = args.judge()
        super().__init__(model, args, judge, **kwargs)
        judge.mask_token_id = self.denoiser.mask_token_id
        self.add_callback(_Beginnings(judge, args.plan()))


class _Beginnings(TrainerCallback):
    """Where a round begins, its teacher is the student of then. Before a checkpoint of that step is written."""

    def __init__(self, judge: EarlierState, rounds: Rounds) -> None:
        self.judge, self.rounds = judge, rounds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.rounds.begins(state.global_step):
            self.judge.become()
