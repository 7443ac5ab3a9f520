"""TAID and other off-policy distillation: the teacher judges every token of a text that was there before.

    accelerate launch -m llmdistill.taid --config recipes/taid.yaml

min_S  E_{y ~ data} sum_t D(S(.|y_<t), T(.|y_<t)), by default KL(p_t || S) with p_t on the way from the student to the
teacher (arXiv 2501.16937): ``objectives/taid.py`` has the formula and the schedule. On the same front door its
baselines: forward and reverse KL, JSD, skew KL, total variation, adaptive KL, any f-divergence.

The text is the dataset's, or the teacher's own (``sequences: teacher``). The teacher may be in this process, a service,
or stored score blocks; from top-k evidence TAID interpolates K tokens and a bucket.

t moves once per optimizer step, by the mean loss of the global batch, alike on every rank; it is in the checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from transformers import TrainerCallback

from llmdistill.errors import UserError
from llmdistill.methods.token_config import Divergence, TokenConfig, setting
from llmdistill.objectives.metrics import target_entropy
from llmdistill.objectives.taid import TAIDSchedule, sparse_taid, taid
from llmdistill.pipeline.run import run
from llmdistill.recipe.command_line import help_text, parse, run_front_door
from llmdistill.recipe.config import require
from llmdistill.training import sequences as data_policy
from llmdistill.training.method import Objective
from llmdistill.training.trainer import DistillationTrainer

TAIDDivergence = Literal["taid", Divergence]


@dataclass
class TAIDConfig(TokenConfig):
    """Settings of off-policy distillation, over :class:`~llmdistill.methods.token_config.TokenConfig`."""

    divergence: TAIDDivergence = setting("taid", "what is minimised, per token")  # type: ignore[assignment]
    sequences: data_policy.Kind = setting("dataset", "text trained on: dataset, teacher, student, mixed or adaptive")
    t_start: float = setting(0.4, "taid: share of the teacher in the target at the start (paper: .4 or .2)")
    t_end: float = setting(1.0, "taid: and at most")
    t_rate: float = setting(5e-4, "taid: alpha, how far a step moves t at most; 0: only along the line")
    t_momentum: float = setting(0.99, "taid: beta, memory of the loss's relative change")
    t_driver: Literal["kl", "cross_entropy"] = setting(
        "kl", "taid: what moves t, KL(p_t || S) as in the paper or the cross-entropy as in its released code"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence != "taid":
            self.refuse_set(("t_start", "t_end", "t_rate", "t_momentum", "t_driver"), f"divergence {self.divergence}")
        else:
            needed = "> 0: at 0 the target is the student itself, and there is nothing to learn"
            require(self.t_start > 0, "objective.t_start", self.t_start, needed, "use 0.2")
            try:
                self.schedule()
            except ValueError as error:
                raise UserError(
                    f"objective.t_start, t_end, t_rate, t_momentum: {error}. Fix: leave them out."
                ) from None

    def schedule(self) -> TAIDSchedule:
        """As it is before the first step; the trainer tells it how many there will be."""
        return TAIDSchedule(self.t_start, self.t_end, self.t_rate, self.t_momentum)

    def objective(self) -> Objective:
        """The composition these settings name."""
        common: dict[str, Any] = dict(importance_cap=self.cap, temperature=self.sampled_at)
        if self.divergence != "taid":
            return Objective(self.divergence_loss(), self.estimator, self.listed, self.support, **common)
        schedule, temperature = self.schedule(), self.loss_temperature

        def loss(student_logits: Tensor, *evidence: Tensor) -> Tensor:
            function: Callable[..., Tensor] = taid if self.estimator == "full" else sparse_taid
            return function(student_logits, *evidence, t=schedule.t, temperature=temperature)

        def entropy(student_logits: Tensor, *evidence: Tensor) -> dict[str, Tensor]:
            return target_entropy(student_logits, *evidence, t=schedule.t, temperature=temperature)

        watch = entropy if self.t_driver == "cross_entropy" else None
        return Objective(loss, self.estimator, self.listed, self.support, schedule=schedule, watch=watch, **common)


class TAIDTrainer(DistillationTrainer):
    """Distils ``teacher`` into ``model`` on text that was there before, towards a target between the two.

    Example::

        trainer = TAIDTrainer("student", TAIDConfig(output_dir="run"), teacher="teacher", train_dataset=rows)
        trainer.train()
    """

    args: TAIDConfig

    def __init__(
        self,
        model: Any,
        args: TAIDConfig,
        teacher: Any,
        *,
        sequences: data_policy.Sequences | None = None,
        **kwargs: Any,
    ) -> None:
        policy = args.data_policy(sequences)
        super().__init__(model, args, teacher, objective=args.objective(), sequences=policy, **kwargs)
        if isinstance(self.objective.schedule, TAIDSchedule):
            self.add_callback(_Length(self.objective.schedule))


class _Length(TrainerCallback):
    """Tells the schedule how many optimizer steps there will be, which epochs and devices decide."""

    def __init__(self, schedule: TAIDSchedule) -> None:
        self.schedule = schedule

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.schedule.num_steps = state.max_steps


SUMMARY = "Off-policy distillation: TAID and its baselines on the dataset's or the teacher's text."


def main(argv: Sequence[str]) -> int:
    """The command. Returns its exit status."""
    if "--help" in argv or "-h" in argv:
        print(help_text(TAIDConfig, "llmdistill.taid", SUMMARY))
        return 0
    return run(parse(TAIDConfig, argv), TAIDTrainer)


if __name__ == "__main__":
    run_front_door(main, sys.argv[1:])
