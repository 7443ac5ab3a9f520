"""Which launch a checkpoint can be resumed by: DeepSpeed keeps the optimizer in parts, one for each process.

Without this a launch without DeepSpeed would find no optimizer, and go on with a new one in silence; one of another
number of processes would end in DeepSpeed's own words, after everything was loaded.
"""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments

from llmdistill.errors import UserError


def check_layout(checkpoint: str | Path, args: TrainingArguments) -> None:
    """That this launch can read the optimizer of a checkpoint.

    Raises:
        UserError: it was written by DeepSpeed and this is another launch, or the other way round.
    """
    plugin = args.deepspeed_plugin
    own = None if plugin is None else (2 if plugin.zero_stage < 3 else 3, args.world_size)
    parts = _parts(Path(checkpoint))
    if parts == own or (parts is None and args.save_only_model):
        return
    raise UserError(
        f"{checkpoint} was written {_said(parts)}, and this is a launch {_said(own)}: the optimizer cannot be read. "
        "Fix: resume with as many processes, and the launch file, that wrote it."
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
