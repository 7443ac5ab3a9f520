"""What is installed: untested versions are warned of, GPUs that torch cannot use are said, extras are named."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

import pytest

from llmdistill import extras
from llmdistill.failures import to_mend
from llmdistill.preflight.installed import TESTED, GPUs, of_gpus, untested

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
SMI = ("NVIDIA H100 80GB HBM3, 570.86",)


def test_versions_that_were_not_run_are_named_with_those_that_were() -> None:
    found = list(untested({"torch": "2.13.0+cpu", "transformers": "5.21.1", "accelerate": "1.14.0"}))
    assert [(f.level, f.message) for f in found] == [
        ("notice", "transformers is 5.21.1; tested were 5.17 to 5.19"),
        ("notice", "accelerate is 1.14.0; tested were 1.15"),
        ("ok", "torch 2.13.0+cpu, transformers 5.21.1, accelerate 1.14.0"),
    ]


def test_the_oldest_that_was_tested_is_the_lower_bound() -> None:
    """Of what pyproject.toml asks for; it bounds from above only what reads vLLM's internals."""
    named = [*PROJECT["dependencies"], *(x for extra in PROJECT["optional-dependencies"].values() for x in extra)]
    lower = {entry.partition(">=")[0]: entry.partition(">=")[2].partition(",")[0] for entry in named}
    for name, (oldest, _) in TESTED.items():
        assert lower[name].startswith(oldest), name


def test_what_make_installs_is_what_was_tested() -> None:
    """No first run begins with a notice about its own environment."""
    pins = [line.split("==") for line in (Path(__file__).parents[1] / "constraints-cpu.txt").read_text().splitlines()]
    there = {pin[0]: pin[1] for pin in pins if pin[0] in TESTED}
    assert len(there) > 4 and [f.message for f in untested(there) if f.level != "ok"] == []


@pytest.mark.parametrize(
    ("gpus", "level", "said"),
    [
        (GPUs((), 0, None, None), "ok", "no GPU"),
        (GPUs(SMI, 0, None, None, hidden=True), "ok", "no GPU"),
        (GPUs(SMI, 0, None, None), "fail", "a build without CUDA"),
        (GPUs(SMI, 0, "13.0", None), "fail", "H100 80GB HBM3, 570.86), and torch for CUDA 13.0 sees none"),
        (GPUs(SMI * 2, 2, "12.8", None, processes=2), "fail", "no NCCL"),
        (
            GPUs(SMI * 2, 2, "12.8", "2.27.3", processes=2),
            "ok",
            "2 x NVIDIA H100 80GB HBM3, 570.86, torch for CUDA 12.8",
        ),
    ],
)
def test_gpus_that_torch_cannot_use_are_said(gpus: GPUs, level: str, said: str) -> None:
    (found,) = of_gpus(gpus)
    assert found.level == level and said in found.message


def test_a_missing_package_is_said_with_the_extra_that_brings_it() -> None:
    for package, extra in extras.BROUGHT_BY.items():
        assert any(entry.lower().startswith(package.replace("_", "-")) for entry in _all_of(extra)), (package, extra)
    with pytest.raises(ModuleNotFoundError) as caught:
        importlib.import_module("no_such_package_at_all")
    assert to_mend(caught.value) is None
    missing = ModuleNotFoundError("No module named 'fastapi.responses'", name="fastapi.responses")
    assert "pip install 'llmdistill[server]'" in str(to_mend(missing))
    assert "pip install trl" in str(to_mend(ModuleNotFoundError("No module named 'trl'", name="trl")))


def _all_of(extra: str) -> list[str]:
    return list(PROJECT["optional-dependencies"][extra])
