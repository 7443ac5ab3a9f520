"""One launch of the test of rounds made ahead: two processes with one service for the student and one teacher each.

accelerate launch --config_file recipes/accelerate/two_processes.yaml -m tests.distributed.ahead_worker FOLDER URL...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from llmdistill import DataConfig, OPDConfig, OPDTrainer, RolloutConfig
from llmdistill.errors import UserError
from llmdistill.models.weights import named_weights
from llmdistill.recipe.launches import leave_group
from llmdistill.teachers.remote import RemoteTeacher
from tests import tiny
from tests.rollouts.test_remote import QUICK

STEPS = 4


class StopsTeacher(TrainerCallback):
    """After the second step, on one rank: the next question goes where nobody is."""

    def __init__(self, teacher: RemoteTeacher) -> None:
        self.teacher = teacher

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.teacher.close()


def trainer(folder: Path, urls: tuple[str, ...], rank: int, fails: bool = False, **settings: Any) -> OPDTrainer:
    teacher = RemoteTeacher(urls[1 + rank], lossless=True, **QUICK)
    args = OPDConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        rollouts=RolloutConfig(engine="remote", url=urls[0], staleness=1, max_new_tokens=6, samples_per_prompt=2),
        **settings,
    )
    return OPDTrainer(
        tiny.llama(1),
        args,
        teacher,
        train_dataset=tiny.rows(12, completion=False),
        processing_class=tiny.tokenizer(),
        data=DataConfig(max_prompt_tokens=60),
        preflight=False,
        callbacks=[StopsTeacher(teacher)] if fails and rank else None,
    )


def main(folder: Path, *urls: str) -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first, for a minute
    rank = int(os.environ["RANK"])
    whole = trainer(folder / "whole", urls, rank, save_strategy="steps", save_steps=1, save_total_limit=None)
    whole.train()
    assert whole.accelerator.num_processes == 2
    resumed = trainer(folder / "resumed", urls, rank, save_strategy="no")
    resumed.train(str(folder / "whole" / "checkpoint-2"))
    weights = [{n: t.clone() for n, t in named_weights(t.model)} for t in (whole, resumed)]
    told: dict[str, Any] = {
        "staleness": [line["rollout/staleness"] for line in whole.state.log_history if "rollout/staleness" in line],
        "weights": sum(float(tensor.double().abs().sum()) for tensor in weights[0].values()),
        "difference": max(float((tensor - weights[1][n]).abs().max()) for n, tensor in weights[0].items()),
        "pushed": whole.rollout_engine.transport.counters.bytes_sent,  # type: ignore[attr-defined]
    }
    torch.distributed.barrier()
    for ended in (whole, resumed):
        ended.close()
    try:
        trainer(folder / "failed", urls, rank, fails=True, save_strategy="no").train()
    except (UserError, RuntimeError) as error:  # what its transport says is no user's mistake
        told["failed"] = str(error)
    (folder / f"rank-{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
    leave_group()
