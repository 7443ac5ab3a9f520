"""What a run on rows without a length needs, said before it starts."""

from __future__ import annotations

from typing import Any

from llmdistill.errors import UserError
from llmdistill.texts.streams import has_length, rows_of


def checked_rows(dataset: Any, args: Any, split: str) -> Any:
    """The training rows that a caller gave, as something to iterate; of a ``DatasetDict`` those of a split.

    Every process reads the whole stream and takes its share of each batch, so batches are what one process would see.

    Raises:
        UserError: rows without a length, and no ``max_steps``, or settings that do not go with them.
    """
    if dataset is None or isinstance(dataset, list):
        return dataset
    rows = rows_of(dataset, split)
    if not has_length(rows):
        check_streaming(args)
        args.accelerator_config.dispatch_batches = False  # its other way sends tensors around, and rows are none yet
    return rows


def check_streaming(args: Any) -> None:
    """Raises:
    UserError: see :func:`checked_rows`.
    """
    if args.max_steps <= 0:
        raise UserError(
            f"the training rows have no length, and train.max_steps is {args.max_steps}: nothing says when the run "
            "ends, nor how its schedule goes. Fix: --max_steps N."
        )
    if args.train_sampling_strategy != "random":
        raise UserError(
            f"train.train_sampling_strategy is {args.train_sampling_strategy}, and the training rows are a stream, "
            "which nobody samples from. Fix: leave it out; --data.shuffle_buffer 0 reads them as they stand."
        )
    if args.dataloader_num_workers > 0:
        raise UserError(
            f"train.dataloader_num_workers is {args.dataloader_num_workers}, and the training rows are a stream, which "
            "each worker would read whole. Fix: 0."
        )
