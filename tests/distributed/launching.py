"""Launches of ``accelerate launch`` on the CPU, with the launch files that the recipes come with."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TIME_LIMIT = 300  # seconds a launch; 15 to 30 on two idle cores


def begin(config: str, *command: str) -> subprocess.Popen[str]:
    """Starts ``accelerate launch``, as the leader of a process group."""
    launcher = ("WORLD_SIZE", "RANK", "LOCAL_", "MASTER_", "ACCELERATE_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(launcher)}
    env |= dict(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    file = ROOT / "recipes" / "accelerate" / f"{config}.yaml"
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), *command]
    pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(words, cwd=ROOT, env=env, start_new_session=True, **pipes)


def end(process: subprocess.Popen[str], time_limit: float = TIME_LIMIT) -> str:
    """Waits for a launch and leaves no process behind. What it said, where it went well."""
    try:
        output, _ = process.communicate(timeout=time_limit)
    finally:
        kill(process)
    assert process.returncode == 0, output[-6000:]
    return output


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the launcher and to all that it started, each of which leads a session of its own."""
    if process.poll() is None:
        for pid in (process.pid, *started_by(process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def started_by(pid: int) -> list[int]:
    """The processes that descend from one."""
    children = defaultdict[int, list[int]](list)
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):  # it has ended; it is none
            children[int((entry / "stat").read_text().rpartition(")")[2].split()[1])].append(int(entry.name))
    found, at = list[int](), [pid]
    while at:
        below = children[at.pop()]
        found += below
        at += below
    return found


def launch(config: str, *command: str) -> None:
    end(begin(config, *command))


def launched_once(
    folders: pytest.TempPathFactory, config: str, worker: str, *words: str, time_limit: float = TIME_LIMIT
) -> Path:
    """The folder that a worker, a module, wrote into; launched once, whatever the number of pytest's own processes.

    Args:
        words: the worker's arguments, in which "{folder}" stands for that folder.
    """
    base = folders.getbasetemp()
    above = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / worker
    folder = above / config
    folder.mkdir(parents=True, exist_ok=True)
    with (above / f"{config}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            end(begin(config, "-m", worker, *(word.format(folder=folder) for word in words)), time_limit)
            (folder / "done").touch()
    return folder
