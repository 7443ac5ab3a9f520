"""A checkpoint of transformers' trainer is whole or not there: written aside, renamed, and only then are old ones gone.

transformers writes into ``checkpoint-N`` itself, one file after the other and every rank its own, and removes old ones
as soon as the first rank is done. A process that dies in between leaves a folder that looks like the newest checkpoint,
and with ``save_total_limit`` 1 no other beside it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from llmdistill.files import sync

ASIDE = ".unfinished"  # in the run folder, so that the rename stays on one file system


def saved_aside(trainer: Any, check: Callable[[], None]) -> None:
    """Has ``trainer`` write its checkpoints aside; ``check()`` runs in every rank before, and may raise."""
    save, own_place = trainer._save_checkpoint, trainer._get_output_dir

    def saved(model: nn.Module, trial: Any) -> None:
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
            _put_in_place(aside / name, run / name)
            from transformers.trainer_utils import rotate_checkpoints  # not before: this package imports nothing heavy

            rotate_checkpoints(
                str(run), trainer.args.save_total_limit, trainer.state.best_model_checkpoint, use_mtime=True
            )
        trainer.accelerator.wait_for_everyone()

    trainer._save_checkpoint = saved


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
