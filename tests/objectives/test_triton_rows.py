"""The fused kernels: the same numbers as PyTorch's version, and PyTorch's version wherever they cannot be had."""

import importlib.util
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from objective_cases import logits, value_and_grad

from llmdistill.objectives import accelerated, cores, divergences
from llmdistill.objectives.streaming import rows_at_once
from llmdistill.objectives.taid import taid

HERE = Path(__file__).parent
KERNELS = Path(sys.prefix) / "kernels"  # where `make test` puts Triton, apart from torch's CPU build and vLLM's


def run_with_triton(what: str, tmp_path: Path, **variables: str) -> None:
    if importlib.util.find_spec("triton") is None and not (KERNELS / "triton").is_dir():
        pytest.skip(f"no triton here: uv pip install --target {KERNELS} --no-deps triton")
    paths = [str(HERE.parents[1]), str(KERNELS)]
    env = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore::RuntimeWarning", str(HERE / "triton_checks.py"), what]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_kernels_equal_pytorch_in_value_and_gradient(tmp_path: Path) -> None:
    """By Triton's interpreter, on CPU tensors."""
    run_with_triton("interpret", tmp_path, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_kernels_become_code_for_gpus(tmp_path: Path) -> None:
    run_with_triton("lower", tmp_path, TRITON_DEFAULT_FP_FUSION="1")


def test_a_kernel_that_does_not_compile_is_said_once_and_pytorch_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here Triton is not installed, or knows no driver for a CPU: the same road as a kernel that fails on a GPU."""
    monkeypatch.setattr(accelerated, "_given_up", set())
    teacher, loss = logits(2, 3, 11), partial(divergences.reverse_kl, teacher_logits=logits(2, 3, 11))
    expected = value_and_grad(loss, logits(1, 3, 11))
    monkeypatch.setenv(accelerated.KERNELS, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.warns(UserWarning, match="reverse_kl does not work for 3x11 logits in float32 on cpu"):
        found = value_and_grad(loss, logits(1, 3, 11))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        divergences.reverse_kl(logits(1, 3, 11), teacher)


def test_an_unknown_road_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(accelerated.KERNELS, "cuda")
    with pytest.raises(ValueError, match="LLMDISTILL_KERNELS is 'cuda'; it must be one of auto, triton"):
        divergences.reverse_kl(logits(1, 1, 5), logits(2, 1, 5))


def test_what_has_no_kernel_compiles_as_one_graph() -> None:
    """A break in the graph would be an error; the code that inductor makes of the graph is its own affair."""
    compiled = torch.compile(divergences.formula, backend="aot_eager", fullgraph=True)
    inputs = partial(cores.adaptive_kl, head_mass=0.5), logits(1, 3, 17), logits(2, 3, 17), 0.7
    for found, expected in zip(compiled(*inputs), divergences.formula(*inputs), strict=True):
        torch.testing.assert_close(found, expected)


def test_what_a_schedule_moves_is_not_compiled_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(accelerated, "_parameters", {})
    monkeypatch.setattr(
        accelerated, "_compiled", lambda formula: lambda core, *rest: (compiled.append(core), formula(core, *rest))[1]
    )
    monkeypatch.setenv(accelerated.KERNELS, "compile")
    teacher = logits(2, 3, 11)
    for t in (0.3, 0.3, 0.4, 0.5, 0.6):
        assert torch.isfinite(taid(logits(1, 3, 11), teacher, t)).all()
    assert [core.keywords["t"] for core in compiled] == [0.3, 0.3, 0.4]


def test_a_chunk_by_itself_is_128_rows_on_a_cpu() -> None:
    assert rows_at_once(151_936, torch.device("cpu")) == rows_at_once(260, torch.device("cpu")) == 128


@pytest.mark.parametrize(("columns", "gib", "rows"), [(151_936, 80, 1664), (128_256, 24, 768), (260, 80, 8192)])
def test_a_chunk_by_itself_is_as_many_rows_as_its_bytes_allow_on_a_gpu(
    columns: int, gib: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float32 copy of its logits takes a sixty-fourth of the memory and no more than 1 GiB."""
    properties = type("Properties", (), {"total_memory": gib * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert rows_at_once(columns, torch.device("cuda")) == rows
