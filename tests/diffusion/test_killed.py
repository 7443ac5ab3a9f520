"""A denoiser's run that is killed with SIGKILL and resumed through its front door is the undisturbed one, bit for bit.

In ``stage: opd`` everything has a part in it: the student writes, its states are drawn, a teacher judges them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests import tiny

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


def start(config: Path, output: Path, *flags: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "llmdistill.diffusion", "--config", str(config), "--output_dir", str(output), *flags]
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)


def losses(output: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.slow
def test_killed_and_resumed_equals_undisturbed(tmp_path: Path) -> None:
    config, whole, torn = recipe(tmp_path), tmp_path / "whole", tmp_path / "torn"
    _, errors = (undisturbed := start(config, whole)).communicate(timeout=240)
    assert undisturbed.returncode == 0, errors.decode()[-2000:]
    killed = start(config, torn)
    for _ in range(2400):
        if killed.poll() is not None or (torn / "checkpoint-3" / "trainer_state.json").exists():
            break
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (torn / "report.html").exists(), "it ended before it could be killed"
    _, errors = (resumed := start(config, torn, "--resume")).communicate(timeout=240)
    assert resumed.returncode == 0 and b"resuming from" in errors, errors.decode()[-2000:]
    assert losses(torn) == losses(whole) and set(losses(whole)) == set(range(1, STEPS + 1))
    after = [json.loads((run / "after.json").read_text()) for run in (whole, torn)]
    assert after[0]["bound"] == after[1]["bound"] and after[0]["student_answers"] == after[1]["student_answers"]
