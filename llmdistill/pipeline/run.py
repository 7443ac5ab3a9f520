"""What every front door does with a recipe: check, measure, train, measure again, save, show."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from llmdistill.errors import UserError
from llmdistill.models import saving
from llmdistill.models.loading import adapter_base, load_configured
from llmdistill.pipeline.answers import compare_answers
from llmdistill.pipeline.resumed import check_inputs, check_settings, given_start, read_start, record_start, rows_hash
from llmdistill.pipeline.tables import difference, interval
from llmdistill.preflight import preflight
from llmdistill.preflight.foreseen import too_large
from llmdistill.quiet import quiet
from llmdistill.ranks import on_every_rank
from llmdistill.recipe.command_line import Recipe
from llmdistill.recipe.config import DistillationConfig, EvalsConfig, StudentConfig
from llmdistill.recipe.data_config import DataConfig
from llmdistill.recipe.launches import check_outages, leave_group
from llmdistill.recipe.lora import lora_config
from llmdistill.record.meters import peak_memory_gib
from llmdistill.record.page.page import write_report
from llmdistill.record.page.paired import TOKENS, change
from llmdistill.record.run_folder import RunFolder
from llmdistill.teachers.base import Teacher, writes
from llmdistill.teachers.fingerprint import weights_fingerprint
from llmdistill.teachers.load import load_teachers
from llmdistill.texts import Prompt, Rollout, Sampling
from llmdistill.texts.loading import load_rows, load_sets
from llmdistill.texts.streams import to_measure
from llmdistill.training.consistency import check_heldout
from llmdistill.training.layout import check_layout, written_layout
from llmdistill.training.measure import Measurement
from llmdistill.training.streamed_rows import check_streaming
from llmdistill.training.trainer import DistillationTrainer

SHOWN_PROMPTS = 3
COMPARED_ANSWERS = 64  # greedy ones, of the held-out prompts

# What is measured on held-out prompts: the text, and what its table is called.
TEXTS = {
    "student": "the student's own samples",
    "teacher": "the teacher's text",
    "dataset": "the dataset's text",
    "bound": "the dataset's text, by masks of every size",
    "answers": "the greedy answers",
    "t15": "15 % masked tokens of the dataset's text",
    "t50": "50 % masked tokens of the dataset's text",
    "t90": "90 % masked tokens of the dataset's text",
}
METRICS = (
    "reverse_kl",
    "forward_kl",
    "top1_agreement",
    "acceptance",
    "nats",
    "masked_ce",
    "same_answer",
    "near_answer",
)


def run(recipe: Recipe, trainer_class: Callable[..., DistillationTrainer]) -> int:
    """Runs a recipe from the checks to the report.

    Raises:
        UserError: whatever the user can mend; everything written before it stays.
    """
    quiet()
    console = Console(stderr=True, markup=False)
    folder = RunFolder(recipe.args.output_dir or "runs/default")
    given, started = given_start(recipe), read_start(folder) if recipe.flags.resume else None
    changed = check_settings(recipe, folder, started, given) if started else {}
    data = load_data(recipe)
    inputs = {f"data.{name}": rows_hash(rows) for name, rows in data.items()}
    trainer = build(recipe, trainer_class, data)
    main_process = trainer.is_world_process_zero()
    try:
        trainer.wants_preflight = False  # here, with what the recipe says
        for finding in preflight(trainer, recipe, skip=recipe.flags.skip_checks):
            if main_process:
                finding.show(console)
        inputs["student"] = weights_fingerprint(recipe.student.model, recipe.student.revision)
        if "teacher" in trainer.judges:  # a method may ask none
            inputs["teacher"] = trainer.judges["teacher"].info().fingerprint
        if started:
            check_inputs(folder, started, given, inputs)
        # After the checks: a refused command touches no earlier run.
        checkpoint = checkpoint_to_resume(recipe, folder, console)
        if main_process:
            record_start(folder, given, inputs, started, changed)
        before = _Before(trainer, folder)
        trainer.callback_handler.callbacks.insert(0, before)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else False)
        say(recipe.args, "measuring the student again")
        # The main process alone may have the run folder, and all ask the teacher or none.
        told = [(folder.read_json("before.json") or {}).get("teacher_answers") if main_process else None]
        after = _snapshot(trainer, broadcast_object_list(told)[0])
        save_student(trainer, folder, recipe.student)
        problem = check_saved(trainer, folder, recipe.flags.skip_checks)
    finally:
        trainer.close()
    if main_process:
        folder.write_json("after.json", after)
        rows = trainer.encode.counts()
        summary = {
            "steps": trainer.state.global_step,
            "peak_gib": peak_memory_gib(),
            **({"rows": rows} if rows else {}),
        }
        folder.write_json("summary.json", summary)
        page = write_report(folder.path)
        _print(folder, Console(markup=False), page)
    leave_group()
    if problem:  # not before: all that was measured is kept
        raise UserError(problem)
    return 0


def say(args: DistillationConfig, doing: str) -> None:
    """A line, once a run, on what takes a while and shows no progress of its own."""
    if args.process_index == 0:
        Console(stderr=True, markup=False, highlight=False).print(f"…      {doing}")


def load_data(recipe: Recipe) -> dict[str, Any]:
    """The rows of a recipe: ``train``, and ``heldout`` where it names some; of several held-out sets a mapping."""
    data = recipe.data
    if not data.train:
        raise UserError(
            "data.train is empty; it must name a file or hub dataset of prompts. "
            "Fix: --config RECIPE, or --data.train FILE."
        )
    check_heldout(recipe.args, data.heldout)
    named = {"train": data.train, "heldout": data.heldout}
    if data.streaming:
        check_streaming(recipe.args)
    splits = {"train": data.split, "heldout": data.heldout_split}
    read = partial(load_rows, config=data, seed=recipe.args.seed)
    rows: dict[str, Any] = {}
    for name, source in named.items():
        if source:
            rows[name] = load_sets(source, f"data.{name}", partial(read, split=splits[name]))
    return rows


def build(
    recipe: Recipe,
    trainer_class: Callable[..., DistillationTrainer],
    data: Mapping[str, Any] | None = None,
) -> DistillationTrainer:
    """Models, data and trainer of a recipe; ``data`` as :func:`load_data` has it."""
    args, rows = recipe.args, data or load_data(recipe)
    if line := too_large(recipe):
        say(args, line)
    say(args, f"loading the student {recipe.student.model}")
    named = zip(recipe.teacher_sections, recipe.teachers, strict=True)
    outages = {f"{section}.max_outage_s": teacher.max_outage_s for section, teacher in named if teacher.url}
    check_outages(outages, args.ddp_timeout, args.world_size)
    student, tokenizer = load_student(recipe.student)
    if recipe.teachers and "teacher" not in getattr(args, "unread", ()):
        say(args, f"loading the teacher {', '.join(config.label or config.student for config in recipe.teachers)}")
    # on all ranks or on none: a service may not be there yet
    teacher = on_every_rank(lambda: load_teacher(recipe))
    if args.rollouts.engine == "vllm":
        say(args, "vllm starts with a copy of the student")
    try:
        trainer = trainer_class(
            student,
            args,
            teacher,
            train_dataset=rows["train"],
            eval_dataset=rows.get("heldout"),
            processing_class=tokenizer,
            peft_config=lora_config(recipe.student),
            data=recipe.data,
            contexts=contexts_of(recipe),
            min_aligned=min(config.min_aligned for config in recipe.teachers),
            view=recipe.teachers[0].view,
        )
        add_evaluations(trainer, recipe.evals, recipe.data)
        return trainer
    except BaseException:
        if teacher is not None:
            teacher.close()
        raise


def load_teacher(recipe: Recipe) -> Teacher | None:
    """The teacher of a recipe; None for a method that asks none.

    Raises:
        UserError: it cannot be had, or is not asked.
    """
    if "teacher" not in getattr(recipe.args, "unread", ()):
        longest = recipe.data.max_prompt_tokens + recipe.args.rollouts.max_new_tokens
        return load_teachers(recipe.teachers, recipe.args.device, longest, recipe.teacher_sections)
    for section, config in zip(recipe.teacher_sections, recipe.teachers, strict=True):
        if config.label or config.student:
            raise UserError(f"{section} is {config.label or config.student!r}, and nobody asks it. Fix: leave it out.")
    return None


def contexts_of(recipe: Recipe) -> dict[str, str]:
    """The context that the teacher reads in, as a trainer takes it.

    Raises:
        UserError: several teachers in different contexts, or one that ``data.contexts`` does not name.
    """
    named = sorted({config.context for config in recipe.teachers})
    if len(named) > 1:
        raise UserError(
            f"teachers have the contexts {', '.join(map(repr, named))}; all read in one. Fix: give all the same."
        )
    if not named[0]:
        return {}
    if named[0] not in recipe.data.contexts:
        raise UserError(
            f"teacher.context is {named[0]!r}, and data.contexts has {sorted(recipe.data.contexts) or 'nothing'}. "
            f'Fix: --data.contexts \'{{"{named[0]}": "COLUMN"}}\'.'
        )
    return {"teacher": named[0]}


def add_evaluations(trainer: DistillationTrainer, config: EvalsConfig, data: DataConfig) -> None:
    """The benchmarks that are scored during training, if there are any, with chats written as in training."""
    if config.suites:
        from llmdistill.evals.callback import EvalCallback

        chat: dict[str, Any] = {k: getattr(data, k) for k in ("system_prompt", "chat_template_kwargs")}
        trainer.add_callback(EvalCallback(trainer, **dataclasses.asdict(config), **chat))


def load_student(config: StudentConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The student of a recipe, and its tokenizer.

    Raises:
        UserError: it cannot be loaded, or is an adapter that another adapter is to be kept apart from.
    """
    alone = config.saved_as == "adapter" and config.adapter == "merge"
    if alone and (base := adapter_base(config.model, "student", config.revision)):
        raise UserError(
            f"student.saved_as is adapter, and student.model {config.model!r} an adapter of {base!r} itself: alone the "
            "new one would belong to no model that is stored. Fix: --student.saved_as merged, or --student.adapter "
            "continue."
        )
    return load_configured(config, "student")


class _Before(TrainerCallback):
    """Measures the untrained student once, when the model is ready for it (sharded, if it will be)."""

    def __init__(self, trainer: DistillationTrainer, folder: RunFolder) -> None:
        self.trainer, self.folder = trainer, folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            say(args, "measuring the student as it is, on held-out prompts")
            snapshot = _snapshot(self.trainer)
            if state.is_world_process_zero:
                self.folder.write_json("before.json", snapshot)


def _snapshot(trainer: DistillationTrainer, told: Sequence[str] | None = None) -> dict[str, Any]:
    """Held-out metrics, the share of prompts that are answered as the teacher does, and a few of the answers.

    Args:
        told: what the teacher answered before, which is not asked again.
    """
    if not trainer.eval_dataset:
        return {}
    heldout: Sequence[Prompt] = trainer.eval_dataset
    chosen = to_measure(heldout, trainer.args.heldout_sequences)
    trainer.heldout.tell = partial(say, trainer.args)
    try:
        measured = trainer.measure_heldout(chosen)
    finally:
        trainer.heldout.tell = lambda doing: None  # evaluations between the steps have a progress bar above them
    asked = heldout[: max(SHOWN_PROMPTS, min(len(chosen), COMPARED_ANSWERS))]
    greedy = Sampling(trainer.args.rollouts.max_new_tokens, temperature=0)
    say(trainer.args, f"greedy answers to {len(asked)} held-out prompts")
    trainer.rollout_engine.sync(trainer.forward_model(), trainer.state.global_step)
    answers = _texts(trainer, on_every_rank(lambda: trainer.rollout_engine.generate(asked, greedy)))
    given: dict[str, Any] = {}
    if trainer.judges and writes(trainer.teacher):  # one that is only stored has nothing new to say
        others = told
        if others is None or len(others) != len(asked):
            others = _texts(trainer, on_every_rank(lambda: trainer.teacher.generate(asked, greedy)))
        given["teacher_answers"] = others
        measured = {**measured, "answers": compare_answers([p.text for p in asked], answers, others)}
    return {
        "step": trainer.state.global_step,
        **({name: m.flat() for name, m in measured.items()} or {"not_measured": trainer.heldout.lacking(chosen)}),
        "sequences": {name: _per_sequence(m) for name, m in measured.items()},
        "prompts": [p.text for p in asked[:SHOWN_PROMPTS]],
        "student_answers": answers[:SHOWN_PROMPTS],
        **given,
    }


def _per_sequence(measured: Measurement) -> dict[str, list[float]]:
    """Means per sequence and their tokens, for the report's histograms and for paired comparisons."""
    means = {
        name: [total / max(n, 1) for total, n in zip(sums, measured.tokens, strict=True)]
        for name, sums in measured.sums.items()
    }
    return {**means, TOKENS: list(measured.tokens)}


def _texts(trainer: DistillationTrainer, rollout: Rollout) -> list[str]:
    ids = [row[mask].tolist() for row, mask in zip(rollout.input_ids, rollout.completion_mask, strict=True)]
    return [t.strip() for t in trainer.encode.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def checkpoint_to_resume(recipe: Recipe, folder: RunFolder, console: Console) -> Path | None:
    """Where to go on from; an earlier run in the way is moved aside, never overwritten."""
    if recipe.flags.resume:
        named = recipe.args.resume_from_checkpoint
        checkpoint = _named_checkpoint(named, recipe, folder) if isinstance(named, str) else folder.newest_checkpoint()
        relaid = checkpoint and check_layout(checkpoint, recipe.args)  # before anything is written about this run
        nothing = f"no complete checkpoint in {folder.path}: from the start"
        if recipe.args.process_index == 0:
            anew = f", written {written_layout(checkpoint)}: laid out anew" if checkpoint and relaid else ""
            console.print(f"resuming from {checkpoint}{anew}" if checkpoint else nothing)
        return checkpoint
    with recipe.args.main_process_first(local=False, desc="an earlier run is moved aside"):
        aside = folder.move_aside() if recipe.args.process_index == 0 else None
    if aside:
        console.print(f"an earlier run was in {folder.path}; it is now {aside} (--resume would have continued it)")
    return None


def _named_checkpoint(name: str, recipe: Recipe, folder: RunFolder) -> Path:
    """The checkpoint of a run that ``train.resume_from_checkpoint`` names. Later ones are put aside: what is written
    from here on would be taken for older than they are.

    Raises:
        UserError: it is none, or another run's.
    """
    checkpoint = Path(name)
    setting = f"train.resume_from_checkpoint is {name!r}"
    if not RunFolder.is_complete(checkpoint):
        there = ", ".join(sorted(c.name for c in folder.path.glob("checkpoint-*"))) or "none"
        raise UserError(
            f"{setting}, and no complete checkpoint is there; {folder.path} has {there}. Fix: one of those."
        )
    if checkpoint.resolve().parent != folder.path.resolve():
        raise UserError(
            f"{setting}, which is not in {folder.path}, where this run is. Fix: --output_dir {checkpoint.parent} to go "
            f"on with that run, or --student.model {name} for a new one from its weights."
        )
    with recipe.args.main_process_first(local=False, desc="later checkpoints are put aside"):
        if recipe.args.process_index == 0:
            folder.put_aside_after(checkpoint)
    return checkpoint


def save_student(trainer: Any, folder: RunFolder, student: StudentConfig) -> None:
    """``student/``: a checkpoint transformers and vLLM load. A LoRA student is saved merged, its adapter beside it; or
    its adapter alone, where ``student.saved_as`` says so."""
    target = folder.path / "student"
    if not hasattr(trainer.model, "merge_and_unload") or student.saved_as == "adapter":
        trainer.save_model(str(target))
    else:
        trainer.save_model(str(folder.path / "adapter"))
        main_process = trainer.is_world_process_zero()
        saving.save_student(trainer.model, target, trainer.encode.tokenizer, main_process=main_process)
    if student.saved_as == "merged" and student.model and trainer.is_world_process_zero():
        source = adapter_base(student.model, "student", student.revision)
        saving.keep_processor(trainer.model, source or student.model, "" if source else student.revision, target)


def check_saved(trainer: Any, folder: RunFolder, skipped: Sequence[str]) -> str | None:
    """Loads ``student/`` again and compares it with the student in memory; what is wrong, in every process."""
    if saving.SKIPPED_BY in skipped:
        return None
    model = trainer.model
    logits = saving.logits_on_few_tokens(model, trainer.model_wrapped if trainer.is_deepspeed_enabled else model)
    main = trainer.is_world_process_zero()
    found = [saving.differs_from(logits, folder.path / "student", model) if main else None]
    return broadcast_object_list(found)[0]  # type: ignore[no-any-return]


def _print(folder: RunFolder, console: Console, page: Path) -> None:
    before, after = folder.read_json("before.json") or {}, folder.read_json("after.json") or {}
    for text, title in TEXTS.items():
        if text not in before or text not in after:
            continue
        table = Table(title=f"held-out: {title} (95 % intervals over sequences; of the change, prompt by prompt)")
        table.add_column("per answer" if text == "answers" else "per token")
        for column in ("before", "after", "change"):
            table.add_column(column, justify="right")
        for metric in METRICS:
            if any(metric not in side[text] for side in (before, after)):  # of a teacher that tells no distributions
                continue
            cells = [interval(side[text], metric) for side in (before, after)]
            table.add_row(metric, *cells, difference(change(before, after, text, metric)))
        console.print(table)
    for i, prompt in enumerate(after.get("prompts", [])):
        console.rule(f"prompt {i + 1}")
        console.print(prompt.strip()[-400:], markup=False, style="dim")
        if after.get("teacher_answers"):
            console.print("teacher:       ", after["teacher_answers"][i][:300], markup=False)
        if before.get("student_answers"):
            console.print("student before:", before["student_answers"][i][:300], markup=False)
        console.print("student after: ", after["student_answers"][i][:300], markup=False)
    console.rule()
    console.print(f"student: {folder.path / 'student'}   page: {page}", markup=False)
    console.print(
        "next: open the page; then your own models on a GPU, with your prompts in train.jsonl and heldout.jsonl:\n"
        "  accelerate launch -m llmdistill.opd --config recipes/gpu/one_gpu.yaml \\\n"
        "    --student.model Qwen/Qwen3-1.7B --teacher.model Qwen/Qwen3-8B",
        markup=False,
    )
