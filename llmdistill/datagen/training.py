"""``train``: a run of a front door on the rows of a chain, so that what follows is written by the student it made.

    - train: {door: redi, config: recipes/redi.yaml, settings: {student.model: $student, objective.method: sft}}

``OUT`` is a .json file; the run's folder stands beside it under the same name, the student in it in ``student/``. The
run is a process of its own, as a user would start it, and goes on from its last checkpoint if it was killed.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmdistill.datagen.steps import Paths, Step, paths, plain, run_step
from llmdistill.errors import UserError
from llmdistill.files import atomic_write
from llmdistill.record.manifest import Manifest

SUFFIX = ".json"
DOORS = ("opd", "taid", "redi", "cross_tokenizer", "diffusion")


def run_folder(out: str | Path) -> Path:
    """The folder of the run behind an output."""
    return Path(str(out).removesuffix(SUFFIX))


def student_of(out: str | Path) -> Path:
    """The student that the run behind an output leaves."""
    return run_folder(out) / "student"


def train(
    src: Paths,
    out: str | Path,
    *,
    door: str = "redi",
    config: str = "",
    settings: Mapping[str, Any] | None = None,
    launch: str = "",
) -> Manifest:
    """Trains on the rows of ``src`` and writes what came out.

    Args:
        src: the training rows, as the door reads them (``data.train``).
        out: .json: {"student": folder, "run": folder}.
        door: opd, taid, redi, cross_tokenizer or diffusion.
        config: a recipe of that door; empty: its defaults.
        settings: of the recipe, over its own: {"train.max_steps": 40}.
        launch: what stands before ``-m llmdistill.DOOR``, such as "accelerate launch --config_file X"; empty: this
            Python, one process.

    Raises:
        UserError: an unknown door, a setting the chain makes itself, or a run that failed: its last line, and where
            all of its output is.
    """
    if door not in DOORS:
        raise UserError(f"train: there is no door {door!r}. Fix: one of {', '.join(DOORS)}.")
    given, own = dict(settings or {}), ("data.train", "train.output_dir", "output_dir")
    if taken := [key for key in given if key in own]:
        raise UserError(f"train: {taken[0]} is the chain's to say. Fix: leave it out of settings.")
    if len(paths(src)) != 1:
        raise UserError("train: it reads one file. Fix: a step before it that writes one.")
    if config and not Path(config).is_file():
        raise UserError(f"train: config {config} is not there. Fix: the path of a recipe.")

    def work(step: Step) -> None:
        folder = run_folder(step.out)
        words = [*(shlex.split(launch) if launch else [sys.executable]), "-m", f"llmdistill.{door}"]
        words += ["--config", config] if config else []
        words += [part for key, value in given.items() for part in (f"--{key}", _word(value))]
        words += ["--data.train", str(step.inputs[0]), "--train.output_dir", str(folder)]
        words += ["--resume"] if any(folder.glob("**/checkpoint-*")) else []
        step.counts["read"] = sum(1 for _ in step.rows())
        _run(words, folder.with_suffix(".log"))
        student = student_of(step.out)
        if not any(student.glob("*.safetensors")):
            raise UserError(f"train: the run ended without weights in {student}; see {folder.with_suffix('.log')}.")
        atomic_write(step.out, json.dumps({"student": str(student), "run": str(folder)}, indent=1) + "\n")
        step.wrote(step.out)

    said = {"door": door, "config": Path(config).read_text(encoding="utf-8") if config else "", "settings": given}
    return run_step("train", work, src=src, out=out, settings=plain({**said, "launch": launch}), suffixes=(SUFFIX,))


def _run(words: list[str], log: Path) -> None:
    """The run, its output on the terminal and in ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    last = ""
    with log.open("ab") as kept:
        kept.write(f"$ {shlex.join(words)}\n".encode())
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            assert process.stdout is not None
            for line in process.stdout:
                kept.write(line)
                kept.flush()
                sys.stdout.write(line.decode("utf-8", "replace"))
                last = line.decode("utf-8", "replace").strip() or last
    if process.returncode:
        raise UserError(f"train: the run ended with status {process.returncode}: {last} (all of it in {log})")


def _word(value: Any) -> str:
    """A setting as the command line takes it."""
    if isinstance(value, str):
        return value
    return json.dumps(value)
