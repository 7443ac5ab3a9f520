"""A run of a front door that is killed behind its first checkpoint and resumed, beside one that nobody disturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def start(module: str, config: Path, output: Path, *flags: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", module, "--config", str(config), "--output_dir", str(output), *flags]
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)


def losses(output: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == sorted(set(steps)), "a step was logged twice"
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def whole_and_torn(module: str, config: Path, folder: Path) -> tuple[Path, Path]:
    """The folders of the undisturbed run and of the one that was killed once checkpoint-3 was there, and resumed."""
    whole, torn = folder / "whole", folder / "torn"
    _, errors = (undisturbed := start(module, config, whole)).communicate(timeout=240)
    assert undisturbed.returncode == 0, errors.decode()[-2000:]

    killed = start(module, config, torn)
    for _ in range(2400):
        if killed.poll() is not None or (torn / "checkpoint-3" / "trainer_state.json").exists():
            break
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (torn / "report.html").exists(), "it ended before it could be killed"

    _, errors = (resumed := start(module, config, torn, "--resume")).communicate(timeout=240)
    assert resumed.returncode == 0, errors.decode()[-2000:]
    assert b"resuming from" in errors
    return whole, torn
