"""``--resume`` goes on with the run that is in the folder, and not with another one under its name.

The folder's ``config.yaml`` is compared with the recipe as it is given now. What is not listed below must be as it was:
the student, the objective, the sampling, the data, the seed and the optimizer are what the numbers so far are of. Rows
and models are compared by content (``inputs.json``: hashes of the rows, fingerprints of the weights), so a file or a
service may have moved, and one that has changed in its place is noticed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from llmdistill.errors import UserError
from llmdistill.recipe.command_line import Recipe
from llmdistill.record.run_folder import RunFolder

# May differ from what the run was started with. "teacher" speaks of every teacher, "*" of all keys of a section.
MAY_CHANGE = frozenset(
    {
        # where things are, as long as they are the same (see the module's docstring); how they are reached
        *("teacher.tokenizer", "teacher.token_env", "teacher.timeout_s", "teacher.max_outage_s", "teacher.in_flight"),
        *("teacher.name", "teacher.lossless", "student.saved_as"),
        *("rollouts.engine", "rollouts.url", "rollouts.token_env", "rollouts.push_folder", "rollouts.dtype"),
        # memory and speed
        *("student.attn_implementation", "teacher.attn_implementation", "teacher.batch_tokens"),
        *("student.trust_remote_code", "teacher.trust_remote_code"),
        *(
            "rollouts.kv_cache_gib",
            "rollouts.gpu_memory_utilization",
            "rollouts.batch_tokens",
            "objective.chunk_tokens",
            "objective.batch_tokens",
            "objective.packing",
        ),
        *("train.bf16", "train.fp16", "train.tf32", "train.bf16_full_eval", "train.fp16_full_eval", "train.use_cpu"),
        *("train.gradient_checkpointing", "train.gradient_checkpointing_kwargs", "train.torch_empty_cache_steps"),
        *("train.torch_compile", "train.torch_compile_backend", "train.torch_compile_mode"),
        *("train.use_liger_kernel", "train.liger_kernel_config", "train.full_determinism"),
        *("train.deepspeed", "train.fsdp", "train.fsdp_config", "train.accelerator_config", "train.parallelism_config"),
        *("train.ddp_backend", "train.ddp_timeout", "train.ddp_find_unused_parameters", "train.ddp_bucket_cap_mb"),
        *("train.ddp_broadcast_buffers", "train.ddp_static_graph", "train.local_rank"),
        *("train.dataloader_num_workers", "train.dataloader_pin_memory", "train.dataloader_persistent_workers"),
        *("train.dataloader_prefetch_factor", "train.dataloader_multiprocessing_context"),
        # how far, and how fast: a longer run, or a lower rate after a loss that was no number
        *("train.max_steps", "train.num_train_epochs", "train.learning_rate", "objective.stage1_learning_rate"),
        *("objective.guard_drop", "objective.guard_rejected_drop", "objective.guard_stop", "objective.guard_window"),
        # what is measured, logged, shown and saved, and when
        *("evals.*", "objective.heldout_sequences"),
        *("train.output_dir", "train.logging_strategy", "train.logging_steps", "train.logging_first_step"),
        *("train.logging_nan_inf_filter", "train.log_level", "train.log_level_replica", "train.log_on_each_node"),
        *("train.disable_tqdm", "train.report_to", "train.run_name", "train.project", "train.trackio_space_id"),
        *("train.trackio_bucket_id", "train.trackio_static_space_id", "train.include_num_input_tokens_seen"),
        *("train.eval_strategy", "train.eval_steps", "train.eval_delay", "train.eval_on_start"),
        *("train.per_device_eval_batch_size", "train.eval_accumulation_steps", "train.skip_memory_metrics"),
        *("train.save_strategy", "train.save_steps", "train.save_total_limit", "train.save_on_each_node"),
        *(
            "train.save_only_model",
            "objective.save_in_background",
            "train.enable_jit_checkpoint",
            "train.load_best_model_at_end",
            "train.metric_for_best_model",
        ),
        *("train.greater_is_better", "train.push_to_hub", "train.hub_token", "train.hub_private_repo"),
        *("train.hub_model_id", "train.hub_strategy", "train.hub_always_push", "train.hub_revision", "train.debug"),
        *("train.do_train", "train.do_eval", "train.do_predict", "train.resume_from_checkpoint"),
    }
)
# Compared by content where inputs.json has it, else word by word.
BY_CONTENT = {
    "student": ("student.model", "student.revision"),
    "teacher": ("teacher.model", "teacher.revision", "teacher.url", "teacher.engine", "teacher.stored"),
    "data.train": ("data.train",),
    "data.heldout": ("data.heldout",),
    "objective.positives": ("objective.positives",),
}
# Prompts of a step: their product with the number of processes counts.
BATCH = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")


@dataclass(frozen=True)
class Start:
    """What a run was started with, or is now given."""

    config: dict[str, Any]
    inputs: dict[str, Any]  # content of rows and models by name, and the number of processes


def read_start(folder: RunFolder) -> Start | None:
    """Of the run in the folder; None where there is none.

    A config.yaml that is damaged, as by a power loss, is warned of and compared with nothing: the checkpoint is whole.
    """
    file = folder.path / "config.yaml"
    if not file.is_file():
        return None
    try:
        config = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        warnings.warn(
            f"{file} is damaged: it holds no settings. The recipe is taken as it is; --resume would have compared them",
            stacklevel=2,
        )
        config = {}
    return Start(config, folder.read_json("inputs.json") or {})


def given_start(recipe: Recipe, leave_out: Iterable[str] = ()) -> Start:
    """What a run of this recipe would be started with, its inputs apart. Taken before anything is made of the recipe:
    trainers change their arguments.

    Args:
        leave_out: sections that the front door does not read.
    """
    sections = {name: values for name, values in recipe.resolved().items() if name not in set(leave_out)}
    config = yaml.safe_load(yaml.safe_dump(sections, sort_keys=False))  # as it will be read back
    return Start(config, {"processes": recipe.args.world_size})


def check_settings(recipe: Recipe, folder: RunFolder, started: Start, given: Start) -> dict[str, list[Any]]:
    """What has changed among the settings that may: {setting: [then, now]}.

    Raises:
        UserError: others have changed; a line for each.
    """
    if not started.config:  # it was damaged
        return {}
    before, now = _flat(started.config), _flat(given.config)
    changed, refused = {}, []
    same_batch = _prompts_a_step(recipe, before, started) == _prompts_a_step(recipe, now, given)
    teachers = [len(_teachers(side.config)) for side in (started, given)]
    if teachers[0] != teachers[1]:
        then, value = teachers
        refused.append(f"the recipe has {value} teachers; the run was started with {then}. Fix: those of config.yaml")
    for name in dict.fromkeys((*now, *before)):
        if _of_any_teacher(name).startswith("teacher.") and teachers[0] != teachers[1]:
            continue
        then, value = (side[name] if name in side else _default(recipe, name) for side in (before, now))
        if then == value or _UNKNOWN in (then, value):
            continue
        kind = _of_any_teacher(name)
        allowed = kind in MAY_CHANGE or f"{kind.partition('.')[0]}.*" in MAY_CHANGE or (kind in BATCH and same_batch)
        content = next((what for what, settings in BY_CONTENT.items() if kind in settings), None)
        if allowed or content in started.inputs:
            changed[name] = [then, value]
        else:
            refused.append(
                f"{name} is {_short(value)}; the run was started with {_short(then)}. Fix: {_fix(name, then)}"
            )
    _refuse(folder, refused)
    return changed


def check_inputs(folder: RunFolder, started: Start, given: Start, inputs: Mapping[str, str]) -> None:
    """Whether the rows and models are those the run was started with.

    Args:
        inputs: their content by name, such as :func:`rows_hash` and fingerprints.

    Raises:
        UserError: one is not; a line for each.
    """
    refused = []
    for name, content in inputs.items():
        if (then := started.inputs.get(name, content)) == content:
            continue
        before, now = (_named(_flat(side.config), name) for side in (started, given))
        what = "rows" if name.startswith(("data.", "objective.")) else "weights"
        was = f"those of {before} were at the start" if before != now else "they were at the start"
        fix = f"give {before}" if before != now else "put back what was there"
        refused.append(f"{name} is {now}, whose {what} are not what {was} ({content}, then {then}). Fix: {fix}")
    _refuse(folder, refused)


def record_start(
    folder: RunFolder, given: Start, inputs: Mapping[str, str], started: Start | None, changed: Mapping[str, list[Any]]
) -> None:
    """Writes what this run, or this part of it, goes by. ``config.yaml`` stays as it is where nothing has changed."""
    if started is None or changed or not started.config:
        folder.write_config(given.config)
    if changed:
        folder.append_line("resumed.jsonl", {"changed": changed})
    folder.write_json("inputs.json", {**given.inputs, **inputs})


def rows_hash(rows: Iterable[Any]) -> str:
    """16 hex digits over the content of rows, in their order; of a stream over its first ones, of sets over all."""
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(rows, Mapping):
        rows = [row for name, each in sorted(rows.items()) for row in ({"set": name}, *each)]
    for row in rows if hasattr(rows, "__len__") else itertools.islice(rows, STREAMED):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        digest.update(b"\n")
    return digest.hexdigest()


STREAMED = 256  # rows of a stream that are compared
_UNKNOWN = object()  # a setting that there was or is not


def _teachers(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    several = config.get("teachers")
    return several if isinstance(several, list) else [config["teacher"]] if "teacher" in config else []


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """{"section.key": value}; of several teachers ``teachers[i].key``, of one ``teacher.key``."""
    teachers = _teachers(config)
    sections = {name: values for name, values in config.items() if name not in ("teacher", "teachers")}
    sections |= {f"teachers[{i}]" if len(teachers) > 1 else "teacher": entry for i, entry in enumerate(teachers)}
    return {
        f"{section}.{key}": value
        for section, values in sections.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }


def _of_any_teacher(name: str) -> str:
    section, _, key = name.partition(".")
    return f"teacher.{key}" if section.startswith("teachers[") else name


def _default(recipe: Recipe, name: str) -> Any:
    section, _, key = _of_any_teacher(name).partition(".")
    return recipe.default(section, key, _UNKNOWN)


def _prompts_a_step(recipe: Recipe, config: Mapping[str, Any], start: Start) -> Any:
    each = [config.get(name, _default(recipe, name)) for name in BATCH]
    return each[0] * each[1] * start.inputs.get("processes", recipe.args.world_size)


def _named(config: Mapping[str, Any], name: str) -> str:
    """What the recipe calls an input."""
    wanted = BY_CONTENT[name]
    found = [v for k, v in config.items() if _of_any_teacher(k) in wanted and not k.endswith(".engine") and v]
    return " + ".join(map(repr, found)) or "''"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _fix(name: str, then: Any) -> str:
    if isinstance(then, list | dict) or then is None:
        return "as it was in config.yaml"
    text = str(then).lower() if isinstance(then, bool) else str(then)
    return f"--{name.replace('teachers[', 'teachers.').replace(']', '')} {text or repr('')}"


def _refuse(folder: RunFolder, refused: list[str]) -> None:
    if not refused:
        return
    lines = "".join(f"\n  {line}" for line in refused)
    raise UserError(
        f"--resume goes on with the run in {folder.path}, and this would be another one:{lines}\n"
        "Or leave --resume out: a new run begins, and this one is moved aside."
    )
