"""One launch of the tests of a teacher with another tokenizer.

    accelerate launch --config_file recipes/accelerate/two_processes.yaml -m tests.distributed.chunks_worker FOLDER

Its methods train some steps, in the same global batches however many processes share them. Then the first process has
texts that align, and the other has none. Every process writes what it saw to ``FOLDER/rank-N.json``, and the first the
trained weights as ``FOLDER/CASE.pt``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmdistill.errors import UserError
from llmdistill.models.weights import named_weights
from llmdistill.recipe.launches import leave_group
from llmdistill.teachers.local import LocalTeacher
from tests import tiny
from tests.distributed.methods_worker import lines
from tests.methods.test_chunks import make
from tests.tokenization import vocabularies

SHARES = {"strict": 0.9, "lenient": 0.1}  # name -> min_aligned
STEPS, GLOBAL_BATCH, ACCUMULATION = 3, 8, 2
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "p_kl": ("p_kl", {"ce_weight": 0.5}),
    "h_kl": ("h_kl", {}),
    "simct": ("simct", {"sequences": "dataset"}),
    "alm with hidden states": ("alm", {"hidden_weight": 0.5, "hidden_layers": [0, -1], "shared_weight": 0.5}),
    "alm in balance": ("alm", {"hidden_weight": 1.0, "ce_weight": 1.0, "balance": "gradients"}),
}


def trained(folder: Path, case: str) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """What every step logged, and the weights in the end."""
    method, settings = CASES[case]
    world = int(os.environ.get("WORLD_SIZE", 1))
    shared = dict(
        rows=tiny.rows(16),
        max_steps=STEPS,
        per_device_train_batch_size=GLOBAL_BATCH // ACCUMULATION // world,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=1e-2,
        adam_epsilon=1e-2,  # see methods_worker.py
        max_grad_norm=0.5,
        preflight=False,
    )
    t = make(folder / case, method, **shared, **settings)
    t.train()
    assert t.accelerator.num_processes == world
    logged = [{k: v for k, v in line.items() if k != "teacher/align_seconds"} for line in lines(t)]
    return logged, {name: w.clone() for name, w in named_weights(t.model)}


def refused(folder: Path, rank: int) -> dict[str, dict[str, str]]:
    """What training and measuring said, where the second process can align nothing."""
    told = dict[str, dict[str, str]]()
    words = vocabularies.wordpiece(["ok", "add"])
    words.pad_token = "[UNK]"
    every = [{"prompt": "ok ", "completion": c} for c in ["ok add"] * 8 + ["ok 猫 add"] * 8]
    own = every[8 * rank :][:8]
    for name, least in SHARES.items():
        told[name] = {}
        for what in ("train", "evaluate"):
            teacher = LocalTeacher(tiny.llama(3, vocab=len(words)), words)
            t = make(folder / name / what, "alm", teacher=teacher, rows=own, debias=False, min_aligned=least)
            t.wants_preflight = False  # it looks at the first rows, which are the same everywhere but here
            try:
                t.train() if what == "train" else t.evaluate(every)  # which gives each process its half of them
                told[name][what] = ""
            except UserError as error:
                told[name][what] = str(error)
    return told


def main(folder: Path) -> None:
    rank, found = int(os.environ.get("RANK", 0)), dict[str, Any]()
    for case in CASES:
        found[case], weights = trained(folder, case)
        if rank == 0:
            torch.save(weights, folder / f"{case}.pt")
    found |= refused(folder, rank)
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_group()
