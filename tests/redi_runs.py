"""Runs of the REDI front door over a tiny student, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from llmdistill.methods.redi_config import OF_STAGE_1
from tests import tiny
from tests.trainer.pair_cases import by_hand, pair_rows


def make_place(folder: Path) -> Path:
    """A folder with ``student``, pairs.jsonl and heldout.jsonl."""
    tiny.llama(1).save_pretrained(folder / "student")
    tiny.tokenizer().save_pretrained(folder / "student")
    rows = pair_rows(22)
    for name, part in (("pairs", rows[:16]), ("heldout", rows[16:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    return folder


def words(place: Path, output: Path, **changed: Any) -> list[str]:
    settings = {
        **{"student.model": place / "student", "data.train": place / "pairs.jsonl"},
        **{"data.heldout": place / "heldout.jsonl", "output_dir": output, "logging_steps": 1, "save_steps": 2},
        **{"stage1_steps": 4, "stage1_batch_size": 4, "stage1_learning_rate": 1e-3},
        **{"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
        **changed,
    }
    if settings.get("method") == "sft":  # which is stage 1 alone
        settings = {k: v for k, v in settings.items() if k not in OF_STAGE_1 or k in changed}
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in logged(run) if "loss" in line]


def read(run: Path, name: str) -> Any:
    return json.loads((run / name).read_text())


def student(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def student_logps(folder: Path, pairs: list[Any]) -> list[float]:
    """Mean chosen and rejected log-prob of the student in a folder."""
    with torch.no_grad():
        return [side.mean().item() for side in by_hand(student(folder), pairs)]
