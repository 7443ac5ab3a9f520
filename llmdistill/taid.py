"""TAID and other off-policy distillation: the teacher judges every token of a text that was there before.

    accelerate launch -m llmdistill.taid --config recipes/taid.yaml

min_S  E_{y ~ data} sum_t D(S(.|y_<t), T(.|y_<t)), by default KL(p_t || S) with p_t on the way from the student to the
teacher (arXiv 2501.16937): ``objectives/taid.py`` has the formula and the schedule. On the same front door its
baselines: forward and reverse KL, JSD, skew KL, total variation, adaptive KL, any f-divergence.

The text is the dataset's, or the teacher's own (``sequences: teacher``). The teacher may be in this process, a service,
or stored score blocks. TAID itself needs whole distributions: interpolated buckets would put the tail's mass where
neither model has it.

t moves once per optimizer step, by the mean loss of the global batch, alike on every rank; it is in the checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from llmdistill.composition.method import Measured, Method, Schedule
from llmdistill.methods.token_config import Divergence, TokenConfig
from llmdistill.objectives.metrics import target_entropy
from llmdistill.objectives.taid import TAIDSchedule, taid
from llmdistill.recipe.settings import Conflict, setting
from llmdistill.texts import sources
from llmdistill.texts.sources import Source
from llmdistill.training.trainer import DistillationTrainer

TAIDDivergence = Literal["taid", Divergence]
TAID = {"divergence": ("taid",)}  # what reads the settings of t


@dataclass
class TAIDConfig(TokenConfig):
    """Settings of off-policy distillation, over :class:`~llmdistill.methods.token_config.TokenConfig`."""

    divergence: TAIDDivergence = setting("taid", "what is minimised, per token")  # type: ignore[assignment]
    sequences: sources.Kind = setting("dataset", "text trained on: dataset, teacher, student, mixed or adaptive")
    t_start: float = setting(
        0.4,
        "taid: share of the teacher in the target at the start (paper: .4 or .2); at 0 there is nothing to learn",
        above=0,
        at_most=1,
        read_by=TAID,
    )
    t_end: float = setting(1.0, "taid: and at most", above=0, at_most=1, read_by=TAID)
    t_rate: float = setting(
        5e-4, "taid: alpha, how far a step moves t at most; 0: only along the line", at_least=0, read_by=TAID
    )
    t_momentum: float = setting(
        0.99, "taid: beta, memory of the loss's relative change", at_least=0, below=1, read_by=TAID
    )
    t_driver: Literal["kl", "cross_entropy"] = setting(
        "kl",
        "taid: what moves t, KL(p_t || S) as in the paper or the cross-entropy as in its released code",
        read_by=TAID,
    )

    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict(
            lambda s: s.divergence == "taid" and s.estimator != "full",
            "objective.estimator is {estimator}; it must be full for divergence taid: a target between two models is "
            "no function of listed tokens and one bucket",
            "--estimator full, or another divergence",
        ),
        Conflict(
            lambda s: s.t_start > s.t_end,
            "objective.t_start is {t_start} and objective.t_end {t_end}; t goes up",
            "a t_start of at most t_end",
        ),
    )

    def schedule(self) -> TAIDSchedule:
        """As it is before the first step; the trainer tells it how many there will be."""
        return TAIDSchedule(self.t_start, self.t_end, self.t_rate, self.t_momentum)

    def build(self, source: Source | None = None) -> Method:
        """The composition these settings name."""
        if self.divergence != "taid":
            return self.composition(self.term(self.divergence_loss()), source)
        schedule, temperature = self.schedule(), self.loss_temperature

        def loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
            return taid(student_logits, teacher_logits, t=schedule.t, temperature=temperature)

        def entropy(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
            values = target_entropy(student_logits, teacher_logits, t=schedule.t, temperature=temperature)
            return values["target_entropy"]

        by_cross_entropy = self.t_driver == "cross_entropy"
        term = self.term(loss, watch={"target_entropy": entropy} if by_cross_entropy else {})
        return self.composition(term, source, {"t": Interpolation(schedule, by_cross_entropy)})


@dataclass
class Interpolation(Schedule):
    """TAID's t as a method's schedule: moved by KL(p_t || S), or by the cross-entropy: p_t's entropy added."""

    schedule: TAIDSchedule
    by_cross_entropy: bool = False

    def start(self, total_steps: int) -> None:
        self.schedule.num_steps = total_steps

    def update(self, measured: Measured) -> None:
        entropy = measured.watched["divergence", "target_entropy"] if self.by_cross_entropy else 0.0
        self.schedule.update(measured.losses["divergence"] + entropy, measured.step)

    def numbers(self) -> dict[str, float]:
        return {"schedule": self.schedule.t}

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.schedule.load_state_dict(state)


class TAIDTrainer(DistillationTrainer):
    """Distils ``teacher`` into ``model`` on text that was there before, towards a target between the two.

    Example::

        trainer = TAIDTrainer("student", TAIDConfig(output_dir="run"), teacher="teacher", train_dataset=rows)
        trainer.train()
    """

    args: TAIDConfig

    def __init__(
        self, model: Any, args: TAIDConfig, teacher: Any, *, sequences: Source | None = None, **kwargs: Any
    ) -> None:
        super().__init__(model, args, teacher, method=args.build(sequences), **kwargs)


SUMMARY = "Off-policy distillation: TAID and its baselines on the dataset's or the teacher's text."


def main(argv: Sequence[str]) -> int:
    """The command. Returns its exit status."""
    from llmdistill.pipeline.run import run
    from llmdistill.recipe.command_line import help_text, parse

    if "--help" in argv or "-h" in argv:
        print(help_text(TAIDConfig, "llmdistill.taid", SUMMARY))
        return 0
    return run(parse(TAIDConfig, argv), TAIDTrainer)


if __name__ == "__main__":
    from llmdistill.recipe.command_line import run_front_door

    run_front_door(main, sys.argv[1:])
