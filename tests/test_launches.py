"""Launches that do not fit the GPUs of a machine, and the precision that a GPU gets; the GPUs are simulated."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmdistill import OPDConfig
from llmdistill.errors import UserError
from llmdistill.preflight import machine
from llmdistill.recipe.launches import bf16_here, check_gpu_launch
from tests import tiny


def test_one_process_that_sees_several_gpus_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would wrap the student in nn.DataParallel."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match="one process sees 4 GPUs.*accelerate launch --num_processes 4"):
        OPDConfig(output_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("gpus", "env"),
    [
        (1, {}),
        (4, {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}),
        (4, {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}),
        (4, {"ACCELERATE_USE_DEEPSPEED": "true"}),  # one engine on one GPU
    ],
)
def test_launches_that_fit_are_taken(gpus: int, env: dict[str, str]) -> None:
    check_gpu_launch(gpus, env)


def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match="8 processes .* 4 GPUs, .*--num_processes 4, and .*_steps 2 times as large"):
        check_gpu_launch(4, {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"})
    with pytest.raises(UserError, match=r"with 1 GPU, .*--num_processes 1, and"):
        check_gpu_launch(1, {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})


def test_bfloat16_is_a_gpus_default_and_not_a_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    asked = {(None, False): True, (None, True): False, (False, False): False, (True, False): True}
    assert {key: bf16_here(*key, on_gpu=True) for key in asked} == asked
    assert not bf16_here(None, False, on_gpu=False) and bf16_here(True, False, on_gpu=False)


def test_bfloat16_on_a_gpu_without_it_is_refused_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert not bf16_here(None, False, on_gpu=True)
    with pytest.raises(UserError, match=r"train.bf16 is True, and Tesla T4 \(compute capability 7.5\) has no bfloat16"):
        bf16_here(True, False, on_gpu=True)


def test_python_runs_on_a_cpu_are_float32_by_default(tmp_path: Path) -> None:
    args = OPDConfig(output_dir=str(tmp_path))
    assert args.bf16 is False and args.chunk_tokens == 0


def found_on_a_gpu(student: Any, **settings: Any) -> str:
    args = SimpleNamespace(**{"device": torch.device("cuda"), "bf16": False, "fp16": False, **settings})
    found = machine.device(SimpleNamespace(args=args, student=student, sides=[]))  # type: ignore[arg-type]
    return " ".join(str(f) for f in found if f.level == "notice")


def test_float32_on_a_gpu_is_warned_of() -> None:
    assert "computes in float32 here" in found_on_a_gpu(tiny.llama(1))
    assert "float32 here" not in found_on_a_gpu(tiny.llama(1), bf16=True)
    assert "float32 here" not in found_on_a_gpu(tiny.llama(1).bfloat16())


def test_frozen_float32_weights_on_a_gpu_are_warned_of() -> None:
    student = tiny.llama(1)
    student.requires_grad_(False)
    student.peft_config = {}
    assert "twice the memory" in found_on_a_gpu(student, bf16=True)
    assert "twice the memory" not in found_on_a_gpu(student.bfloat16(), bf16=True)
