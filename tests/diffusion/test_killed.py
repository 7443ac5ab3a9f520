"""A denoiser's run that is killed with SIGKILL and resumed through its front door is the undisturbed one, bit for bit.

In ``stage: opd`` everything has a part in it: the student writes, its states are drawn, a teacher judges them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests import tiny
from tests.killed import losses, whole_and_torn

STEPS = 8


def recipe(folder: Path) -> Path:
    """Tiny models and prompts on disk and a recipe over them."""
    for name, seed in (("student", 1), ("teacher", 2)):
        tiny.llama(seed).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    rows = tiny.rows(20)
    for name, part in (("train", rows[:16]), ("heldout", rows[16:])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in part))
    train = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}
    config = {
        "student": {"model": str(folder / "student")},
        "teacher": {"model": str(folder / "teacher"), "dtype": "float32"},
        "data": {name: str(folder / f"{name}.jsonl") for name in ("train", "heldout")},
        "rollouts": {"max_new_tokens": 8},
        "objective": {"stage": "opd", "block_size": 4},
        "train": {**train, "save_steps": 3, "save_total_limit": 2},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config))
    return folder / "recipe.yaml"


@pytest.mark.slow
def test_killed_and_resumed_equals_undisturbed(tmp_path: Path) -> None:
    whole, torn = whole_and_torn("llmdistill.diffusion", recipe(tmp_path), tmp_path)
    assert losses(torn) == losses(whole) and set(losses(whole)) == set(range(1, STEPS + 1))
    after = [json.loads((run / "after.json").read_text()) for run in (whole, torn)]
    assert after[0]["bound"] == after[1]["bound"] and after[0]["student_answers"] == after[1]["student_answers"]
