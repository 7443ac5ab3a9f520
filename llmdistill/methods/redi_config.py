"""Settings of REDI and of what it is compared with: the loss over pairs, both stages, the guard."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import partial
from typing import ClassVar, Literal

from llmdistill.objectives.redi import redi_loss, simpo_loss
from llmdistill.recipe.settings import Conflict, check_conflicts, setting
from llmdistill.training.pair_losses import PairLoss
from llmdistill.training.pair_trainer import PairConfig

Method = Literal["redi", "sft", "symmetric", "dpo", "simpo"]
# Settings of stage 2, and those that say the same of stage 1.
OF_STAGE_1 = {
    "learning_rate": "stage1_learning_rate",
    "max_steps": "stage1_steps",
    "num_train_epochs": "stage1_epochs",
    "per_device_train_batch_size": "stage1_batch_size",
    "gradient_accumulation_steps": "stage1_accumulation",
}
OF_TRL = Conflict(
    lambda s: not s.on_pairs,
    "objective.method is {method}, which TRL trains: REDITrainer takes redi, symmetric and simpo",
    "accelerate launch -m llmdistill.redi",
)
GUARD = ("guard_drop", "guard_rejected_drop", "guard_stop", "guard_window")


@dataclass
class REDIConfig(PairConfig):
    """Settings of REDI and its baselines. Those of the section ``train`` are stage 2's; stage 1 shares all of them
    that have no ``stage1_`` setting of their own (warm-up, weight decay, precision, checkpoints, seed)."""

    learning_rate: float = field(default=1e-6, metadata={"help": "peak learning rate of stage 2"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "epochs of stage 2"})

    method: Method = setting("redi", "redi, symmetric, simpo or dpo on pairs after stage 1; sft: stage 1 alone")
    # Where None is given, the values of the papers.
    alpha: float | None = setting(
        None,
        "redi: weight of the rejected side, default 0.8; 0: none",
        at_least=0,
        at_most=1,
        default_by={"method": {"redi": 0.8}},
    )
    gamma: float | None = setting(
        None,
        "redi, symmetric: exp(gamma b) on the rejected side's mean log-prob b, default 0",
        at_least=0,
        default_by={"method": {"redi": 0.0, "symmetric": 0.0}},
    )
    beta: float | None = setting(
        None,
        "simpo: slope, default 2; dpo: strength of the reference, default 0.001",
        above=0,
        default_by={"method": {"simpo": 2.0, "dpo": 0.001}},
    )
    margin: float | None = setting(
        None, "simpo: margin to be reached, default 1", default_by={"method": {"simpo": 1.0}}
    )
    positives: str = setting(
        "", "file or hub dataset of stage 1: prompts with a chosen side; empty: that of data.train"
    )
    stage1_epochs: float = setting(
        3.0, "epochs of stage 1; 0: skipped, the student is an SFT checkpoint already", at_least=0
    )
    stage1_steps: int = setting(
        0, "optimizer steps of stage 1 in place of epochs; 0: as stage1_epochs says", at_least=0
    )
    stage1_learning_rate: float = setting(5e-5, "peak learning rate of stage 1", at_least=0)
    stage1_batch_size: int = setting(
        8, "sequences of a micro-batch of stage 1, per process (the paper: 128 a step)", at_least=1
    )
    stage1_accumulation: int = setting(1, "micro-batches of an optimizer step of stage 1", at_least=1)

    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict(
            lambda s: s.guard_stop and not s.on_pairs,  # who counts on it would train past where it should have stopped
            "objective.guard_stop is true, and objective.method {method} has no guard: its loss is bounded",
            "leave guard_stop out",
        ),
        Conflict(
            lambda s: s.rejected_tokens != "all" and s.method == "dpo",
            "objective.rejected_tokens is {rejected_tokens}, and TRL's dpo reads whole completions",
            "leave it out, or --method redi, symmetric or simpo",
        ),
        Conflict(
            lambda s: s.method == "sft" and not s.has_stage1,
            "objective.method sft is stage 1 alone, and objective.stage1_epochs 0 skips it",
            "use 3",
        ),
        Conflict(
            lambda s: s.positives and not s.has_stage1,
            "objective.positives is {positives!r}, and objective.stage1_epochs 0 skips the stage that reads it",
            "leave one of them out",
        ),
    )

    def not_read(self) -> list[str]:
        """What is set and means nothing to the method. No error: a recipe for all methods has some of it."""
        defaults = {f.name: f.default for f in fields(self)}
        unguarded = () if self.on_pairs else GUARD
        unread = [f"objective.{n} (it has no guard)" for n in unguarded if getattr(self, n) != defaults[n]]
        for name, stage1_name in OF_STAGE_1.items() if self.method == "sft" else ():
            if getattr(self, name) != defaults[name]:
                unread.append(f"train.{name} (stage 2's; objective.{stage1_name} is read)")
        return unread

    @property
    def has_stage1(self) -> bool:
        return self.stage1_epochs > 0 or self.stage1_steps > 0

    @property
    def on_pairs(self) -> bool:
        """Whether stage 2 is :class:`REDITrainer`'s: ``dpo`` is TRL's, ``sft`` has none."""
        return self.method not in ("dpo", "sft")

    def loss(self) -> PairLoss:
        """The pair loss these settings name.

        Raises:
            UserError: a method that is trained by TRL.
        """
        check_conflicts(self, (OF_TRL,))
        if self.method == "simpo":
            assert self.beta is not None and self.margin is not None
            return partial(simpo_loss, beta=self.beta, margin=self.margin)
        alpha = 1.0 if self.method == "symmetric" else self.alpha
        return partial(redi_loss, alpha=alpha, gamma=self.gamma)  # type: ignore[arg-type]
