"""What an optimizer step came to, summed over micro-batches and ranks, and the schedules that hear of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from llmdistill.composition.batch import MicroBatch, Slice
from llmdistill.composition.loss import Result, TermResult
from llmdistill.composition.method import Measured, Method
from llmdistill.composition.term import Term
from llmdistill.record.meters import Meters
from llmdistill.teachers.base import Teacher
from llmdistill.teachers.mixture import RoutedTeacher
from llmdistill.teachers.student import StudentTeacher
from llmdistill.texts import Prompt

Sums = dict[tuple[str, str, str], list[float]]  # (term, axis, label) -> [sum of losses, rows]


class Progress:
    """Adds up the micro-batches of an optimizer step; hands the schedules what they came to, alike on every rank."""

    def __init__(self, method: Method, judges: Mapping[str, Teacher]) -> None:
        self.method, self.judges = method, judges
        self.forget()

    @property
    def hears_norms(self) -> bool:
        """Whether a schedule hears the norms of the terms' gradients."""
        return any(schedule.hears_norms for schedule in self.method.schedules.values())

    def forget(self) -> None:
        """Nothing of a step that broke off counts for the next one."""
        self.losses: dict[str, float] = defaultdict(float)  # of this rank, each over the global denominator
        self.watched: dict[tuple[str, str], float] = defaultdict(float)
        self.groups: Sums = defaultdict(lambda: [0.0, 0.0])
        self.squared_norms: dict[str, float] = defaultdict(float)
        self.counted: set[str] = set()  # terms that the global batch has something of

    def note(self, batch: MicroBatch, result: Result) -> None:
        """Takes one micro-batch in training."""
        if not self.method.schedules:
            return
        for s in batch.slices:
            if (term_result := result.terms.get(s.term.name)) is None:
                continue
            self.counted.add(s.term.name)
            self.losses[s.term.name] += term_result.loss_sum / s.total
            if self.hears_norms and s.term.weight_now:
                self.squared_norms[s.term.name] += term_result.squared_norm / s.term.weight_now**2
            for name, total in term_result.watched.items():
                self.watched[s.term.name, name] += total / s.total
            if s.term.group is None:
                self._note_groups(batch, s, term_result)

    def _note_groups(self, batch: MicroBatch, s: Slice, term_result: TermResult) -> None:
        losses = term_result.row_losses if s.weights_N is None else term_result.row_losses * s.weights_N
        weights = torch.ones_like(losses) if s.weights_N is None else s.weights_N
        counts = list(s.groups.counts)
        sums = [float(x.sum()) for x in losses.split(counts)]
        rows = [float(x.sum()) for x in weights.split(counts)]
        sequences = [
            (batch.texts[n].author, p) for n in s.term.texts if n in batch.texts for p in batch.texts[n].prompts
        ]
        for (author, prompt), total, count in zip(sequences, sums, rows, strict=True):
            labels = {"author": author, "domain": prompt.domain or "", "teacher": self._teacher(s.term, prompt)}
            for axis, label in labels.items():
                loss_and_rows = self.groups[s.term.name, axis, label]
                loss_and_rows[0], loss_and_rows[1] = loss_and_rows[0] + total, loss_and_rows[1] + count

    def _teacher(self, term: Term, prompt: Prompt) -> str:
        """Whose word about a sequence a term hears first: the name of the judge, or of the teacher it is routed to."""
        if term.ask is None:
            return ""
        judge = self.judges.get(term.ask.judge)
        routed = judge.route(prompt.domain) if isinstance(judge, RoutedTeacher) else None
        return routed or term.ask.judge

    def step_done(self, step: int, accelerator: Any) -> None:
        """Moves the schedules by what all ranks counted; every rank calls it. Nothing counted moves nothing."""
        if self.method.schedules:
            measured = self._measured(step, accelerator)
            for schedule in self.method.schedules.values() if measured.losses else ():
                schedule.update(measured)
        self.forget()

    def _measured(self, step: int, accelerator: Any) -> Measured:
        local_sums = (
            {n: self.losses[n] for n in self.counted},
            dict(self.watched),
            {k: list(v) for k, v in self.groups.items()},
            dict(self.squared_norms),
        )
        sums_of_ranks = gather_object([local_sums]) if accelerator.num_processes > 1 else [local_sums]
        losses: dict[str, float] = defaultdict(float)
        watched: dict[tuple[str, str], float] = defaultdict(float)
        groups: Sums = defaultdict(lambda: [0.0, 0.0])
        squares: dict[str, float] = defaultdict(float)
        for rank_losses, rank_watched, rank_groups, rank_squares in sums_of_ranks:
            for name, value in rank_squares.items():
                squares[name] += value
            for name, value in rank_losses.items():
                losses[name] += value
            for key, value in rank_watched.items():
                watched[key] += value
            for label, (total, count) in rank_groups.items():
                groups[label][0] += total
                groups[label][1] += count
        norms = {name: square**0.5 for name, square in squares.items()}
        return Measured(step, dict(losses), dict(watched), {k: (a, b) for k, (a, b) in groups.items()}, norms)


class ProgressCallback(TrainerCallback):
    """Tells schedules how long the run is, and of every optimizer step."""

    def __init__(self, progress: Progress, meters: Meters, accelerator: Any, judges: Mapping[str, Teacher]) -> None:
        self.progress, self.meters, self.accelerator, self.judges = progress, meters, accelerator, judges

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for schedule in self.progress.method.schedules.values():
            schedule.start(state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for judge in self.judges.values():
            if isinstance(judge, StudentTeacher):
                judge.step()
        self.progress.step_done(state.global_step, self.accelerator)
        schedules = self.progress.method.schedules
        for name, schedule in schedules.items():
            for key, value in schedule.numbers().items():
                self.meters.add(f"distill/{key}" if len(schedules) == 1 else f"distill/{name}/{key}", value)


class FirstValidation(TrainerCallback):
    """Before the first step, for a source that moves with the validation loss: what it is compared with later."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        moved = any(getattr(source, "validated", False) for source in self.trainer.method.texts.values())
        if moved and state.global_step == 0 and self.trainer.eval_dataset:
            self.trainer.evaluate()
