"""Runs to look at before they start, and what a check finds of them: shared by the tests of the preflight."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

from llmdistill import DistillationTrainer, OPDTrainer
from llmdistill.preflight import CHECKS, Finding, examine, name_of
from llmdistill.teachers.local import LocalTeacher
from tests import tiny

NAMES = [name_of(check) for check in CHECKS]
Make = Callable[..., OPDTrainer]


def found(trainer: DistillationTrainer, name: str) -> list[Finding]:
    """What one check alone finds."""
    findings = examine(trainer, skip=[n for n in NAMES if n != name])
    return [f for f in findings if f.check == name]


def levels(trainer: DistillationTrainer, name: str) -> set[str]:
    return {f.level for f in found(trainer, name)}


def message(trainer: DistillationTrainer, name: str, level: str = "fail") -> str:
    return "\n".join(str(f) for f in found(trainer, name) if f.level == level)


def swapped(a: str = "a", b: str = "b") -> Any:
    """A tokenizer in which two ids changed places."""
    tokenizer = tiny.tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    other = tiny.tokenizer()
    other._tokenizer = Tokenizer.from_str(json.dumps(state))
    return other


class Elsewhere:
    """A teacher known by the protocol only, as one in another engine is. ``spoil`` edits its blocks."""

    def __init__(self, teacher: LocalTeacher, spoil: Callable[[list[Any]], list[Any]] = lambda blocks: blocks) -> None:
        self.inner, self.spoil = teacher, spoil
        self.generate, self.info, self.close = teacher.generate, teacher.info, teacher.close

    def score(self, rollout: Any, top_k: int, chosen: Any = None) -> list[Any]:
        return self.spoil(self.inner.score(rollout, top_k))


def local(model: Any = None, tokenizer: Any = None) -> LocalTeacher:
    return LocalTeacher(model or tiny.llama(2), tokenizer or tiny.tokenizer())


def listed(estimator: str) -> dict[str, int]:
    return {"top_k": 8} if estimator == "top_k" else {}


def ending(seed: int, eos: Any) -> Any:
    model = tiny.llama(seed)
    model.generation_config.eos_token_id = eos
    return model
