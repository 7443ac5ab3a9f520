"""What every rank sees of a schedule and of a data policy, as JSON files: for tests/trainer/test_taid_trainer."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmdistill import RolloutConfig, TAIDConfig, TAIDTrainer
from llmdistill.recipe.launches import leave_group
from llmdistill.teachers.local import LocalTeacher
from llmdistill.texts.sources import Adaptive, Mixed, Round
from tests.distributed.worker import make_model, make_rows, make_tokenizer


def make(folder: Path, **settings: Any) -> TAIDTrainer:
    world = int(os.environ.get("WORLD_SIZE", 1))
    sequences = settings.pop("policy", None)
    args = TAIDConfig(
        output_dir=str(folder),
        save_strategy="no",
        per_device_train_batch_size=4 // world,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        t_start=0.2,
        t_rate=0.3,
        t_momentum=0.5,
        rollouts=RolloutConfig(max_new_tokens=4),
        seed=3,
        **{"max_steps": 4, **settings},
    )
    return TAIDTrainer(
        make_model(0, hidden=32, tied=True),
        args,
        LocalTeacher(make_model(1, hidden=32, tied=True), make_tokenizer()),
        train_dataset=make_rows(16, 5),
        eval_dataset=make_rows(3, 6),
        processing_class=make_tokenizer(),
        **({} if sequences is None else {"sequences": sequences}),
    )


def schedule(folder: Path, driver: Any) -> list[tuple[float, float]]:
    """(loss fed, t) of every step."""
    trainer, calls = make(folder, t_driver=driver), []
    target: Any = trainer.method.schedules["t"].schedule
    update = target.update

    def watched(loss: float, step: int) -> float:
        calls.append((loss, update(loss, step)))
        return float(calls[-1][1])

    target.update = watched
    trainer.train()
    return calls


def sources(folder: Path, policy: Any, **settings: Any) -> list[str]:
    """Where this rank's rounds came from."""
    trainer, taken = make(folder, policy=policy, **settings), []
    draw = policy.draw

    def watched(round_: Round) -> Any:
        names: list[str] = []
        named = {
            name: lambda of, name=name, source=source: names.append(name) or source(of)
            for name, source in round_.authors.items()
        }
        drawn = draw(replace(round_, authors=named))
        taken.append(*(names or ["replay"]))
        return drawn

    policy.draw = watched
    trainer.train()
    return taken


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    eager = Adaptive(capacity=8, eps=-100.0, growth=0.5)  # grows at every validation
    found = {
        "kl": schedule(folder / "kl", "kl"),
        "cross_entropy": schedule(folder / "ce", "cross_entropy"),
        "mixed": sources(folder / "mixed", Mixed(0.5), max_steps=8),
        "adaptive": sources(folder / "adaptive", eager, max_steps=14, eval_strategy="steps", eval_steps=2),
    }
    rank = os.environ.get("RANK", "0")
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    leave_group()
