"""Whether what a trainer was given fits together. The preflight of the front doors looks deeper, and at recipes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmdistill.errors import UserError
from llmdistill.teachers.local import LocalTeacher, UnadaptedTeacher
from llmdistill.teachers.mixture import UNKNOWN_FIX, RoutedTeacher
from llmdistill.texts import Prompt
from llmdistill.tokenization.special import context_length

if TYPE_CHECKING:
    from llmdistill.training.trainer import DistillationTrainer


def check_parts(trainer: DistillationTrainer) -> None:
    """Called by the trainer's constructor.

    Raises:
        UserError: a task reward teaches through text that the student did not write.
    """
    if trainer.reward_weight and trainer.data_policy.uses != {"student"}:
        text = ", ".join(sorted(trainer.data_policy.uses))
        raise UserError(
            f"reward_weight is {trainer.reward_weight:g} and the text is of {text}: a reward is compared over fresh "
            "samples of one prompt. Fix: sequences student, or reward_weight 0."
        )


def check_ready(trainer: DistillationTrainer) -> None:
    """Called before training.

    Raises:
        UserError: the student is its own teacher, the objective reads a reference and there is none, or a row has no
            teacher.
    """
    for role, judge in (("teacher", trainer.teacher), ("reference", trainer.reference)):
        own = isinstance(judge, LocalTeacher) and not isinstance(judge, UnadaptedTeacher)
        if own and judge.model is trainer.model:  # type: ignore[union-attr]
            raise UserError(
                f"{role} is the student itself, which would be frozen by it. Fix: {role}=copy.deepcopy(model)."
            )
    if trainer.objective.reference and trainer.reference is None:
        raise UserError("the objective reads a reference model, and there is none. Fix: reference=MODEL.")
    prompts: Sequence[Prompt] = trainer.train_dataset or []  # type: ignore[assignment]
    if isinstance(trainer.teacher, RoutedTeacher):
        for p in prompts:
            if trainer.teacher.route(p.domain) is None:
                raise UserError(f"row {p.row} {trainer.teacher.unknown(p.domain)}. Fix: {UNKNOWN_FIX}.")
    sampled = trainer.args.rollouts.max_new_tokens if trainer.data_policy.uses != {"dataset"} else 0
    limit = min(context_length(trainer.model.config), trainer.teacher.info().context_length)
    lengths = ((len(p.ids) + max(sampled, len(p.completion)), p.row) for p in prompts)
    needed, row = max(lengths, key=lambda pair: pair[0], default=(0, 0))
    if needed > limit:
        warnings.warn(
            f"row {row} and its completion may need {needed} positions, and the models have {limit}; past "
            "those they say nothing of worth. Fix: lower rollouts.max_new_tokens or data.max_prompt_tokens.",
            stacklevel=3,
        )
