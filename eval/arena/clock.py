"""What a run has used so far, and the student's score each time it has used a certain share of its budgets.

Two budgets are read from one run. *Tokens*: those the loss was taken over (for pairs: of both completions). *CPU
seconds*: of this process, one thread, from the first step; the teacher's forward passes and the sampling are in it,
scoring the student and building the trainer are not. CPU seconds and not wall-clock seconds, because two cells run at
the same time and a wall clock would charge each for the other; on an idle core they are the same.

Text that was sampled before the run is charged too: ``charge`` seconds a sequence, when it is first used.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

Score = Callable[[PreTrainedModel], dict[str, float]]


@dataclass(frozen=True)
class Budget:
    """How long a cell trains: until both are used up. ``marks``: into how many parts the curve divides each; or
    ``points``: at which shares of them it is read."""

    tokens: int
    cpu_seconds: float
    marks: int = 4
    points: tuple[float, ...] = ()

    def shares(self, whole: float) -> list[float]:
        return [whole * point for point in self.points or [(i + 1) / self.marks for i in range(self.marks)]]


@dataclass
class Charge:
    """The price of text sampled beforehand: so many seconds for each of so many different sequences."""

    seconds_per_sequence: float = 0.0
    sequences: int = 0

    def due(self, used: int) -> float:
        return self.seconds_per_sequence * min(used, self.sequences)


@dataclass
class Curve(TrainerCallback):
    """Scores the student along the run and ends it. ``points`` is the record: tokens, cpu_seconds, step, scores."""

    budget: Budget
    score: Score
    charge: Charge = field(default_factory=Charge)
    report: Callable[[float], None] = lambda share: None  # told how much of the run is done
    before: dict[str, float] | None = None  # the start's scores, where another cell from that start took them
    points: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0  # both counted by the trainer (methods.counting)
    sequences: int = 0

    def used_seconds(self) -> float:
        return time.process_time() - self._start - self._aside + self.charge.due(self.sequences)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start, self._aside = time.process_time(), 0.0
        self._token_marks = self.budget.shares(self.budget.tokens)
        self._cpu_marks = self.budget.shares(self.budget.cpu_seconds)
        self._note(0, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = self.used_seconds()
        left = len(self._token_marks) + len(self._cpu_marks)
        self._token_marks = [mark for mark in self._token_marks if mark > self.tokens]
        self._cpu_marks = [mark for mark in self._cpu_marks if mark > seconds]
        if len(self._token_marks) + len(self._cpu_marks) < left:
            self._note(state.global_step, kwargs["model"])
        if not self._token_marks and not self._cpu_marks:
            control.should_training_stop = True
        elif state.global_step % 5 == 0:
            self.report(min(self.tokens / self.budget.tokens, seconds / self.budget.cpu_seconds, 1.0))

    def _note(self, step: int, model: PreTrainedModel) -> None:
        seconds, paused = self.used_seconds(), time.process_time()
        was_training = model.training
        model.eval()
        scores = self.score(model) if step or self.before is None else self.before
        model.train(was_training)
        self.before = self.before or scores
        self.points.append({"step": step, "tokens": self.tokens, "cpu_seconds": seconds, **scores})
        self._aside += time.process_time() - paused


def at(points: list[dict[str, float]], axis: str, budget: float) -> dict[str, float]:
    """The first point at which ``axis`` (tokens or cpu_seconds) has reached ``budget``.

    Raises:
        ValueError: the run ended before.
    """
    for point in points:
        if point[axis] >= budget:
            return point
    raise ValueError(f"the run ended at {points[-1][axis]:g} {axis}, before its budget of {budget:g}")
