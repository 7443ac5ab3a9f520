"""What a check looks at and what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llmdistill.composition.method import Method
from llmdistill.models.heads import head_of
from llmdistill.recipe.config import DistillationConfig
from llmdistill.recipe.data_config import DataConfig
from llmdistill.rollouts.engine import RolloutEngine
from llmdistill.teachers.base import Teacher, TeacherInfo, is_live
from llmdistill.teachers.fingerprint import tokenizer_fingerprint
from llmdistill.teachers.mixture import EnsembleTeacher, RoutedTeacher, leaves
from llmdistill.texts import Prompt, Rollout
from llmdistill.texts.facts import Facts, facts_of
from llmdistill.texts.prompts import PromptEncoder
from llmdistill.texts.streams import at_hand
from llmdistill.tokenization.compare import tokens_by_id

if TYPE_CHECKING:
    from rich.console import Console

    from llmdistill.recipe.command_line import Recipe

Level = Literal["ok", "notice", "fail"]
HELDOUT = "--data.heldout FILE, or from Python eval_dataset="
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
        from rich.text import Text

        console.print(Text(f"{self.level:<7}", STYLE[self.level]) + Text(str(self)), soft_wrap=True)


def ok(message: str) -> Finding:
    return Finding("ok", "", message)


def notice(message: str, fix: str | None = None) -> Finding:
    return Finding("notice", "", message, fix)


def fail(message: str, fix: str) -> Finding:
    return Finding("fail", "", message, fix)


@dataclass(frozen=True)
class Side:
    """One of the run's teachers. Several are told apart by name, and each by what is known of it."""

    name: str
    teacher: Teacher
    info: TeacherInfo
    model: nn.Module | None  # where it is a model in this process
    tokenizer: PreTrainedTokenizerBase | None  # where it is at hand; others are known by their fingerprints
    route: str | None = None  # of the router it is reached by
    averaged: bool = False  # one of an ensemble: what the run hears is not its own word
    present: Callable[[], AbstractContextManager[None]] = nullcontext  # inside, its model can run

    @classmethod
    def of(cls, name: str, teacher: Teacher, route: str | None, averaged: bool) -> Side:
        inner = getattr(teacher, "teacher", None) or teacher  # what a cache keeps the answers of
        info, model, tokenizer = teacher.info(), getattr(inner, "model", None), getattr(inner, "tokenizer", None)
        known = isinstance(tokenizer, PreTrainedTokenizerBase) and tokenizer_fingerprint(tokenizer) == info.tokenizer
        return cls(
            name,
            teacher,
            info,
            model if isinstance(model, nn.Module) else None,
            tokenizer if known else None,
            route,
            averaged,
            getattr(inner, "present", nullcontext),
        )


class Run(Protocol):
    """What of a trainer the checks look at."""

    args: Any
    model: Any
    method: Method
    judges: dict[str, Teacher]
    encode: PromptEncoder
    data_config: DataConfig
    train_dataset: Any
    eval_dataset: Any
    reward: Any
    heldout: Any
    rollout_engine: RolloutEngine
    pad_id: int
    eos_ids: Any
    vocab_size: int

    @property
    def teacher(self) -> Teacher: ...

    @property
    def on_policy(self) -> bool: ...

    def likeliest(self, rollout: Rollout, k: int) -> Tensor: ...

    def sync_engine(self) -> None: ...


class Subject:
    """The run that is looked at, in the terms of the checks."""

    stages = 1  # run folders that keep checkpoints at the same time

    def __init__(self, trainer: Run, recipe: Recipe | None) -> None:
        self.trainer, self.recipe = trainer, recipe
        self.args: DistillationConfig = trainer.args  # type: ignore[assignment]
        self.method: Method = trainer.method
        # Of evidence, and how many tokens it lists.
        self.kind, self.top_k = trainer.method.asked.kind, trainer.method.top_k
        self.student: nn.Module = trainer.model  # type: ignore[assignment]
        self.tokenizer: PreTrainedTokenizerBase = trainer.encode.tokenizer
        self.sides: list[Side] = []
        self.router: RoutedTeacher | None = None
        self.live = True
        if trainer.judges:
            self.info: TeacherInfo = trainer.teacher.info()  # of all teachers as one
            self.router = trainer.teacher if isinstance(trainer.teacher, RoutedTeacher) else None
            self.live = is_live(trainer.teacher)  # false: it replays what is stored
            routes = self.router.members.items() if self.router else [(None, trainer.teacher)]
            self.sides = [
                Side.of(name, teacher, route, isinstance(member, EnsembleTeacher))
                for route, member in routes
                for name, teacher in leaves(member, route or "")
            ]
        self.prompts: Sequence[Prompt] = at_hand(trainer.train_dataset)
        self.heldout: Sequence[Prompt] = at_hand(trainer.eval_dataset)

    @cached_property
    def facts(self) -> Facts:
        """Of all prompts that are trained on."""
        return facts_of(self.prompts)

    @cached_property
    def heldout_facts(self) -> Facts:
        return facts_of(self.heldout)

    def asked_of(self, side: Side, facts: Facts) -> Facts:
        """Of those prompts that a teacher is asked about."""
        router = self.router
        return facts if router is None else facts.where(facts.of_domains(lambda d: router.route(d) == side.route))

    def says(self, side: Side, message: str) -> str:
        """``message``, and of which teacher, where there are several."""
        return f"teacher {side.name!r}: {message}" if len(self.sides) > 1 else message

    @cached_property
    def ids(self) -> int:
        """The student's last token id plus one."""
        return len(tokens_by_id(self.tokenizer))

    @cached_property
    def columns(self) -> int:
        """Logit columns of the student."""
        return head_of(self.student).vocab_size

    @cached_property
    def sharded(self) -> bool:
        """Whether ZeRO-3 holds the student in shards, so that it cannot run before training has started."""
        return any(hasattr(p, "ds_id") for p in self.student.parameters())
