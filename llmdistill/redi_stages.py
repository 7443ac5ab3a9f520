"""Both stages of ``llmdistill.redi`` in one command: check, fine-tune, measure, train on pairs, measure, save.

    RUN/stage1/    a run folder of its own: metrics.jsonl, checkpoint-N/, before.json, after.json, student/
    RUN/           the same of stage 2 (of stage 1, where it is the only one), config.yaml

A stage's ``summary.json`` is the last file it writes, so ``--resume`` knows which stage was interrupted. Stage 2 always
starts from ``stage1/student`` as it is on disk: a run that was interrupted between them continues bit for bit.

Simplified away: preflight, which examines a trainer with a teacher. What it would find in pairs (limits, empty sides, a
missing template or eos) is checked while they are encoded, before anything is trained.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from datasets import Dataset
from huggingface_hub import constants
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from llmdistill.command_line import Recipe
from llmdistill.distributed import leave_group
from llmdistill.errors import UserError
from llmdistill.meters import Meters, peak_memory_gib
from llmdistill.pair_trainer import PairTrainer
from llmdistill.pairs import Pair, PairEncoder, collate_pairs, measure_pairs, pair_encoder
from llmdistill.prompts import load_rows
from llmdistill.report.page import write_report
from llmdistill.rollouts import Prompt
from llmdistill.run import add_evaluations, checkpoint_to_resume, load_student, lora_config, quiet, save_student
from llmdistill.run_folder import RunFolder, RunFolderCallback
from llmdistill.tokenization.special import context_length, pad_id

if TYPE_CHECKING:  # it runs as __main__: its classes are not those that an import here would see
    from llmdistill.redi import REDIConfig

SHOWN = ("chosen_logp", "rejected_logp", "margin", "accuracy")


@dataclass
class Stage:
    """What a stage's trainer is made of."""

    recipe: Recipe
    folder: RunFolder
    model: Any
    tokenizer: Any
    heldout: list[Pair]

    @property
    def args(self) -> REDIConfig:
        return cast("REDIConfig", self.recipe.args)


def run_stages(recipe: Recipe, trainer_class: Callable[..., PairTrainer]) -> int:
    """Runs a recipe from the data to the saved student; ``trainer_class`` trains on pairs where TRL does not.

    Raises:
        UserError: whatever the user can mend; everything written before it stays.
    """
    quiet()
    constants.HF_HUB_DISABLE_TELEMETRY = True  # else TRL's trainers report to their makers when they are built
    _refuse(recipe)
    args = cast("REDIConfig", recipe.args)
    console, folder = Console(stderr=True), RunFolder(args.output_dir or "runs/default")
    first = folder if args.method == "sft" else RunFolder(folder.path / "stage1")
    tuned = replace(recipe.student, model=str(first.path / "student"))
    skip = not args.has_stage1 or (recipe.flags.resume and args.method != "sft" and _finished(first))
    model, tokenizer = load_student(tuned if skip and args.has_stage1 else recipe.student)
    encoder = pair_encoder(
        tokenizer,
        recipe.data,
        chosen_column=args.chosen_column,
        rejected_column=args.rejected_column,
        max_completion_tokens=args.max_completion_tokens,
        context=context_length(model.config),
        bad_pairs=args.bad_pairs,
    )
    # All of it before anything is trained or an earlier run is moved: a bad row costs no stage 1.
    pairs, positives, heldout = _data(recipe, encoder)
    checkpoint = checkpoint_to_resume(recipe, folder if skip else first if recipe.flags.resume else folder, console)
    main_process = args.process_index == 0
    if main_process:
        if skip and args.has_stage1:
            console.print(f"stage 1 is finished, in {first.path}; this is stage 2")
        folder.write_config({k: v for k, v in recipe.resolved().items() if k not in args.unread})
    if not skip:
        stage = Stage(recipe, first, model, tokenizer, heldout)
        trainer: Any = _fine_tuning(stage, positives)
        trainer.encode = encoder.prompts  # where saving finds the tokenizer
        _train(stage, trainer, checkpoint, "stage 1", encoder.skipped)
        checkpoint = None
        if args.method != "sft":
            del stage, trainer, model
            # Afresh: making them resets the process's accelerator state, and DeepSpeed allows no second Accelerator
            # without that.
            recipe = replace(recipe, args=replace(args))
            model, tokenizer = load_student(tuned)
    if args.method != "sft":
        stage = Stage(recipe, folder, model, tokenizer, heldout)
        trainer = _direct_preference(stage, pairs) if args.method == "dpo" else _on_pairs(stage, pairs, trainer_class)
        trainer.encode = encoder.prompts
        add_evaluations(trainer, recipe.evals)
        _train(stage, trainer, checkpoint, "stage 2", encoder.skipped)
    if main_process:
        _print(first, folder, Console())
    leave_group()
    return 0


def _refuse(recipe: Recipe) -> None:
    """Settings that would be ignored in silence."""
    if recipe.flags.skip_checks:
        raise UserError(f"--skip-check {recipe.flags.skip_checks[0]}: redi has no checks to skip. Fix: leave it out.")
    if label := next((t.label for t in recipe.teachers if t.label), ""):
        raise UserError(
            f"the recipe has a teacher, {label!r}, and REDI asks none: the pairs of data.train are its answers. "
            "Fix: leave the section out."
        )
    if not recipe.data.train:
        raise UserError("data.train is empty; it must name a file or hub dataset of pairs. Fix: --data.train FILE.")


def _finished(folder: RunFolder) -> bool:
    return (folder.path / "summary.json").is_file()


def _data(recipe: Recipe, encoder: PairEncoder) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """(pairs of stage 2, positives of stage 1, held-out pairs)."""
    args, data = cast("REDIConfig", recipe.args), recipe.data
    rows = load_rows(data.train, data, "data.train")
    pairs: list[Pair] = [] if args.method == "sft" else encoder.encode_all(rows, "data.train")
    positives = pairs
    if args.has_stage1 and args.positives:
        source = load_rows(args.positives, data, "objective.positives")
        positives = encoder.encode_all(source, "objective.positives", positive=True)
    elif args.method == "sft":
        positives = encoder.encode_all(rows, "data.train", positive=True)
    heldout: list[Pair] = []
    if data.heldout:
        heldout = encoder.encode_all(load_rows(data.heldout, data, "data.heldout"), "data.heldout")
    return pairs, positives, heldout[: args.heldout_sequences]


# ---------------------------------------------------------------- the trainers


def _on_pairs(stage: Stage, pairs: list[Pair], trainer_class: Callable[..., PairTrainer]) -> Any:
    return trainer_class(
        stage.model,
        stage.args,
        train_dataset=pairs,
        eval_dataset=stage.heldout or None,
        processing_class=stage.tokenizer,
        peft_config=lora_config(stage.recipe.student),
        data=stage.recipe.data,
    )


def _fine_tuning(stage: Stage, positives: Sequence[Pair]) -> SFTTrainer:
    """Stage 1, on the very tokens that stage 2 would see."""
    args = stage.args
    rows = [
        {"input_ids": [*p.prompt.ids, *p.chosen], "completion_mask": [0] * len(p.prompt.ids) + [1] * len(p.chosen)}
        for p in positives
    ]
    config = SFTConfig(
        **_shared(
            args,
            stage.folder,
            learning_rate=args.stage1_learning_rate,
            num_train_epochs=args.stage1_epochs,
            max_steps=args.stage1_steps or -1,
            per_device_train_batch_size=args.stage1_batch_size,
            gradient_accumulation_steps=args.stage1_accumulation,
            eval_strategy="no",  # of stage 2
            load_best_model_at_end=False,
        ),
        completion_only_loss=True,
        max_length=None,
    )
    return SFTTrainer(_prepared(stage), config, train_dataset=Dataset.from_list(rows), **_trl_extras(stage))


def _direct_preference(stage: Stage, pairs: Sequence[Pair]) -> DPOTrainer:
    """DPO against the student as it is now. TRL tokenises what it is given; the collator hands it our own tokens."""
    args = stage.args
    assert args.beta is not None
    config = DPOConfig(
        **_shared(args, stage.folder),
        beta=args.beta,
        max_length=None,
        trust_remote_code=stage.recipe.student.trust_remote_code,
    )
    padding = pad_id(stage.tokenizer)

    def collator(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = collate_pairs([_pair(row) for row in rows], padding)
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask.long(),
            "completion_mask": batch.completion_mask.long(),
        }

    return DPOTrainer(
        _prepared(stage),
        args=config,
        data_collator=collator,
        train_dataset=_as_dataset(pairs),
        eval_dataset=_as_dataset(stage.heldout) if stage.heldout else None,
        **_trl_extras(stage),
    )


def _as_dataset(pairs: Sequence[Pair]) -> Dataset:
    """A placeholder for TRL's own tokenisation, and beside it the tokens that are trained on."""
    return Dataset.from_list(
        [
            {
                **{"prompt": "=", "chosen": "+", "rejected": "-"},
                **{"ids": p.prompt.ids, "chosen_tokens": list(p.chosen), "rejected_tokens": list(p.rejected)},
            }
            for p in pairs
        ]
    )


def _pair(row: dict[str, Any]) -> Pair:
    return Pair(Prompt(row["ids"], ""), tuple(row["chosen_tokens"]), tuple(row["rejected_tokens"]))


def _prepared(stage: Stage) -> Any:
    if stage.args.freeze_embeddings:
        for module in (stage.model.get_input_embeddings(), stage.model.get_output_embeddings()):
            module.requires_grad_(False)
    return stage.model


def _shared(args: REDIConfig, folder: RunFolder, **own: Any) -> dict[str, Any]:
    """The settings of ``train`` for a config of TRL's, which is a TrainingArguments too."""
    names = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    values = {k: v for k, v in args.to_dict().items() if k in names}
    return {**values, "hub_token": args.hub_token, "output_dir": str(folder.path), **own}


def _trl_extras(stage: Stage) -> dict[str, Any]:
    return {"processing_class": stage.tokenizer, "peft_config": lora_config(stage.recipe.student)}


# ---------------------------------------------------------------- running one


def _train(stage: Stage, trainer: Any, checkpoint: Path | None, name: str, skipped: dict[str, int]) -> None:
    """Trains, measures before and after, saves; ``summary.json`` last."""
    folder, callback = stage.folder, None
    if not isinstance(trainer, PairTrainer):
        trainer.remove_callback(PrinterCallback)
        callback = _TRLCallback(folder)
        trainer.add_callback(callback)
    trainer.callback_handler.callbacks.insert(0, _Before(trainer, stage))
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        if callback:
            callback.stop()
    after = _snapshot(trainer, stage)
    save_student(trainer, folder)
    trainer.accelerator.wait_for_everyone()  # the next stage loads what was saved
    if not trainer.is_world_process_zero():
        return
    guard = getattr(trainer, "guard", None)
    folder.write_json("after.json", after)
    folder.write_json(
        "summary.json",
        {
            "stage": name,
            "method": "sft" if name == "stage 1" else stage.args.method,
            "steps": trainer.state.global_step,
            "peak_gib": peak_memory_gib(),
            "skipped_rows": skipped,
            "guard": None if guard is None else {"fired_at": guard.fired_at, "fall": guard.fall, **guard.numbers()},
        },
    )
    write_report(folder.path)


def _snapshot(trainer: Any, stage: Stage) -> dict[str, Any]:
    """The held-out pairs under the student of now."""
    if not stage.heldout:
        return {}
    measured = measure_pairs(
        trainer, stage.heldout, pad_id=pad_id(stage.tokenizer), chunk_tokens=stage.args.chunk_tokens
    )
    each = {"chosen_logp": measured.chosen, "rejected_logp": measured.rejected}
    return {"step": trainer.state.global_step, "pairs": measured.flat(), "sequences": {"pairs": each}}


class _Before(TrainerCallback):
    """Measures once before the first step, when the model is ready for it (sharded, if it will be)."""

    def __init__(self, trainer: Any, stage: Stage) -> None:
        self.trainer, self.stage = trainer, stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            snapshot = _snapshot(self.trainer, self.stage)
            if state.is_world_process_zero:
                self.stage.folder.write_json("before.json", snapshot)


class _TRLCallback(RunFolderCallback):
    """The run folder of a trainer of TRL's, with the times and the memory that ours measure themselves."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__(folder, Meters())
        self.step_began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_began = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meters.add("time/student", time.perf_counter() - self.step_began)
        super().on_pre_optimizer_step(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            if not math.isfinite(float(logs["loss"])):
                newest = self.folder.newest_checkpoint()
                go_on = f"--resume, which goes on from {newest}" if newest else "start again"
                raise UserError(
                    f"the loss is {logs['loss']} at step {state.global_step}. Fix: lower the stage's learning rate or "
                    f"use train.bf16 instead of fp16, then {go_on}."
                )
            logs = {**logs, **self.meters.flush(), "memory/peak_gib": peak_memory_gib()}
        super().on_log(args, state, control, logs=logs, **kwargs)


def _print(first: RunFolder, folder: RunFolder, console: Console) -> None:
    columns = {
        "before stage 1": first.read_json("before.json"),
        "after stage 1": first.read_json("after.json"),
        "after stage 2": folder.read_json("after.json") if folder.path != first.path else None,
    }
    if folder.path != first.path and not columns["after stage 1"]:  # it was skipped
        columns = {"before": folder.read_json("before.json"), "after": columns["after stage 2"]}
    measured = {title: found["pairs"] for title, found in columns.items() if found and found.get("pairs")}
    if measured:
        table = Table(title="held-out pairs (95 % interval over pairs); log-probs in nats per token")
        table.add_column("")
        for title in measured:
            table.add_column(title, justify="right")
        for metric in SHOWN:
            table.add_row(metric, *(_cell(values, metric) for values in measured.values()))
        console.print(table)
    console.print(f"student: {folder.path / 'student'}", markup=False)


def _cell(values: dict[str, float], metric: str) -> str:
    return f"{values[metric]:.3f} [{values[metric + '_low']:.3f}, {values[metric + '_high']:.3f}]"
