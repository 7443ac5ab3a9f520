"""Stops training where its numbers end, and saves nothing from beyond: of our trainers and of TRL's alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from llmdistill.compat import checkpoints, fsdp, trainers, zero3
from llmdistill.errors import UserError
from llmdistill.recipe.launches import asks_for_fsdp
from llmdistill.record.run_folder import RunFolder
from llmdistill.training.layout import check_layout, is_relaid, named_checkpoint
from llmdistill.training.relayout import lay_out, lay_out_weights

LARGEST = math.sqrt(torch.finfo(torch.float32).max)  # 1.8e19: the square of more is inf, in every norm of a model


class FiniteTrainer(Trainer):
    """A ``transformers.Trainer`` that stops at a loss that is no number, and saves no weights that are none.

    What an update destroys is first seen by the next loss. A checkpoint written in between would be the newest one,
    the one ``--resume`` takes, and ``save_total_limit`` would remove a good one for it.
    """

    rate = "train.learning_rate"  # the setting that messages name

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        behind = getattr(self.args, "save_in_background", False)
        self._checkpoint_finished = checkpoints.saved_aside(self, self._refuse_lost_weights, in_background=behind)
        self.relaid = False  # resumed from a checkpoint that another launch wrote
        trainers.lay_out_anew(self, lambda: self.relaid, lambda checkpoint: lay_out(self, Path(checkpoint)))
        trainers.load_best_with(self, self._put_best)
        trainers.derive_random_states(self)
        trainers.keep_empty_groups(self)
        trainers.resume_at_present_rate(self)  # a run that is resumed may have been given a lower one

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        fsdp.prepare(self, asks_for_fsdp() or bool(self.args.fsdp))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own.

        Raises:
            UserError: the checkpoint is of another launch and cannot be laid out anew; there was nothing to train on;
                or the last update destroyed the weights (a loss or an earlier checkpoint would have said so before).
        """
        resume_from_checkpoint = named_checkpoint(resume_from_checkpoint, self.args)
        last = get_last_checkpoint(str(self.args.output_dir)) if resume_from_checkpoint is True else None
        named = last or resume_from_checkpoint
        self.relaid = isinstance(named, str | Path) and bool(named) and check_layout(named, self.args)
        rows, size = self.train_dataset, self.args.per_device_train_batch_size * self.args.world_size
        if self.args.dataloader_drop_last and isinstance(rows, Sized) and len(rows) < size:
            raise self._no_step(
                f"{len(rows)} rows make not one batch of {size}, and dataloader_drop_last leaves it out"
            )
        if isinstance(rows, Sized) and 0 < len(rows) < self.args.world_size:
            raise UserError(
                f"{len(rows)} rows are fewer than {self.args.world_size} processes: they would be repeated for each to "
                "have one. Fix: as many processes as rows, or more rows."
            )
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self._checkpoint_finished()
        if self.state.global_step == 0:
            raise self._no_step("the rows ended before the first one")
        self._refuse_lost_weights()
        return result

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self._best_is_measured():
            return super()._evaluate(*args, **kwargs)  # type: ignore[misc]

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> Any:
        with self._best_is_measured():
            return super()._determine_best_metric(*args, **kwargs)

    @contextmanager
    def _best_is_measured(self) -> Iterator[None]:
        """Says which metrics there are where that of ``metric_for_best_model`` is none of them."""
        try:
            yield
        except KeyError as error:
            _, found, rest = str(error.args[0]).partition("available evaluation metrics are: ")
            if not found:
                raise
            raise UserError(
                f"train.metric_for_best_model is {self.args.metric_for_best_model!r}, and the evaluation has "
                f"{rest.partition(']')[0][1:]}. Fix: one of those."
            ) from error

    def _put_best(self, checkpoint: str) -> bool:
        """The best checkpoint of a run that was resumed may be another launch's."""
        self._checkpoint_finished()
        fsdp.shard_again(self.model)  # type: ignore[arg-type]
        if not is_relaid(checkpoint, self.args):
            return False
        lay_out_weights(self, Path(checkpoint))
        return True

    def _no_step(self, why: str) -> UserError:
        return UserError(
            f"no step was trained: {why}. Fix: more rows, or a smaller train.per_device_train_batch_size than "
            f"{self.args.per_device_train_batch_size}."
        )

    def _all_steps_done(self) -> bool:
        """Resumed where there is nothing left to train: transformers would go on, in the middle of an epoch."""
        return 0 < self.state.max_steps <= self.state.global_step

    def _refuse_lost_weights(self) -> None:
        """Every process must call it; all of them raise."""
        lost = torch.tensor(float(not usable(self.model)), device=self.args.device)  # type: ignore[arg-type]
        if self.accelerator.reduce(lost, "sum").item():  # type: ignore[union-attr]
            raise self._lost("", "; they were not saved")

    def _not_finite(self, loss: float, rows: Iterable[Any]) -> UserError:
        """Of a loss in training; ``rows`` are those of its micro-batch."""
        row_names = list(dict.fromkeys(map(str, rows)))  # a prompt may have several samples
        shown = ", ".join(row_names[:16]) + (" …" if len(row_names) > 16 else "")
        message = f"the loss is {loss} at step {self.state.global_step + 1}, on the prompts of rows {shown}"
        if usable(self.model):  # type: ignore[arg-type]
            return self._stopped(f"{message}; training cannot go on from it", "look at those rows, ")
        return self._lost(f"{message}; ", "")

    def _lost(self, prefix: str, suffix: str) -> UserError:
        step = self.state.global_step
        message = f"{prefix}the weights are NaN, inf or too large to be squared"
        if step > trainers.first_step(self):
            return self._stopped(f"{message} since the update of step {step}{suffix}")
        return self._stopped(f"{message} as they were loaded{suffix}", "start from other weights, ")

    def _stopped(self, message: str, first_fix: str = "") -> UserError:
        checkpoint = RunFolder(self.args.output_dir or "runs/default").newest_checkpoint()
        next_step = f"--resume, which goes on from {checkpoint}" if checkpoint else "start again"
        return UserError(
            f"{message}. The last complete checkpoint is {checkpoint or 'none: none was saved yet'}. Fix: {first_fix}"
            f"lower {self.rate} or use train.bf16 instead of fp16, then {next_step}."
        )


def usable(model: nn.Module) -> bool:
    """Whether all trained weights are numbers, and their squares too; of a sharded model, those of this process."""
    return all(_usable(parameter) for parameter in model.parameters() if parameter.requires_grad)


def _usable(parameter: Tensor) -> bool:
    values = zero3.local_shard(parameter).detach()  # ZeRO-3's shard, else all of it
    values = values.to_local() if hasattr(values, "to_local") else values  # FSDP2's
    if values.numel() == 0:
        return True
    low, high = torch.aminmax(values)  # NaN, both of them, where there is one
    return bool((low > -LARGEST) & (high < LARGEST))
