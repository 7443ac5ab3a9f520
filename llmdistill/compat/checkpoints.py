"""A checkpoint of transformers' trainer is whole or not there: written aside, renamed, and only then are old ones gone.

transformers writes into ``checkpoint-N`` itself, one file after the other and every rank its own, and removes old ones
as soon as the first rank is done. A process that dies in between leaves a folder that looks like the newest checkpoint,
and with ``save_total_limit`` 1 no other beside it.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from llmdistill.files import sync

ASIDE = ".unfinished"  # in the run folder, so that the rename stays on one file system


class _Behind:
    """Work that goes on behind training, one piece at a time."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def begin(self, work: Callable[[], None]) -> None:
        self.thread = threading.Thread(target=self._run, args=(work,), name="checkpoint")
        self.thread.start()

    def finish(self) -> None:
        """Waits for it, and raises what it raised."""
        if self.thread is not None:
            self.thread.join()
        error, self.thread, self.error = self.error, None, None
        if error is not None:
            raise error

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.error = error


def saved_aside(trainer: Any, check: Callable[[], None], *, in_background: bool = False) -> Callable[[], None]:
    """Has ``trainer`` write its checkpoints aside; ``check()`` runs in every rank before, and may raise.

    Args:
        in_background: training goes on while what was written reaches the disk; only then is it a checkpoint.

    Returns:
        What waits, in every rank, for the checkpoint that is on its way, and raises where it could not be written.
    """
    save, own_place, load_best = trainer._save_checkpoint, trainer._get_output_dir, trainer._load_best_model
    behind = _Behind()

    def finished() -> None:
        behind.finish()
        trainer.accelerator.wait_for_everyone()

    def saved(model: nn.Module, trial: Any) -> None:
        behind.finish()  # there is one folder aside
        check()
        run, writes = Path(own_place(trial)), trainer.args.should_save
        aside, name = run / ASIDE, f"checkpoint-{trainer.state.global_step}"
        if writes:
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
        trainer.accelerator.wait_for_everyone()
        trainer._get_output_dir = lambda trial=None: str(aside)
        try:
            save(model, trial)
        except BaseException:
            if writes:
                shutil.rmtree(aside, ignore_errors=True)  # a full disk has room again for what is said of it
            raise
        finally:
            trainer._get_output_dir = own_place
        is_best = trainer.state.best_model_checkpoint == str(aside / name)
        if is_best:
            trainer.state.best_model_checkpoint = str(run / name)
        trainer.accelerator.wait_for_everyone()  # the parts of all ranks are there
        if writes:
            if is_best:  # which that file names
                trainer.state.save_to_json(str(aside / name / "trainer_state.json"))
            best, limit = trainer.state.best_model_checkpoint, trainer.args.save_total_limit

            def complete() -> None:
                _put_in_place(aside / name, run / name)
                from transformers.trainer_utils import rotate_checkpoints  # not before: this imports nothing heavy

                rotate_checkpoints(str(run), limit, best, use_mtime=True)

            if in_background:
                behind.begin(complete)
            else:
                complete()
        trainer.accelerator.wait_for_everyone()

    def best_loaded(*args: Any, **kwargs: Any) -> Any:
        finished()
        return load_best(*args, **kwargs)

    trainer._save_checkpoint, trainer._load_best_model = saved, best_loaded
    return finished


def _put_in_place(written: Path, target: Path) -> None:
    """Renames a checkpoint once the disk has all of it; an earlier one of the same step goes after it is there."""
    for file in written.rglob("*"):
        sync(file)
    sync(written)
    if target.exists():
        target.rename(written.parent / "earlier")
    written.rename(target)
    sync(target.parent)
    shutil.rmtree(written.parent, ignore_errors=True)
