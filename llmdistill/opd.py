"""On-policy distillation: the student writes, the teacher judges every token, the student learns from that.

    accelerate launch -m llmdistill.opd --config recipes/quickstart.yaml

min_S  E_{y ~ S} sum_t D(S(.|y_<t), T(.|y_<t)), D = reverse KL by default (METHODS 2.1; Agarwal et al. 2306.13649;
Thinking Machines 2025). Three estimators of its gradient:

- ``full``: the whole distributions. Exact, the least variance; needs a teacher in this process.
- ``top_k``: K tokens and one bucket for the rest: a true divergence, never above the full one. ``support`` says whose
  likeliest they are: with the student's own a reverse KL sees most of its mass, with the teacher's a forward KL does.
- ``sampled``: the sampled token only, as a policy gradient. Unbiased at rollout temperature 1; the cheapest evidence.

The gradient is not taken through the sampling, and no future divergence is credited to a token (discount 0).

``on_policy: false`` takes the dataset's completions instead of the student's samples: the teacher may then be one that
was stored (``teacher.stored``), and none has to run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from llmdistill.command_line import help_text, parse, run_front_door
from llmdistill.config import DistillationConfig, require
from llmdistill.errors import UserError
from llmdistill.objectives import divergences, policy, sparse
from llmdistill.run import run
from llmdistill.support import Support
from llmdistill.teachers.evidence import Kind
from llmdistill.trainer import DistillationTrainer, Objective

Divergence = Literal[
    "reverse_kl",
    "forward_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "adaptive_kl",
    "f_divergence",
]
# The one parameter a divergence may have, and the setting that gives it.
PARAMETER = {
    "jsd": "beta",
    "skew_forward_kl": "alpha",
    "skew_reverse_kl": "alpha",
    "adaptive_kl": "head_mass",
    "f_divergence": "name",
}


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help, "section": "objective"})


@dataclass
class OPDConfig(DistillationConfig):
    """Settings of on-policy distillation, over :class:`~llmdistill.config.DistillationConfig`."""

    divergence: Divergence = _setting("reverse_kl", "what is minimised, per token")
    beta: float | None = _setting(None, "jsd: weight of the teacher in the mixture (0: forward KL, 1: reverse KL)")
    alpha: float | None = _setting(None, "skew_forward_kl, skew_reverse_kl: weight of the other side, default 0.1")
    head_mass: float | None = _setting(None, "adaptive_kl: teacher mass of the head, default 0.5")
    name: str | None = _setting(None, "f_divergence: which f")
    estimator: Kind = _setting("full", "full, top_k (with a tail bucket) or sampled")
    top_k: int = _setting(64, "tokens listed by the top_k estimator")
    support: Support = _setting("teacher", "whose likeliest tokens those are: teacher, student, or union (both lists)")
    loss_temperature: float = _setting(1.0, "divides both logits in the loss; apart from rollouts.temperature")
    on_policy: bool = _setting(True, "false: train on the dataset's completions, not on samples of the student")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.loss_temperature > 0, "objective.loss_temperature", self.loss_temperature, "> 0", "use 1")
        require(self.top_k >= 1, "objective.top_k", self.top_k, ">= 1", "use 64")
        takes = PARAMETER.get(self.divergence)
        for name in sorted(set(PARAMETER.values())):
            if getattr(self, name) is not None and name != takes:
                raise UserError(
                    f"objective.{name} is set, and objective.divergence {self.divergence} does not read it. "
                    f"Fix: leave {name} out, or choose a divergence that has it."
                )
        if takes in ("beta", "name") and getattr(self, takes) is None:
            raise UserError(f"objective.divergence {self.divergence} needs objective.{takes}")
        if self.estimator == "sampled" and self.divergence != "reverse_kl":
            raise UserError(
                f"objective.estimator sampled estimates the reverse KL, objective.divergence is {self.divergence}. "
                "Fix: --estimator full or top_k."
            )
        if self.estimator == "sampled" and not self.on_policy:
            raise UserError(
                "objective.on_policy is false, and objective.estimator sampled needs tokens that the student drew. "
                "Fix: --estimator full or top_k."
            )
        if self.support != "teacher" and self.estimator != "top_k":
            raise UserError(
                f"objective.support is {self.support}, and objective.estimator {self.estimator} lists no tokens. "
                "Fix: --estimator top_k, or leave support out."
            )
        if self.estimator == "top_k" and self.loss_temperature != 1:
            raise UserError(
                f"objective.loss_temperature is {self.loss_temperature}; top-k evidence of a full softmax cannot be "
                "tempered exactly. Fix: use 1, or --estimator full."
            )

    def objective(self) -> Objective:
        """The composition these settings name."""
        if self.estimator == "sampled":
            return Objective(partial(policy.sampled_token, temperature=self.loss_temperature), "sampled")
        family = divergences if self.estimator == "full" else sparse
        takes = PARAMETER.get(self.divergence)
        given = {takes: getattr(self, takes)} if takes and getattr(self, takes) is not None else {}
        loss = partial(getattr(family, self.divergence), temperature=self.loss_temperature, **given)
        return Objective(loss, self.estimator, self.top_k if self.estimator == "top_k" else 0, self.support)


class OPDTrainer(DistillationTrainer):
    """Distils ``teacher`` into ``model`` on the student's own samples (``on_policy``), or on the dataset's completions.

    Example::

        trainer = OPDTrainer("student", OPDConfig(output_dir="run"), teacher="teacher", train_dataset=prompts)
        trainer.train()
    """

    def __init__(self, model: Any, args: OPDConfig, teacher: Any, **kwargs: Any) -> None:
        super().__init__(model, args, teacher, objective=args.objective(), **{"on_policy": args.on_policy, **kwargs})


SUMMARY = "On-policy distillation: the student samples, the teacher scores every token, the student learns from it."


def main(argv: Sequence[str]) -> int:
    """The command. Returns its exit status."""
    if "--help" in argv or "-h" in argv:
        print(help_text(OPDConfig, "llmdistill.opd", SUMMARY))
        return 0
    return run(parse(OPDConfig, argv), OPDTrainer)


if __name__ == "__main__":
    run_front_door(main, sys.argv[1:])
