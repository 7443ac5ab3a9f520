"""Which checkpoint a run goes on from, and which launch can: DeepSpeed keeps the optimizer in parts, one for each
process, and with ``save_only_model`` there is none.

Without this a launch would find no optimizer, and go on with a new one in silence; one of another number of processes
would end in DeepSpeed's own words, after everything was loaded.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from llmdistill.errors import UserError


def check_layout(checkpoint: str | Path, args: TrainingArguments) -> None:
    """That this launch can read the optimizer of a checkpoint.

    Raises:
        UserError: it was written by DeepSpeed and this is another launch, or the other way round; or it has no
            optimizer, and ``restart_optimizer`` does not ask for a new one.
    """
    plugin = args.deepspeed_plugin
    own = None if plugin is None else (2 if plugin.zero_stage < 3 else 3, args.world_size)
    parts = _parts(Path(checkpoint))
    if parts is None and Path(checkpoint).is_dir() and not any(Path(checkpoint).glob("optimizer*")):
        _check_restart(checkpoint, args, own is not None)
        return
    if parts == own:
        return
    raise UserError(
        f"{checkpoint} was written {_said(parts)}, and this is a launch {_said(own)}: the optimizer cannot be read. "
        "Fix: resume with as many processes, and the launch file, that wrote it."
    )


def named_checkpoint(given: Any, args: TrainingArguments) -> Any:
    """What ``train()`` was given to resume from, or where nothing was, what ``resume_from_checkpoint`` says."""
    return args.resume_from_checkpoint if given is None else given


def _check_restart(checkpoint: str | Path, args: TrainingArguments, deepspeed: bool) -> None:
    without = f"{checkpoint} has no optimizer (it was written with train.save_only_model)"
    if deepspeed:
        raise UserError(
            f"{without}, and DeepSpeed resumes with its own only. Fix: --student.model {checkpoint}, a new run from "
            "those weights."
        )
    if not getattr(args, "restart_optimizer", False):
        raise UserError(
            f"{without}: the optimizer and the learning rate's schedule would begin anew, from step 0 of it. "
            "Fix: --restart_optimizer true if that is meant, or a checkpoint with an optimizer."
        )
    warnings.warn(
        f"{checkpoint} has no optimizer: it and the learning rate's schedule begin anew (train.restart_optimizer)",
        stacklevel=4,
    )


def _parts(checkpoint: Path) -> tuple[int, int] | None:
    """ZeRO's stage (2 also stands for the lower ones) and the number of processes; None without DeepSpeed."""
    latest = checkpoint / "latest"
    if not latest.is_file():
        return None
    folder = checkpoint / latest.read_text().strip()
    optimizers = len(list(folder.glob("*zero_pp_rank_*optim_states.pt")))
    return (3 if list(folder.glob("*zero_pp_rank_*model_states.pt")) else 2), optimizers


def _said(layout: tuple[int, int] | None) -> str:
    if layout is None:
        return "without DeepSpeed"
    stage, processes = layout
    return f"with DeepSpeed ZeRO-{stage} over {processes} process{'es' if processes > 1 else ''}"
