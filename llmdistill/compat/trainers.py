"""What transformers' trainer does between the methods that it lets one override: checkpoints and resuming.

Each function takes a trainer and replaces one of its methods whose name begins with an underscore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn


def beside_random_states(trainer: Any, write: Callable[[str], None]) -> None:
    """``write(folder)`` where transformers' trainer writes the random states of a checkpoint.

    That is in every rank, and before ``trainer_state.json``, which says that a checkpoint is complete.
    """
    save = trainer._save_rng_state

    def saved(folder: str) -> None:
        save(folder)
        write(folder)

    trainer._save_rng_state = saved


def resume_at_present_rate(trainer: Any) -> None:
    """A run that is resumed goes on at the learning rate it is now given, on the stored schedule's shape.

    transformers would restore the stored rate with the schedule and the optimizer.
    """
    load = trainer._load_optimizer_and_scheduler

    def loaded(checkpoint: str | None) -> None:
        scheduler: Any = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
        present = list(getattr(scheduler, "base_lrs", ()))
        load(checkpoint)
        stored = list(getattr(scheduler, "base_lrs", ()))
        if present == stored or not all(stored) or trainer.optimizer is None:
            return
        scheduler.base_lrs = present
        for group, now, then in zip(trainer.optimizer.param_groups, present, stored, strict=True):
            group["lr"], group["initial_lr"] = group["lr"] * now / then, now
        scheduler._last_lr = [group["lr"] for group in trainer.optimizer.param_groups]  # what the log shows

    trainer._load_optimizer_and_scheduler = loaded


def save_without(trainer: Any, part: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], file: str) -> None:
    """Whatever transformers' trainer saves as the model is without ``part(state_dict)``.

    In a checkpoint that part stands beside it in ``file``, by the names that ``part`` gives its tensors.
    """
    save = trainer._save

    def saved(output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        from safetensors.torch import save_file

        state = dict(trainer.model.state_dict() if state_dict is None else state_dict)
        taken = part(state)
        theirs = {id(tensor) for tensor in taken.values()}
        save(output_dir, {name: tensor for name, tensor in state.items() if id(tensor) not in theirs})
        folder = Path(output_dir or trainer.args.output_dir)
        if trainer.args.should_save and folder.name.startswith("checkpoint-"):
            save_file({name: tensor.contiguous() for name, tensor in taken.items()}, folder / file)

    trainer._save = saved


def after_weights_are_loaded(trainer: Any, read: Callable[[str], None]) -> None:
    """``read(checkpoint)`` once transformers' trainer has loaded a checkpoint's weights."""
    load = trainer._load_from_checkpoint

    def loaded(checkpoint: str, model: Any = None) -> None:
        load(checkpoint, model)
        read(checkpoint)

    trainer._load_from_checkpoint = loaded


@contextmanager
def more_passes(accelerator: Any, model: nn.Module) -> Iterator[None]:
    """A backward pass that another one follows before the gradients are taken together, and the step is taken."""
    state = accelerator.gradient_state
    last_of_step = state.sync_gradients
    state._set_sync_gradients(False)  # DeepSpeed's engine takes the step with the backward pass unless this is said
    from accelerate.utils import DistributedType  # not before: this package imports nothing heavy

    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    together = nullcontext() if deepspeed else accelerator.no_sync(model)
    try:
        with together:
            yield
    finally:
        state._set_sync_gradients(last_of_step)


def first_step(trainer: Any) -> int:
    """The step that transformers' trainer started or resumed from; 0 before it did."""
    return int(getattr(trainer, "_initial_global_step", 0))
