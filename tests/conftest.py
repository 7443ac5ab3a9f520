"""Fixtures that several test files share. Nothing here needs a network."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import pytest
import torch

from llmdistill import OPDConfig, OPDTrainer, RolloutConfig
from tests import tiny


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--students-table", metavar="FILE", help="tests/students/test_sweep.py: page whose table is written"
    )


@pytest.fixture(autouse=True)
def without_preflight(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Trainers of tests train at once; the preflight has its own tests, and runs where ``preflight=True`` is said."""
    from llmdistill.training.trainer import DistillationTrainer

    asked = DistillationTrainer._preflight

    def only_where_asked(trainer: DistillationTrainer) -> None:
        if trainer.wants_preflight:
            asked(trainer)

    monkeypatch.setattr(DistillationTrainer, "_preflight", only_where_asked)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``student``, ``teacher`` (different weights, one tokenizer), train.jsonl and heldout.jsonl."""
    folder = tmp_path_factory.mktemp("tiny")
    for name, seed in (("student", 1), ("teacher", 2)):
        tiny.llama(seed).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    rows = tiny.rows(24, completion=False)
    for name, part in (("train", rows[:20]), ("heldout", rows[20:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    return folder


@pytest.fixture
def command(tiny_run: Path, tmp_path: Path) -> list[str]:
    """Arguments of a small run that works: two steps, a few seconds. Later words override earlier ones."""
    words = {
        "student.model": tiny_run / "student",
        "teacher.model": tiny_run / "teacher",
        "teacher.dtype": "float32",
        "data.train": tiny_run / "train.jsonl",
        "max_new_tokens": 6,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "output_dir": tmp_path / "run",
    }
    return [text for key, value in words.items() for text in (f"--{key}", str(value))]


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., OPDTrainer]:
    """``make_trainer(student=, teacher=, tokenizer=, train=, heldout=, **settings)`` over tiny models."""

    def make(
        student: Any = None,
        teacher: Any = None,
        tokenizer: Any = None,
        train: Any = None,
        heldout: Any = None,
        rollouts: dict[str, Any] | None = None,
        **settings: Any,
    ) -> OPDTrainer:
        args = OPDConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=2,
            rollouts=RolloutConfig(**{"max_new_tokens": 6, **(rollouts or {})}),
            **settings,
        )
        return OPDTrainer(
            student or tiny.llama(1),
            args,
            teacher or tiny.llama(2),
            train_dataset=tiny.rows(8, completion=False) if train is None else train,
            eval_dataset=heldout,
            processing_class=tokenizer or tiny.tokenizer(),
        )

    torch.manual_seed(0)
    return make
