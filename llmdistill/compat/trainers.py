"""What transformers' trainer does between the methods that it lets one override: checkpoints and resuming.

Each function takes a trainer and replaces one of its methods whose name begins with an underscore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llmdistill.compat.patching import patched


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


def keep_empty_groups(trainer: Any) -> None:
    """A group of the optimizer without weights (an adapter has no biases, and helpers none) keeps its settings when
    a checkpoint is loaded. torch's distributed checkpoint names groups by their weights, and leaves it without any.
    """
    load = trainer._load_optimizer_and_scheduler

    def loaded(checkpoint: str | None) -> None:
        groups = () if trainer.optimizer is None else trainer.optimizer.param_groups
        before = [dict(group) for group in groups]
        load(checkpoint)
        for group, settings in zip(trainer.optimizer.param_groups if before else (), before, strict=False):
            if not group["params"]:
                group.update({name: value for name, value in settings.items() if name not in group})

    trainer._load_optimizer_and_scheduler = loaded


def lay_out_anew(trainer: Any, wanted: Callable[[], bool], put: Callable[[str], None]) -> None:
    """Where ``wanted()``, a checkpoint's weights, optimizer and schedule are not loaded by transformers' trainer but by
    ``put(checkpoint)``, once the model is wrapped. ``trainer.optimizer_groups`` has the names of the weights as the
    optimizer was given them, which DeepSpeed puts flat ones in the place of.
    """
    create, prepare = trainer.create_optimizer, trainer._prepare_for_training
    load_weights, load_optimizer = trainer._load_from_checkpoint, trainer._load_optimizer_and_scheduler

    def created(*args: Any, **kwargs: Any) -> Any:
        optimizer = create(*args, **kwargs)
        names = {id(p): name for name, p in trainer.model.named_parameters()}
        given = [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
        if all(None not in group for group in given):
            trainer.optimizer_groups = given
        return optimizer

    def prepared(*args: Any, **kwargs: Any) -> Any:
        if not wanted():
            return prepare(*args, **kwargs)
        from transformers import trainer as module  # not before: this package imports nothing heavy

        with patched(module, "deepspeed_load_checkpoint", lambda *args, **kwargs: None):
            return prepare(*args, **kwargs)

    def weights(checkpoint: str, model: Any = None) -> None:
        if not wanted():
            load_weights(checkpoint, model)

    def optimizer(checkpoint: str | None) -> None:
        if checkpoint is None or not wanted():
            load_optimizer(checkpoint)
        else:
            put(checkpoint)

    trainer.create_optimizer, trainer._prepare_for_training = created, prepared
    trainer._load_from_checkpoint, trainer._load_optimizer_and_scheduler = weights, optimizer


def derive_random_states(trainer: Any) -> None:
    """Resumed by another number of processes: random states are derived from seed, step and rank. transformers would
    leave them, of the ranks without a file, as they were at the start.
    """
    load = trainer._load_rng_state

    def loaded(checkpoint: str | None) -> None:
        files = 0 if checkpoint is None else len(list(Path(checkpoint).glob("rng_state*.pth")))
        if files in (0, trainer.args.world_size):
            load(checkpoint)
            return
        from transformers import set_seed  # not before: this package imports nothing heavy

        args = trainer.args
        set_seed((args.seed * 1_000_003 + trainer.state.global_step * 1_009 + args.process_index) % 2**32)

    trainer._load_rng_state = loaded


def load_best_with(trainer: Any, put: Callable[[str], bool]) -> None:
    """What ``load_best_model_at_end`` loads, ``put(checkpoint)`` does, or where that says false transformers."""
    load = trainer._load_best_model

    def loaded() -> None:
        if not put(str(trainer.state.best_model_checkpoint)):
            load()

    trainer._load_best_model = loaded


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
