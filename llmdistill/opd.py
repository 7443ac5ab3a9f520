"""On-policy distillation: the student writes, the teacher judges every token, the student learns from that.

    accelerate launch -m llmdistill.opd --config recipes/quickstart.yaml

min_S  E_{y ~ S} sum_t D(S(.|y_<t), T(.|y_<t)), D = reverse KL by default (METHODS 2.1; Agarwal et al. 2306.13649;
Thinking Machines 2025). Three estimators of its gradient:

- ``full``: the whole distributions. Exact, the least variance; needs a teacher in this process.
- ``top_k``: K tokens and one bucket for the rest: a true divergence, never above the full one. ``support`` says whose
  likeliest they are: with the student's own a reverse KL sees most of its mass, with the teacher's a forward KL does.
- ``sampled``: the sampled token only, as a policy gradient. Unbiased at rollout temperature 1; the cheapest evidence.

The gradient is not taken through the sampling, and no future divergence is credited to a token (discount 0).

``sequences`` says whose text is trained on (:mod:`llmdistill.texts.sources`): with ``mixed`` this is GKD, with
``adaptive`` DistiLLM's schedule, and with ``dataset`` the teacher may be one that was stored (``teacher.stored``).

``reward_scale`` lambda != 1 is G-OPD (arXiv 2602.12125): the reward log T/R of a reference R is scaled against
KL(S || R); lambda > 1 (ExOPD) goes past the teacher. Several teachers, each for its ``domains``, are expert merging.

``reward`` adds a verified task reward, normalised over the samples of a prompt as in GRPO, to every token's advantage.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from transformers import PreTrainedModel

from llmdistill import methods
from llmdistill.composition.method import Method
from llmdistill.composition.term import Ask, Term
from llmdistill.errors import UserError
from llmdistill.methods.token_config import TokenConfig
from llmdistill.models.heads import head_of
from llmdistill.objectives.composed import extrapolated, extrapolated_sampled
from llmdistill.objectives.divergences import reverse_kl
from llmdistill.recipe.config import DistillationConfig, DType, TeacherConfig
from llmdistill.recipe.settings import Conflict, setting
from llmdistill.teachers.base import Teacher
from llmdistill.teachers.load import load_teachers
from llmdistill.teachers.local import UnadaptedTeacher
from llmdistill.texts.sources import Source
from llmdistill.training.method_trainer import MethodTrainer
from llmdistill.training.rewards import Reward, load_reward
from llmdistill.training.trainer import DistillationTrainer

INITIAL = "initial"


@dataclass
class OPDConfig(TokenConfig):
    """Settings of on-policy distillation, over :class:`~llmdistill.methods.token_config.TokenConfig`."""

    method: str = setting("opd", "opd (what follows), a file of llmdistill/methods, or package.module:NAME")
    reward_scale: float = setting(
        1.0, "G-OPD's lambda: scale of the reward log T/R; 1: plain OPD, > 1: ExOPD", at_least=0
    )
    plausibility: float = setting(
        0.1,
        "reward_scale > 1, estimator full: only tokens with T >= this share of the likeliest are extrapolated",
        at_least=0,
        at_most=1,
    )
    reference: str = setting(INITIAL, "R for reward_scale != 1: initial (the student's start), a model, or a URL")
    reference_trust_remote_code: bool = setting(False, "run model code that comes with the reference's checkpoint")
    reference_kl: float = setting(
        0.0, "weight of the reverse KL to the reference beside the divergence: a trust region", at_least=0
    )
    reward: str = setting("", "task reward: math or choice (verify data.answer_column), or package.module:function")
    reward_weight: float = setting(
        0.0, "weight of the group-normalised task reward beside the distillation advantage", at_least=0
    )

    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict(
            lambda s: s.xi is not None and s.reward_scale != 1,
            "objective.xi is {xi} and objective.reward_scale {reward_scale}; xi replaces the divergence that it scales",
            "--reward_scale 1, or leave xi out",
        ),
        Conflict(
            lambda s: s.reward_scale != 1 and (s.divergence != "reverse_kl" or s.estimator == "top_k"),
            "objective.reward_scale is {reward_scale}; it is defined for the reverse KL with estimator sampled or "
            "full, not {divergence} with {estimator}",
            "--reward_scale 1, or --divergence reverse_kl --estimator sampled",
        ),
        Conflict(
            lambda s: s.reward_scale != 1 and s.loss_temperature != 1,
            "objective.reward_scale is {reward_scale} and objective.loss_temperature {loss_temperature}; the "
            "extrapolated target is that of temperature 1",
            "use 1",
        ),
        Conflict(
            lambda s: s.reward_weight and s.sequences != "student",
            "objective.reward_weight is {reward_weight} and objective.sequences {sequences}; a reward teaches through "
            "tokens the student drew",
            "--sequences student",
        ),
        Conflict(
            lambda s: s.reward_weight and s.rollouts.temperature == 0,
            "objective.reward compares samples of a prompt, and at rollouts.temperature 0 they are all the same",
            "--rollouts.temperature 1",
        ),
        Conflict(
            lambda s: s.reward and s.rollouts.samples_per_prompt < 2,
            "objective.reward is normalised over the samples of a prompt, and rollouts.samples_per_prompt is 1",
            "--samples_per_prompt 4, say",
        ),
    )

    def build(self, source: Source | None = None) -> Method:
        """The composition these settings name."""
        scale, loss, judges = self.reward_scale, self.divergence_loss(), ["teacher"]
        if scale != 1:
            judges.append("reference")
            sampled = self.estimator == "sampled"
            loss = (
                extrapolated_sampled(scale, **self.sampler)
                if sampled
                else extrapolated(loss, scale, plausibility=self.plausibility)
            )
        method = self.composition(self.term(loss, judges), source)
        more = []
        if self.reward_weight:
            more.append(self.reward_term(self.reward_weight))
        if self.reference_kl:
            more.append(Term("reference", reverse_kl, (Ask("reference"),), weight=self.reference_kl, mean=self.mean))
        return replace(method, terms=(*method.terms, *more)) if more else method


class OPDTrainer(DistillationTrainer):
    """Distils ``teacher`` into ``model`` on the student's own samples, or on what ``args.sequences`` says.

    ``reference`` (a Teacher, a model, or its folder) goes before ``args.reference``, ``reward`` (a function of prompts
    and completions) before ``args.reward``, ``sequences`` (a source of
    :mod:`llmdistill.texts.sources`, or your own) before ``args.sequences``.

    Example::

        trainer = OPDTrainer("student", OPDConfig(output_dir="run"), teacher="teacher", train_dataset=prompts)
        trainer.train()

    Raises:
        UserError: ``reward_scale`` != 1 without a reference, or ``reward_weight`` without a reward.
    """

    args: OPDConfig

    def __init__(
        self,
        model: Any,
        args: OPDConfig,
        teacher: Any,
        *,
        reference: Teacher | PreTrainedModel | str | None = None,
        reward: Reward | None = None,
        sequences: Source | None = None,
        **kwargs: Any,
    ) -> None:
        scaled = args.reward_scale != 1 or args.reference_kl > 0
        if scaled and reference is None and not args.reference:
            what, plain = ("reward_scale", "1") if args.reward_scale != 1 else ("reference_kl", "0")
            raise UserError(
                f"objective.{what} is {getattr(args, what):g} and there is no reference; it weighs log R. "
                f"Fix: objective.reference initial, a folder or a URL, or --{what} {plain}."
            )
        if reward is not None and args.reward_weight and args.rollouts.samples_per_prompt < 2:
            raise UserError(
                "a reward is normalised over the samples of a prompt, and rollouts.samples_per_prompt is "
                f"{args.rollouts.samples_per_prompt}. Fix: 4, say."
            )
        if reward is None and args.reward:
            reward = load_reward(args.reward)
        if args.reward_weight and reward is None:
            raise UserError(
                f"objective.reward_weight is {args.reward_weight:g} and there is no reward. Fix: --reward math."
            )
        adapted = kwargs.get("peft_config") is not None
        named = args.reference if reference is None else reference
        if scaled and isinstance(named, str):
            alive = named == INITIAL and adapted
            reference = None if alive else _initial(model, args) if named == INITIAL else _named(named, args)
        super().__init__(
            model,
            args,
            teacher,
            method=args.build(sequences),
            judges={"reference": reference} if scaled and reference is not None else None,
            reward=reward,
            **kwargs,
        )
        if scaled and "reference" not in self.judges:  # the student's weights are frozen below its adapter
            self.judges["reference"] = UnadaptedTeacher(self.model, self.encode.tokenizer)


def _initial(model: Any, args: OPDConfig) -> Teacher | PreTrainedModel:
    """The student as it starts: a frozen copy."""
    path = model if isinstance(model, str) else model.config.name_or_path
    sharded = not isinstance(model, str) and hasattr(head_of(model).linear.weight, "ds_id")
    if isinstance(model, str) or (sharded and path):
        return _named(path, args, "float32")  # as the student is
    if sharded:
        raise UserError(
            "objective.reference is initial, and the student came in shards from nowhere. Fix: give reference a folder."
        )
    return copy.deepcopy(model)  # type: ignore[no-any-return]


def _named(reference: str, args: OPDConfig, dtype: DType = "bfloat16") -> Teacher:
    longest = args.rollouts.max_new_tokens + 1024
    remote = reference.startswith(("http://", "https://"))
    trusted = args.reference_trust_remote_code
    local = TeacherConfig(model=reference, dtype=dtype, trust_remote_code=trusted)
    config = TeacherConfig(url=reference) if remote else local
    return load_teachers([config], args.device, longest, ["objective.reference"])


SUMMARY = "On-policy distillation: the student samples, the teacher scores every token, the student learns from it."


def main(argv: Sequence[str]) -> int:
    """The command. Returns its exit status."""
    from llmdistill.pipeline.run import run
    from llmdistill.recipe.command_line import help_text, named, parse

    name = named(argv, "objective", "method") or "opd"
    config: type[DistillationConfig] = OPDConfig if name == "opd" else methods.config_class(name)
    if "--help" in argv or "-h" in argv:
        print(help_text(config, "llmdistill.opd", SUMMARY))
        return 0
    return run(parse(config, argv), OPDTrainer if name == "opd" else MethodTrainer)


if __name__ == "__main__":
    from llmdistill.recipe.command_line import run_front_door

    run_front_door(main, sys.argv[1:])
