"""The methods of the arena and the trainers that run them: ours, and TRL's where TRL is the peer or the baseline.

A method says which prompts it trains on and who wrote the text; the rest is its objective. All start from the same
weights, with one learning rate, batch and optimizer per track unless the track says otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from clock import Curve
from datasets import Dataset
from models import TOKENIZER
from task import longest
from told import context
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
)
from trl import DistillationConfig as TRLDistillationConfig
from trl import DistillationTrainer as TRLDistillationTrainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from llmdistill import methods as compositions
from llmdistill.methods.sdpo import successes
from llmdistill.opd import OPDConfig, OPDTrainer
from llmdistill.recipe.config import RolloutConfig
from llmdistill.recipe.data_config import DataConfig
from llmdistill.record.run_folder import RunFolderCallback
from llmdistill.redi import REDIConfig, REDITrainer
from llmdistill.taid import TAIDConfig, TAIDTrainer
from llmdistill.teachers.base import Teacher
from llmdistill.teachers.student import StudentTeacher
from llmdistill.texts.sources import Adaptive, Drawn, Round
from llmdistill.training.method_trainer import MethodTrainer

Row = dict[str, str]


@dataclass
class Data:
    """What a track offers to train on. Every row of ``labelled`` has a true completion, of ``fresh`` the teacher's."""

    labelled: Sequence[Row] = ()
    fresh: Sequence[Row] = ()
    checked: Sequence[Row] = ()  # the fresh prompts, with the truth that an answer is checked against
    fixed: Sequence[Row] = ()  # few of the fresh ones: an offline set
    mistakes: Sequence[Row] = ()  # true text into which mistakes were put, with their repairs
    noised: Sequence[Row] = ()  # the fresh ones, some of their digits others
    right: Sequence[Row] = ()  # samples of the teacher whose answer is right
    pairs: Sequence[Row] = ()  # prompt, chosen (right), rejected (wrong)


@dataclass
class Setting:
    """All that a trainer is built from."""

    model: PreTrainedModel
    teacher: Teacher
    data: Data
    curve: Curve
    folder: Path
    seed: int
    lr: float
    batch: int
    steps: int  # about as many as the token budget takes: schedules over training end there
    tokenizer: PreTrainedTokenizerBase = TOKENIZER  # the student's
    same: Teacher | None = None  # another teacher: across tokenizers of the student's own, else of a control
    longest: int = longest()  # tokens of a completion

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """Settings of transformers that all trainers share. The curve ends the run, long before ``max_steps``."""
        shared = dict(
            output_dir=str(self.folder),
            per_device_train_batch_size=self.batch,
            learning_rate=self.lr,
            # Constant: the score is read at two budgets, and a decay would favour the one it was set up for.
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=10,
            weight_decay=0.0,
            max_steps=1_000_000,
            logging_steps=1_000_000,
            save_strategy="no",
            optim="adamw_torch_fused",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            report_to="none",
            dataloader_drop_last=True,
            seed=self.seed,
        )
        return {**shared, **changes}

    def ours(self) -> dict[str, Any]:
        rollouts = RolloutConfig(max_new_tokens=self.longest)
        return self.arguments(rollouts=rollouts, chunk_tokens=8192)  # all rows at once: there are few columns

    def in_groups(self, samples: int) -> dict[str, Any]:
        """The same for several samples of a prompt: as many fewer prompts a step."""
        rollouts = RolloutConfig(max_new_tokens=self.longest, samples_per_prompt=samples)
        return {**self.ours(), "per_device_train_batch_size": max(1, self.batch // samples), "rollouts": rollouts}


@dataclass(frozen=True)
class Method:
    title: str
    prompts: Literal["labelled", "fresh", "checked", "fixed", "pairs", "mistakes", "noised"]
    text: Literal["labels", "teacher", "student", "verified"]
    build: Callable[[Setting], Trainer] = field(repr=False)

    @property
    def on_policy(self) -> bool:
        return self.text == "student"


def counted(inputs: dict[str, Any]) -> tuple[int, int]:
    """Tokens in the loss and sequences of one micro-batch, as each of the trainers hands it to ``compute_loss``."""
    if "micro_batch" in inputs:
        rollout = inputs["micro_batch"].rollout
        return rollout.num_rows, len(rollout)
    if "labels" in inputs:
        return int((inputs["labels"] != -100).sum()), len(inputs["labels"])
    mask = inputs["completion_mask"]
    return int(mask.sum()), len(mask)


def counting(base: type[Trainer]) -> type[Trainer]:
    """The trainer, telling its curve how many tokens it was trained on."""

    class Counting(base):  # type: ignore[misc,valid-type]
        curve: Curve

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            tokens, sequences = counted(inputs)
            self.curve.tokens += tokens
            self.curve.sequences += sequences
            return super().compute_loss(model, inputs, *args, **kwargs)

    Counting.__name__ = base.__name__
    return Counting


def built(base: type[Trainer], setting: Setting, *args: Any, **kwargs: Any) -> Trainer:
    """``base``, counting, with the curve and without bars of its own."""
    torch.manual_seed(setting.seed)
    trainer = counting(base)(*args, processing_class=setting.tokenizer, callbacks=[setting.curve], **kwargs)
    trainer.curve = setting.curve  # type: ignore[attr-defined]
    for callback in (RunFolderCallback, PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def noised(rows: Sequence[Row], digits: str, seed: int, share: float = 0.1) -> list[Row]:
    """The rows, in whose completions so many of the digits are drawn anew."""
    rng = random.Random(seed)

    def drawn(character: str) -> str:
        return rng.choice(digits) if character in digits and rng.random() < share else character

    return [{**row, "completion": "".join(map(drawn, row["completion"]))} for row in rows]


def rows_of(setting: Setting, source: str) -> list[Row]:
    """The rows of a data source, a small one many times over: the end of an epoch costs time, whatever the method."""
    rows = list(getattr(setting.data, source))
    return rows * max(1, 4000 // len(rows))


# ------------------------------------------------------------------------------------------------- ways to build them


def sft(source: str) -> Callable[[Setting], Trainer]:
    def build(s: Setting) -> Trainer:
        rows = [{"prompt": r["prompt"], "completion": r["completion"]} for r in rows_of(s, source)]
        args = SFTConfig(**s.arguments(max_length=None, packing=False))
        return built(SFTTrainer, s, s.model, args=args, train_dataset=Dataset.from_list(rows))

    return build


def opd(source: str, sequences: str, view: str = "tokens", **objective: Any) -> Callable[[Setting], Trainer]:
    def build(s: Setting) -> Trainer:
        args = OPDConfig(**s.ours(), sequences=sequences, **objective)
        return built(OPDTrainer, s, s.model, args, teacher=s.teacher, train_dataset=rows_of(s, source), view=view)

    return build


def composed(
    name: str, source: str = "fresh", rollouts: dict[str, Any] | None = None, **objective: Any
) -> Callable[[Setting], Trainer]:
    """A method of llmdistill.methods."""

    def build(s: Setting) -> Trainer:
        ours = s.ours()
        ours["rollouts"] = replace(ours["rollouts"], **rollouts or {})
        args = compositions.config_class(name)(**ours, **objective)
        return built(MethodTrainer, s, s.model, args, s.teacher, train_dataset=rows_of(s, source))

    return build


def told(name: str, judge: Teacher | None = None, **objective: Any) -> Callable[[Setting], Trainer]:
    """One whose judge, by default the track's teacher, reads the true completion behind the prompt: see told.py."""

    def build(s: Setting) -> Trainer:
        args = compositions.config_class(name)(**s.ours(), **objective)
        data, contexts = DataConfig(contexts={"solution": "told"}), {"teacher": "solution"}
        rows = rows_of(s, "labelled")
        return built(
            MethodTrainer, s, s.model, args, judge or s.teacher, train_dataset=rows, data=data, contexts=contexts
        )

    return build


def sibling(row: Row, completions: list[str], rewards: list[float] | None) -> list[str | None]:
    """SDPO's, told as the start has learned to read it."""
    return [None if text is None else context(text) for text in successes(completions, rewards)]


def answered(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """1 where the answer at the end is the true one's."""
    pairs = zip(answer, completions, strict=True)
    return [float(text.rpartition(";")[2] == true.rpartition(";")[2]) for true, text in pairs]


def sdpo(samples: int, *judge: Any) -> Callable[[Setting], Trainer]:
    def build(s: Setting) -> Trainer:
        data = DataConfig(contexts={"sibling": "methods:sibling"}, answer_column="completion")
        return built(
            MethodTrainer,
            s,
            s.model,
            compositions.config_class("sdpo")(**s.in_groups(samples), top_k=8),  # of sixteen columns
            StudentTeacher(*judge),
            train_dataset=rows_of(s, "labelled"),
            data=data,
            contexts={"teacher": "sibling"},
            reward=answered,
        )

    return build


def opsd(s: Setting) -> Trainer:
    return told("opsd", StudentTeacher("initial"))(s)


def rewarded(samples: int, weight: float) -> Callable[[Setting], Trainer]:
    """OPD of sampled tokens and a verified reward, normalised over the samples of a prompt."""

    def build(s: Setting) -> Trainer:
        args = OPDConfig(**s.in_groups(samples), estimator="sampled", reward_weight=weight)
        more = {"data": DataConfig(answer_column="completion"), "reward": answered}
        return built(OPDTrainer, s, s.model, args, teacher=s.teacher, train_dataset=rows_of(s, "checked"), **more)

    return build


class Ending(Adaptive):
    """DistiLLM's schedule, whose share of fresh samples ends at the token budget: ``max_steps`` is never reached."""

    def __init__(self, end: int, *args: Any) -> None:
        super().__init__(*args)
        self.end = end

    def draw(self, round_: Round) -> Drawn:
        return super().draw(replace(round_, total=self.end))


def adaptive(s: Setting) -> Trainer:
    """The teacher's text, and more of the student's whenever the loss on held-out prompts rises; with its skew KL."""
    looks = {"eval_strategy": "steps", "eval_steps": 5, "heldout_sequences": 64}
    args = OPDConfig(**s.ours(), **looks, sequences="adaptive", divergence="skew_reverse_kl")
    source = Ending(s.steps, args.off_policy, args.replay_size, args.adaptive_eps)
    rows = rows_of(s, "fresh")
    more = {"train_dataset": rows[64:], "eval_dataset": rows[:64], "sequences": source}
    return built(OPDTrainer, s, s.model, args, teacher=s.teacher, **more)


def opsa(s: Setting) -> Trainer:
    """The control hears no teacher. The one that it is handed, to be measured against, has the student's tokens."""
    return composed("opsa")(replace(s, teacher=s.same or s.teacher))


def opd_of_one(s: Setting) -> Trainer:
    """OPD with the first of several experts as the teacher of all prompts: what merging them adds to."""
    first = next(iter(s.teacher.members.values()))  # type: ignore[attr-defined]
    return opd("fresh", "student")(replace(s, teacher=first))


def of_same(build: Callable[[Setting], Trainer]) -> Callable[[Setting], Trainer]:
    """From the other teacher: across tokenizers one with the student's, the ceiling there; else a control's."""

    def of_it(s: Setting) -> Trainer:
        assert s.same is not None
        return build(replace(s, teacher=s.same))

    return of_it


def taid(source: str, **objective: Any) -> Callable[[Setting], Trainer]:
    def build(s: Setting) -> Trainer:
        args = TAIDConfig(**s.ours(), sequences="dataset", **objective)
        trainer = built(TAIDTrainer, s, s.model, args, teacher=s.teacher, train_dataset=rows_of(s, source))
        trainer.add_callback(ScheduleEnd(trainer, s.steps))
        return trainer

    return build


class ScheduleEnd(TrainerCallback):
    """Ends TAID's schedule at the token budget: ``max_steps``, where it would end by itself, is never reached."""

    def __init__(self, trainer: Trainer, steps: int) -> None:
        self.trainer, self.steps = trainer, steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        interpolation = self.trainer.method.schedules.get("t")  # type: ignore[attr-defined]
        if interpolation is not None:
            interpolation.schedule.num_steps = self.steps


def trl_distillation(s: Setting) -> Trainer:
    """TRL's on-policy distillation with the reverse KL: the peer of ``opd``."""
    args = TRLDistillationConfig(**s.arguments(max_completion_length=s.longest, beta=1.0, top_p=1.0, top_k=0))
    data = Dataset.from_list([{"prompt": r["prompt"]} for r in s.data.fresh])
    return built(TRLDistillationTrainer, s, s.model, s.teacher.model, args=args, train_dataset=data)  # type: ignore[attr-defined]


def redi(lr_factor: float, **objective: Any) -> Callable[[Setting], Trainer]:
    def build(s: Setting) -> Trainer:
        args = REDIConfig(**{**s.ours(), "learning_rate": s.lr * lr_factor}, **objective)
        return built(REDITrainer, s, s.model, args, train_dataset=rows_of(s, "pairs"))

    return build


def dpo(lr_factor: float, beta: float) -> Callable[[Setting], Trainer]:
    def build(s: Setting) -> Trainer:
        args = DPOConfig(**s.arguments(max_length=None, beta=beta, learning_rate=s.lr * lr_factor))
        return built(DPOTrainer, s, s.model, args=args, train_dataset=Dataset.from_list(rows_of(s, "pairs")))

    return build


def exopd(scale: float) -> Method:
    build = opd("fresh", "student", reward_scale=scale, reference="initial")
    return Method(f"{'ExOPD' if scale > 1 else 'G-OPD'}, λ = {scale:g}", "fresh", "student", build)


def on_teacher_text(title: str, build: Callable[[Setting], Trainer]) -> Method:
    return Method(title, "fresh", "teacher", build)


# Of the track's learning rate, for losses that push a completion down: three times as much and all of them lose a
# quarter of the answers in forty steps; a third of it changes nothing.
PAIR_LR = 0.01

METHODS = {
    # The same labelled rows as the start: what objectives alone can do.
    "sft_labels": Method("SFT on ground truth", "labelled", "labels", sft("labelled")),
    "fkl_labels": Method("forward KL on ground truth", "labelled", "labels", taid("labelled", divergence="forward_kl")),
    "opd_labelled": Method("OPD, labelled prompts only", "labelled", "student", opd("labelled", "student")),
    # The teacher's text for fresh prompts: coverage without being on-policy.
    "sft_teacher": on_teacher_text("SFT on teacher traces", sft("fresh")),
    "fkl_teacher": on_teacher_text("forward KL", taid("fresh", divergence="forward_kl")),
    "jsd_teacher": on_teacher_text("JSD, β = 0.5", taid("fresh", divergence="jsd", beta=0.5)),
    "skew_teacher": on_teacher_text("skew KL, α = 0.1", taid("fresh", divergence="skew_forward_kl", alpha=0.1)),
    "rkl_teacher": on_teacher_text("reverse KL", taid("fresh", divergence="reverse_kl")),
    "taid": on_teacher_text("TAID", taid("fresh", divergence="taid")),
    "tv_teacher": on_teacher_text("total variation", taid("fresh", divergence="total_variation")),
    "akl_teacher": on_teacher_text("adaptive KL", taid("fresh", divergence="adaptive_kl")),
    "adaptive": on_teacher_text("DistiLLM: skew KL, its schedule and replay", adaptive),
    # The control of being on-policy: the teacher's word on wrong text that is nobody's own.
    "fkl_noised": Method("forward KL, text with noise", "noised", "teacher", taid("noised", divergence="forward_kl")),
    "sft_noised": Method("SFT, text with noise", "noised", "teacher", sft("noised")),
    # The student's own text for the same fresh prompts.
    "opd": Method("OPD (reverse KL)", "fresh", "student", opd("fresh", "student")),
    "opd_sampled": Method("OPD, sampled tokens", "fresh", "student", opd("fresh", "student", estimator="sampled")),
    "opd_fkl": Method("forward KL on-policy", "fresh", "student", opd("fresh", "student", divergence="forward_kl")),
    "gkd": Method("JSD on-policy (GKD)", "fresh", "student", opd("fresh", "student", divergence="jsd", beta=0.5)),
    "opd_reward": Method("OPD, sampled tokens, and a reward", "checked", "student", rewarded(8, 1.0)),
    "exopd_0.5": exopd(0.5),
    "exopd_1.25": exopd(1.25),
    "exopd_1.5": exopd(1.5),
    # Compositions of llmdistill.methods.
    "distillm2": Method("DistiLLM-2", "fresh", "student", composed("distillm2")),
    "sampled_f": Method("sampled Jensen-Shannon", "fresh", "student", composed("sampled_f")),
    "vopd": Method("vOPD, top-8 baseline", "fresh", "student", composed("vopd", top_k=8)),
    "tip": Method("TIP, half of the tokens", "fresh", "student", composed("tip")),
    "entropy_aware": Method("entropy-aware OPD", "fresh", "student", composed("entropy_aware", top_k=8)),
    "selected": Method("prefix OPD, 15 tokens", "fresh", "student", composed("selected", first=15)),
    "layers": Method("OPD and last layer, cosine", "fresh", "student", composed("layers")),
    "context": Method("context distillation, own text", "labelled", "student", told("context_distillation")),
    "context_given": Method(
        "context distillation, true text", "labelled", "labels", told("context_distillation", sequences="dataset")
    ),
    "returns": Method("OPD with returns, γ = 0.9", "fresh", "student", composed("returns")),
    "opsa": Method("fixed −c, no teacher (OPSA)", "fresh", "student", opsa),
    "opsd": Method("OPSD", "labelled", "student", opsd),
    "sdpo": Method("SDPO, 8 samples", "labelled", "student", sdpo(8, "ema", 0.95)),
    "sdpo_fixed": Method("SDPO, the start as judge", "labelled", "student", sdpo(8, "initial")),
    "trl": Method("TRL DistillationTrainer", "fresh", "student", trl_distillation),
    "opd_one": Method("OPD, addition expert for all", "fresh", "student", opd_of_one),
    # Teacher hacking: one objective, three sources of text.
    "offline": Method("fixed teacher text", "fixed", "teacher", taid("fixed", divergence="forward_kl")),
    "online_teacher": Method("fresh teacher text", "fresh", "teacher", taid("fresh", divergence="forward_kl")),
    "online_student": Method(
        "fresh student text", "fresh", "student", opd("fresh", "student", divergence="forward_kl")
    ),
    # Negatives: right and wrong samples of a teacher that is often wrong.
    "sft_right": Method("SFT on right traces", "pairs", "verified", sft("right")),
    "redi": Method("REDI, α = 0.8", "pairs", "verified", redi(PAIR_LR, method="redi")),
    "symmetric": Method("symmetric, α = 1", "pairs", "verified", redi(PAIR_LR, method="symmetric")),
    "simpo": Method("SimPO", "pairs", "verified", redi(PAIR_LR, method="simpo")),
    "dpo": Method("DPO", "pairs", "verified", dpo(PAIR_LR, beta=0.1)),
}
