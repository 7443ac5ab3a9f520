"""What a check looks at and what it says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from rich.console import Console
from rich.text import Text
from torch import nn
from transformers import PreTrainedTokenizerBase

from llmdistill.command_line import Recipe
from llmdistill.config import DistillationConfig
from llmdistill.heads import head_of
from llmdistill.rollouts import Prompt
from llmdistill.teachers.base import TeacherInfo
from llmdistill.tokenization.compare import tokens_by_id
from llmdistill.trainer import DistillationTrainer, Objective

Level = Literal["ok", "notice", "fail"]
STYLE = {"ok": "green", "notice": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    level: Level
    check: str
    message: str
    fix: str | None = None

    def __str__(self) -> str:
        return f"{self.check}: {self.message}" + (f". Fix: {self.fix}." if self.fix else "")

    def show(self, console: Console) -> None:
        """One line, however long."""
        console.print(Text(f"{self.level:<7}", STYLE[self.level]) + Text(str(self)), soft_wrap=True)


def ok(message: str) -> Finding:
    return Finding("ok", "", message)


def notice(message: str, fix: str | None = None) -> Finding:
    return Finding("notice", "", message, fix)


def fail(message: str, fix: str) -> Finding:
    return Finding("fail", "", message, fix)


class Subject:
    """The run that is looked at, in the terms of the checks."""

    def __init__(self, trainer: DistillationTrainer, recipe: Recipe | None) -> None:
        self.trainer, self.recipe = trainer, recipe
        self.args: DistillationConfig = trainer.args  # type: ignore[assignment]
        self.objective: Objective = trainer.objective  # type: ignore[has-type,unused-ignore]
        self.student: nn.Module = trainer.model  # type: ignore[assignment]
        self.tokenizer: PreTrainedTokenizerBase = trainer.encode.tokenizer
        self.info: TeacherInfo = trainer.teacher.info()
        # Only a teacher in this process has these; others are known by their fingerprints.
        self.teacher: nn.Module | None = getattr(trainer.teacher, "model", None)
        if not isinstance(self.teacher, nn.Module):
            self.teacher = None
        self.teacher_tokenizer: PreTrainedTokenizerBase | None = getattr(trainer.teacher, "tokenizer", None)
        self.prompts: list[Prompt] = list(trainer.train_dataset or [])  # type: ignore[arg-type]
        self.heldout: list[Prompt] = list(trainer.eval_dataset or [])  # type: ignore[arg-type]

    @cached_property
    def ids(self) -> int:
        """The student's last token id plus one."""
        return len(tokens_by_id(self.tokenizer))

    @cached_property
    def columns(self) -> tuple[int, int]:
        """Logit columns of student and teacher."""
        return head_of(self.student).vocab_size, self.info.vocab_size

    @cached_property
    def sharded(self) -> bool:
        """Whether ZeRO-3 holds the student in shards, so that it cannot run before training has started."""
        return any(hasattr(p, "ds_id") for p in self.student.parameters())
