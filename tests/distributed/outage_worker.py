"""One launch of the test of outages: each process has a teacher's service of its own, and one of them goes down.

accelerate launch --config_file recipes/accelerate/two_processes.yaml -m tests.distributed.outage_worker FOLDER URL URL
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmdistill import OPDConfig, OPDTrainer, RolloutConfig
from llmdistill.errors import UserError
from llmdistill.evals.callback import EvalCallback
from llmdistill.ranks import RankFailed
from llmdistill.recipe.launches import leave_group
from llmdistill.teachers.remote import RemoteTeacher
from tests import tiny

GROUP_S = 8  # after which a collective gives up
OUTAGE_S = 10.0  # after which a run gives up a service: later than the ranks would give up each other
QUICK = {"backoff_s": 0.05, "max_backoff_s": 0.5, "cool_down_s": 0.3}


def main(folder: Path, *urls: str) -> None:
    rank = int(os.environ["RANK"])
    args = OPDConfig(
        output_dir=str(folder / "run"),
        max_steps=3,
        per_device_train_batch_size=2,
        save_strategy="no",
        ddp_timeout=GROUP_S,
        estimator="top_k",
        top_k=8,
        heldout_sequences=4,
        rollouts=RolloutConfig(max_new_tokens=4),
    )
    teacher = RemoteTeacher(urls[rank], max_outage_s=OUTAGE_S, **QUICK)
    rows = tiny.rows(16, completion=False)
    trainer = OPDTrainer(
        tiny.llama(1),
        args,
        teacher,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny.tokenizer(),
        preflight=False,
    )
    told = {"train": _end_of(trainer.train), "steps": trainer.state.global_step}
    replicas = teacher.transport._replicas  # one long wait was enough
    replicas.patience = replace(replicas.patience, max_outage_s=0.5)
    told["measure"] = _end_of(trainer.evaluate)
    callback = EvalCallback(trainer, [str(folder / "sums.yaml")], problems=2, samples=1, longest=3)
    if rank == 0:  # what the first rank is to write goes into a file's place
        (folder / "run" / "evals").mkdir(parents=True, exist_ok=True)
        (folder / "run" / "evals" / f"step-{trainer.state.global_step:06d}").write_text("in the way")
    told["callback"] = _end_of(lambda: callback.evaluate(trainer.state))
    (folder / f"rank-{rank}.json").write_text(json.dumps(told))


def _end_of(work: Callable[[], Any]) -> list[str]:
    try:
        work()
        return []
    except (UserError, RankFailed, OSError) as error:
        return [type(error).__name__, str(error)]


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
    leave_group()
