"""Both stages of ``llmdistill.redi`` in one command: check, fine-tune, measure, train on pairs, measure, save.

    RUN/stage1/    a run folder of its own: metrics.jsonl, checkpoint-N/, before.json, after.json, student/
    RUN/           the same of stage 2 (of stage 1, where it is the only one), config.yaml

A stage's ``summary.json`` is the last file it writes, so ``--resume`` knows which stage was interrupted. Stage 2 always
starts from ``stage1/student`` as it is on disk: a run that was interrupted between them continues bit for bit.

Rows are checked while they are encoded, and student, machine and pairs by the preflight, before anything is trained or
an earlier run is moved. The stages that TRL trains are in ``redi_trl``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from huggingface_hub import constants
from rich.console import Console
from transformers import PrinterCallback, TrainerCallback

from llmdistill.errors import UserError
from llmdistill.methods.redi_config import REDIConfig
from llmdistill.pipeline.redi_trl import TRLCallback, direct_preference, fine_tuning
from llmdistill.pipeline.resumed import check_inputs, check_settings, given_start, read_start, record_start, rows_hash
from llmdistill.pipeline.run import (
    add_evaluations,
    check_saved,
    checkpoint_to_resume,
    load_student,
    save_student,
)
from llmdistill.pipeline.stage import Stage
from llmdistill.pipeline.tables import stages_table
from llmdistill.preflight import preflight
from llmdistill.preflight.pairs import PairRun
from llmdistill.quiet import quiet
from llmdistill.recipe.command_line import Recipe
from llmdistill.recipe.data_config import DataConfig
from llmdistill.recipe.launches import leave_group
from llmdistill.recipe.lora import lora_config
from llmdistill.record.meters import peak_memory_gib
from llmdistill.record.page.page import write_report
from llmdistill.record.run_folder import RunFolder
from llmdistill.teachers.fingerprint import weights_fingerprint
from llmdistill.texts.loading import Rows, load_rows, load_sets
from llmdistill.texts.pair import Pair
from llmdistill.texts.pairs import PairEncoder
from llmdistill.texts.streams import HeldOutSets
from llmdistill.tokenization.special import also_end_at, context_length, pad_id
from llmdistill.training.consistency import check_heldout
from llmdistill.training.pair_losses import measure_pairs
from llmdistill.training.pair_trainer import PairTrainer
from llmdistill.training.streamed_rows import check_streaming

SHOWN = ("chosen_logp", "rejected_logp", "margin", "accuracy")


def run_stages(recipe: Recipe, trainer_class: Callable[..., PairTrainer]) -> int:
    """Runs a recipe from the data to the saved student; ``trainer_class`` trains on pairs where TRL does not.

    Raises:
        UserError: whatever the user can mend; everything written before it stays.
    """
    quiet()
    constants.HF_HUB_DISABLE_TELEMETRY = True  # else TRL's trainers report to their makers when they are built
    _refuse(recipe)
    args = cast(REDIConfig, recipe.args)
    console, folder = Console(stderr=True, markup=False), RunFolder(args.output_dir or "runs/default")
    given = given_start(recipe, leave_out=args.unread)
    started = read_start(folder) if recipe.flags.resume else None
    changed = check_settings(recipe, folder, started, given) if started else {}
    first = folder if args.method == "sft" else RunFolder(folder.path / "stage1")
    tuned = replace(recipe.student, adapter="merge", model=str(first.path / "student"), revision="")
    skip = not args.has_stage1 or (recipe.flags.resume and args.method != "sft" and _finished(first))
    model, tokenizer = load_student(tuned if skip and args.has_stage1 else recipe.student)
    encoder = args.encoder(tokenizer, recipe.data, context_length(model.config))
    # All of it before anything is trained or an earlier run is moved: a bad row costs no stage 1.
    pairs, positives, heldout, inputs = _data(recipe, encoder)
    also_end_at(model, tokenizer, encoder.prompts.ends)
    inputs["student"] = weights_fingerprint(recipe.student.model, recipe.student.revision)
    if started:
        check_inputs(folder, started, given, inputs)
    _check_evaluations(recipe, model, tokenizer)
    every = pairs if positives is pairs else [*pairs, *positives] if pairs else positives
    planned = PairRun(args, model, encoder.prompts, every, heldout, stages=1 if args.method == "sft" else 2)
    for finding in preflight(planned, recipe, skip=recipe.flags.skip_checks):
        if args.process_index == 0:
            finding.show(console)
    checkpoint = checkpoint_to_resume(recipe, folder if skip else first if recipe.flags.resume else folder, console)
    main_process = args.process_index == 0
    if main_process:
        for said in args.not_read():
            console.print(f"method {args.method} does not read {said}", markup=False)
        if skip and args.has_stage1:
            console.print(f"stage 1 is finished, in {first.path}; this is stage 2")
        record_start(folder, given, inputs, started, changed)
    if not skip:
        stage = Stage(recipe, first, model, tokenizer, heldout)
        trainer: Any = fine_tuning(stage, positives)
        trainer.encode = encoder.prompts  # where saving finds the tokenizer
        if args.method == "sft":
            add_evaluations(trainer, recipe.evals, recipe.data)
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
        trainer = direct_preference(stage, pairs) if args.method == "dpo" else _on_pairs(stage, pairs, trainer_class)
        trainer.encode = encoder.prompts
        add_evaluations(trainer, recipe.evals, recipe.data)
        _train(stage, trainer, checkpoint, "stage 2", encoder.skipped)
    if main_process:
        _print(first, folder, Console(markup=False))
    leave_group()
    return 0


def _refuse(recipe: Recipe) -> None:
    """Settings that would be ignored in silence."""
    if label := next((t.label for t in recipe.teachers if t.label), ""):
        raise UserError(
            f"the recipe has a teacher, {label!r}, and REDI asks none: the pairs of data.train are its answers. "
            "Fix: leave the section out."
        )
    args = cast(REDIConfig, recipe.args)
    if recipe.student.adapter == "continue" and args.has_stage1 and args.method != "sft":
        raise UserError(
            "student.adapter is continue, and stage 2 starts from the whole weights that stage 1 leaves, where no "
            "adapter is left to go on with. Fix: --student.adapter merge with --student.lora_r, or one stage."
        )
    if not recipe.data.train:
        raise UserError(
            "data.train is empty; it must name a file or hub dataset of pairs. "
            "Fix: --config RECIPE, or --data.train FILE."
        )
    check_heldout(recipe.args, recipe.data.heldout)


def _check_evaluations(recipe: Recipe, model: Any, tokenizer: Any) -> None:
    """Loads the suites for a trainer that does not exist yet: a wrong one costs no stage 1 either."""
    trainer = SimpleNamespace(args=recipe.args, model=model, processing_class=tokenizer, add_callback=lambda _: None)
    add_evaluations(cast(Any, trainer), recipe.evals, recipe.data)


def _finished(folder: RunFolder) -> bool:
    return (folder.path / "summary.json").is_file()


def _data(recipe: Recipe, encoder: PairEncoder) -> tuple[Sequence[Pair], Sequence[Pair], list[Pair], dict[str, str]]:
    """(pairs of stage 2, positives of stage 1, held-out pairs, what all of them say: setting -> hash)."""
    args, data = cast(REDIConfig, recipe.args), recipe.data
    load = partial(_rows, data=data, most=_pairs_read(args) if data.streaming else 0)
    rows = load(data.train, setting="data.train")
    read = {"data.train": rows_hash(rows)}
    pairs: Sequence[Pair] = [] if args.method == "sft" else encoder.encode_all(rows, "data.train")
    positives = pairs
    if args.has_stage1 and args.positives:
        source = load(args.positives, setting="objective.positives")
        read["objective.positives"] = rows_hash(source)
        positives = encoder.encode_all(source, "objective.positives", positive=True)
    elif args.method == "sft":
        positives = encoder.encode_all(rows, "data.train", positive=True)
    heldout: list[Pair] = []
    if data.heldout:
        loaded = load_sets(data.heldout, "data.heldout", partial(load, split=data.heldout_split))
        read["data.heldout"] = rows_hash(loaded)

        def encoded(rows: Rows, setting: str) -> list[Pair]:
            # a rejected side is measured where there is one
            alone = args.method == "sft" and args.rejected_column not in rows.column_names
            return list(encoder.encode_all(rows, setting, positive=alone)[: args.heldout_sequences])

        found = load_sets(loaded, "data.heldout", encoded)
        heldout = HeldOutSets(found) if isinstance(found, dict) else found
    return pairs, positives, heldout, read


def _rows(source: Any, *, data: DataConfig, most: int, setting: str, split: str = "") -> Rows:
    """Rows of pairs, all of them, or of a stream the first that the stages take."""
    rows = load_rows(source, data, setting, split=split)
    return rows if isinstance(rows, Rows) else Rows(list(islice(iter(rows), most)), rows.source, rows.files)


def _pairs_read(args: REDIConfig) -> int:
    """Rows of a stream that the stages take: those of so many steps.

    Raises:
        UserError: one of them is as long as its data, which a stream does not say.
    """
    if args.method != "sft":
        check_streaming(args)
    if args.has_stage1 and not args.stage1_steps:
        raise UserError(
            "data.streaming is true, and objective.stage1_steps 0: stage 1 would be as long as its data. Fix: "
            "--stage1_steps N."
        )
    second = (
        0
        if args.method == "sft"
        else args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
    )
    first = args.stage1_steps * args.stage1_batch_size * args.stage1_accumulation
    return max(first, second) * args.world_size


# ---------------------------------------------------------------- the trainers


def _on_pairs(stage: Stage, pairs: Sequence[Pair], trainer_class: Callable[..., PairTrainer]) -> Any:
    return trainer_class(
        stage.model,
        stage.args,
        train_dataset=pairs,
        eval_dataset=stage.heldout or None,
        processing_class=stage.tokenizer,
        peft_config=lora_config(stage.recipe.student),
        data=stage.recipe.data,
        preflight=False,  # both stages were looked at before the first
    )


# ---------------------------------------------------------------- running one


def _train(stage: Stage, trainer: Any, checkpoint: Path | None, name: str, skipped: dict[str, int]) -> None:
    """Trains, measures before and after, saves; ``summary.json`` last."""
    folder, callback = stage.folder, None
    if not isinstance(trainer, PairTrainer):
        trainer.remove_callback(PrinterCallback)
        callback = TRLCallback(folder)
        trainer.add_callback(callback)
    trainer.callback_handler.callbacks.insert(0, _Before(trainer, stage))
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else False)
    finally:
        if callback:
            callback.stop()
    after = _snapshot(trainer, stage)
    last = name == "stage 2" or stage.args.method == "sft"
    # The second stage starts from whole weights.
    save_student(trainer, folder, stage.recipe.student if last else replace(stage.recipe.student, saved_as="merged"))
    if problem := check_saved(trainer, folder, stage.recipe.flags.skip_checks):
        raise UserError(problem)
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
            "guard": None if guard is None else guard.summary(),
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
    each = {"chosen_logp": measured.chosen}
    if measured.has_rejected:
        each["rejected_logp"] = measured.rejected
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


def _print(first: RunFolder, folder: RunFolder, console: Console) -> None:
    columns = {
        "before stage 1": first.read_json("before.json"),
        "after stage 1": first.read_json("after.json"),
        "after stage 2": folder.read_json("after.json") if folder.path != first.path else None,
    }
    if folder.path != first.path and not columns["after stage 1"]:  # it was skipped
        columns = {"before": folder.read_json("before.json"), "after": columns["after stage 2"]}
    measured = {title: found for title, found in columns.items() if found and found.get("pairs")}
    if measured:
        title = "held-out pairs, log-probs in nats per token (changes pair by pair, with their 95 % intervals)"
        console.print(stages_table(title, measured, "pairs", SHOWN))
    console.print(f"student: {folder.path / 'student'}", markup=False)
