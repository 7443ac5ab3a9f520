"""A checkpoint that another launch wrote, laid out as this one keeps it: ZeRO-3 to DDP, two processes to one."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from llmdistill.compat.placing import optimizer_inside, place
from llmdistill.compat.stored import DistributedFolder, OnlyWeights, Stored, WeightFiles, WholeFile, ZeroFiles
from llmdistill.errors import UserError
from llmdistill.models.helpers import NAME as HELPERS
from llmdistill.training.layout import converts, has_optimizer, launch_layout, written_layout

SCHEDULE = "scheduler.pt"
logger = logging.getLogger(__name__)


def lay_out(trainer: Any, checkpoint: Path) -> None:
    """Weights, the optimizer's memory and the schedule, once the model is wrapped for this launch. Every process calls
    it, and reads of the files what it needs.

    Raises:
        UserError: the checkpoint is not of these weights, or its optimizer cannot be taken apart.
    """
    args, written = trainer.args, written_layout(checkpoint)
    named = {_plain(name): p for name, p in trainer.model.named_parameters() if p.requires_grad}
    keeps = has_optimizer(checkpoint) and converts(args)
    try:
        order = [_plain(name) for group in trainer.optimizer_groups for name in group]
        stored = _stored(checkpoint, order, keeps)
        place(trainer.model, optimizer_inside(trainer.optimizer), stored, named)
        _load_schedule(trainer, checkpoint)
    except Exception as error:  # torch.load raises nearly anything on bytes that are no checkpoint
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"{checkpoint} was written {written} and cannot be laid out for a launch {launch_layout(args)}: {reason}. "
            "Fix: resume with as many processes, and the launch file, that wrote it."
        ) from error
    if hasattr(trainer.model_wrapped, "global_steps"):  # DeepSpeed's engine names its parts by it
        trainer.model_wrapped.global_steps = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    if args.process_index == 0:
        logger.warning(
            "%s was written %s: weights, %s and the schedule are laid out anew for a launch %s; random states are "
            "derived from the seed and the step",
            *(checkpoint, written, "the optimizer" if keeps else "a new optimizer", launch_layout(args)),
        )


def lay_out_weights(trainer: Any, checkpoint: Path) -> None:
    """Weights alone, of a checkpoint that another launch wrote, into a model that has been trained in this one.

    Raises:
        UserError: the checkpoint is not of these weights.
    """
    named = {_plain(name): p for name, p in trainer.model.named_parameters() if p.requires_grad}
    try:
        place(trainer.model, optimizer_inside(trainer.optimizer), _stored(checkpoint, [], keeps=False), named)
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"{checkpoint}, the best of the run, was written {written_layout(checkpoint)} and cannot be laid out for a "
            f"launch {launch_layout(trainer.args)}: {reason}. Fix: --load_best_model_at_end false; the newest "
            "checkpoint has what was trained."
        ) from error


def _stored(checkpoint: Path, order: list[str], keeps: bool) -> Stored:
    """
    Args:
        order: of the weights in the optimizer, as it was made.
        keeps: whether its memory is wanted.
    """
    kind, files = written_layout(checkpoint).kind, WeightFiles(checkpoint, HELPERS)
    if kind == "zero":
        found: Stored = ZeroFiles(checkpoint / (checkpoint / "latest").read_text().strip())
    elif kind == "fsdp":
        found = DistributedFolder(checkpoint, files)
    elif keeps:
        found = WholeFile(checkpoint, order, files)
    else:
        return OnlyWeights(files)
    return found if keeps else OnlyWeights(found)


def _load_schedule(trainer: Any, checkpoint: Path) -> None:
    """And the rates that it has come to, which are kept in the optimizer."""
    file = checkpoint / SCHEDULE
    if not file.is_file():
        if has_optimizer(checkpoint) and not trainer.args.restart_optimizer:
            raise ValueError(f"it has no {SCHEDULE}; the schedule is DeepSpeed's own")
        return
    state, empty = torch.load(file, weights_only=True), [not group for group in trainer.optimizer_groups]
    for name, values in state.items():
        if isinstance(values, list):
            state[name] = _of_groups(values, empty, len(trainer.optimizer.param_groups))
    trainer.lr_scheduler.load_state_dict(state)
    schedule = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
    for group, rate, base in zip(trainer.optimizer.param_groups, schedule._last_lr, schedule.base_lrs, strict=True):
        group["lr"], group["initial_lr"] = rate, base


def _of_groups(values: list[Any], empty: list[bool], count: int) -> list[Any]:
    """What a schedule remembers of each group of weights, for ``count`` of them: DeepSpeed leaves empty groups out."""
    if len(values) == count:
        return values
    if count < len(values):
        return [value for value, nothing in zip(values, empty, strict=True) if not nothing]
    given = iter(values)
    return [values[0] if nothing else next(given) for nothing in empty]


def _plain(name: str) -> str:
    """Without what activation checkpointing and compiling put into it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
