"""Which checkpoint a run goes on from, and how this launch reads it.

A launch of the same layout reads it as it is. For any other the weights, the schedule and the step are always kept, and
what the optimizer remembers is laid out anew (:mod:`.relayout`) where it is a number for every element of a weight;
where it is something else, or was not saved, that is refused by name, unless ``restart_optimizer`` asks for a new one.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import TrainingArguments

from llmdistill.compat.stored import FSDP_MODEL
from llmdistill.errors import UserError
from llmdistill.recipe.launches import asks_for_fsdp
from llmdistill.recipe.train_fields import ELEMENTWISE


@dataclass(frozen=True)
class Layout:
    """How a launch keeps weights and optimizer: whole in every process, in ZeRO's parts, or in FSDP2's."""

    kind: Literal["whole", "zero", "fsdp"] = "whole"
    stage: int = 0  # ZeRO's; 2 also stands for the lower ones
    processes: int = 0  # whose parts there are; 0: it does not matter, of whole ones, and of FSDP2's, which torch fits

    def __str__(self) -> str:
        if self.kind == "zero":
            return f"with DeepSpeed ZeRO-{self.stage} over {self.processes} process{'es' if self.processes > 1 else ''}"
        return "without DeepSpeed" if self.kind == "whole" else "with FSDP2"


def written_layout(checkpoint: str | Path) -> Layout:
    """Of the launch that wrote a checkpoint."""
    folder = Path(checkpoint)
    latest = folder / "latest"
    if latest.is_file():
        parts = folder / latest.read_text().strip()
        processes = len(list(parts.glob("*zero_pp_rank_*optim_states.pt")))
        stage = 3 if list(parts.glob("*zero_pp_rank_*model_states.pt")) else 2
        return Layout("zero", stage, processes)
    return Layout("fsdp") if (folder / FSDP_MODEL).is_dir() else Layout()


def launch_layout(args: TrainingArguments) -> Layout:
    """Of this launch."""
    if (plugin := args.deepspeed_plugin) is not None:
        return Layout("zero", 2 if plugin.zero_stage < 3 else 3, args.world_size)
    return Layout("fsdp") if getattr(args, "fsdp", None) or asks_for_fsdp() else Layout()


def has_optimizer(checkpoint: str | Path) -> bool:
    """Whether there is one in a checkpoint, in any layout; where there is no such folder, what reads it says so."""
    folder = Path(checkpoint)
    return not folder.is_dir() or written_layout(folder).kind == "zero" or any(folder.glob("optimizer*"))


def is_relaid(checkpoint: str | Path, args: TrainingArguments) -> bool:
    """Whether weights and optimizer were kept in other parts than this launch keeps them."""
    return written_layout(checkpoint) != launch_layout(args)


def check_layout(checkpoint: str | Path, args: TrainingArguments) -> bool:
    """Whether a checkpoint must be laid out anew for this launch.

    Raises:
        UserError: its optimizer cannot be read here, or is not there, and ``restart_optimizer`` does not ask for a new
            one.
    """
    written, own = written_layout(checkpoint), launch_layout(args)
    restarts = getattr(args, "restart_optimizer", False)
    if not has_optimizer(checkpoint):
        _check_restart(
            f"{checkpoint} has no optimizer (it was written with train.save_only_model)",
            "it and the learning rate's schedule begin anew",
            restarts,
        )
        return own.kind != "whole"
    if written == own:
        return False
    if not converts(args):
        _check_restart(
            f"{checkpoint} was written {written}, and this is a launch {own}: what train.optim "
            f"{_optim(args)} remembers cannot be laid out anew",
            "it begins anew",
            restarts,
        )
    return True


def converts(args: TrainingArguments) -> bool:
    """Whether what the optimizer remembers can be laid out anew."""
    return _optim(args) in ELEMENTWISE


def named_checkpoint(given: Any, args: TrainingArguments) -> Any:
    """What ``train()`` was given to resume from, or where nothing was, what ``resume_from_checkpoint`` says."""
    return args.resume_from_checkpoint if given is None else given


def _check_restart(what: str, then: str, restarts: bool) -> None:
    if not restarts:
        raise UserError(
            f"{what}: {then}. Fix: --restart_optimizer true if that is meant, or a checkpoint of this launch with its "
            "optimizer."
        )
    warnings.warn(f"{what}: {then} (train.restart_optimizer)", stacklevel=4)


def _optim(args: Any) -> str:
    return str(getattr(args.optim, "value", args.optim))
