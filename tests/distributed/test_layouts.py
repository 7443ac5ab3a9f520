"""Failing ranks under sharding stop all of them; the whole table of layouts is a proof."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from eval.proof.layouts import CELLS, LAYOUTS, measured
from llmdistill.record.run_folder import RunFolder
from tests.distributed.launching import ROOT, begin, kill, started_by
from tests.distributed.layouts_worker import STEPS, UNEVEN
from tests.distributed.test_methods_distributed import logged, start, write_recipe

WORKER = "tests.distributed.layouts_worker"
TIME_LIMIT = 300  # seconds a launch; 15 on two idle cores
SHARDED = ("zero3", "fsdp2")


@pytest.mark.parametrize("file", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_every_launch_file(file: Path) -> None:
    config: Any = load_config_from_file(str(file))
    entries = yaml.safe_load(file.read_text())
    assert f"recipes/accelerate/{file.name}" in file.read_text().splitlines()[0]
    assert config.num_processes == (1 if file.stem == "one_process" else 2)
    assert str(getattr(config.distributed_type, "value", config.distributed_type)) == entries["distributed_type"]
    if "offload" in file.stem:
        assert {config.deepspeed_config[f"offload_{what}_device"] for what in ("optimizer", "param")} == {"cpu"}
    if file.stem == "fsdp2":
        assert (config.fsdp_config["fsdp_version"], config.fsdp_config["fsdp_reshard_after_forward"]) == (2, True)


def failing(config: str, folder: Path) -> str:
    """What a launch said in which ranks sample at different length, and then one after the other fails."""
    process = begin(config, "-m", WORKER, str(folder), "uneven,no_teacher,few_prompts,nan")
    try:
        said, _ = process.communicate(timeout=TIME_LIMIT)
    finally:
        kill(process)
    assert process.returncode != 0
    return said


def check_failing(config: str, folder: Path) -> None:
    said = failing(config, folder)
    steps = json.loads((folder / "found.json").read_text())["uneven/undisturbed"]["lines"]
    assert [step["rollout/mean_length"] for step in steps] == [sum(UNEVEN.values()) / 2] * STEPS, said[-3000:]
    errors = {file.stem: file.read_text() for file in folder.glob("*.txt")}
    assert errors["no_teacher-0"] == errors["no_teacher-1"], said[-3000:]
    assert "teacher.model" in errors["no_teacher-0"] and "Fix: " in errors["no_teacher-0"]
    assert errors["few_prompts-0"] == errors["few_prompts-1"]
    assert "the loss is nan at step" in errors["nan-1"] and "nan-0" not in errors  # which the launcher has ended


@pytest.mark.slow
def test_no_rank_waits_for_one_that_failed(tmp_path: Path) -> None:
    """Texts of 2 tokens on one rank and of 40 on the other; then one rank's part of the teacher does not load; more
    ranks than prompts; a loss on one rank that is no number."""
    check_failing("fsdp2", tmp_path)


@pytest.mark.proof
@pytest.mark.parametrize("config", ("two_processes", "zero2", "zero3"))
def test_no_rank_waits_for_one_that_failed_in_any_layout(tmp_path: Path, config: str) -> None:
    check_failing(config, tmp_path)


def of_rank(launcher: int, rank: str) -> int:
    """The process of a launch that has a rank."""
    for pid in started_by(launcher):
        with suppress(OSError):  # it has ended
            if f"\0RANK={rank}\0" in f"\0{Path(f'/proc/{pid}/environ').read_text()}":
                return pid
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.proof
@pytest.mark.parametrize("config", ("two_processes", *SHARDED))
def test_a_rank_that_dies_ends_the_launch_and_leaves_its_last_checkpoint(tmp_path: Path, config: str) -> None:
    recipe, run = write_recipe(tmp_path, 200, {"sequences": "dataset"}), tmp_path / "run"
    process = start(config, recipe, run)
    try:
        while process.poll() is None and max(logged(run), default=0) < 3:
            time.sleep(0.05)
        os.kill(of_rank(process.pid, "1"), signal.SIGKILL)
        said, _ = process.communicate(timeout=TIME_LIMIT)
    finally:
        kill(process)
    assert process.returncode != 0, said[-3000:]
    checkpoint = RunFolder(run).newest_checkpoint()
    assert checkpoint is not None and int(checkpoint.name.split("-")[1]) >= 2


@pytest.mark.proof
def test_one_trajectory_in_every_layout(tmp_path: Path) -> None:
    """OPD, TAID, REDI and two terms, with LoRA and without; two of them resumed from each layout in each."""
    seen = measured(tmp_path, LAYOUTS, CELLS)
    assert max(seen.values()) < 1e-5, {key: value for key, value in seen.items() if value >= 1e-5}
