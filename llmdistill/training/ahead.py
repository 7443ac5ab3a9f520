"""Rounds that are made ahead: while a step trains, the texts of later ones are written and their teachers asked.

With ``rollouts.staleness`` S the texts of step n are written by the weights before step n - S, in a service, and judges
that are services too score every sequence as soon as it is finished. A thread does that, round after round. What it
makes is what a round without it is made of: the texts as they were drawn, and judges that remember what they said
(:class:`~llmdistill.teachers.prescored.Prescored`). Rewards, contexts built from samples, judges in this process and
lists of the student's choice are made when the step is, by its weights.

With ``objective.num_iterations`` K a round is trained on K times, and S counts rounds.

Rounds that are under way are part of a checkpoint: a resumed run trains on the same texts.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import islice
from queue import SimpleQueue
from typing import Any, TypeVar

from llmdistill.compat.patching import random_state_kept
from llmdistill.ranks import channel, on_every_rank
from llmdistill.teachers.base import Teacher, bytes_received
from llmdistill.teachers.prescored import Prescored
from llmdistill.training.listening import Listening, asked_ahead
from llmdistill.training.made import Made
from llmdistill.training.rounds import RoundTexts, SampleLater

T = TypeVar("T")
CLOSE_S = 2.0  # that a run which ends waits for a request that is on its way


class RoundsAhead:
    """Makes the rounds of ``trainer``, of K steps each, up to S of them ahead; with S = 0 in the thread that asks.

    Every rank has one, and all call its methods alike. Rounds count from 0.
    """

    def __init__(self, trainer: RoundTexts) -> None:
        self.trainer = trainer
        self._runs = itertools.count()
        self._worker = _Worker(next(self._runs))
        self._rounds: dict[int, Future[Made]] = {}
        self._stored: dict[int, Mapping[str, Any]] = {}  # rounds of a checkpoint, until their prompts are read again
        self._examples: dict[int, list[list[Any]]] = {}  # of each micro-batch of a round
        self._iterator: Iterator[list[Any]] | None = None  # over the rows, ahead of the trainer's own
        self._epoch = self._reached = 0  # of that iterator, and the round whose rows come next

    def restart(self, stored: Mapping[int, Mapping[str, Any]] | None = None) -> None:
        """A run begins, with the ``stored`` rounds of a checkpoint."""
        self.abandon()  # what a run left that was broken off
        self._worker = _Worker(next(self._runs))
        self._rounds, self._examples, self._iterator = {}, {}, None
        self._stored = dict(stored or {})

    def next(self, epoch_iterator: Iterator[list[Any]]) -> Made | None:
        """The round of the next step; those after it are put in hand first. None: the rows have ended.

        Raises:
            UserError: whatever a service or a source raised, on every rank.
        """
        t, now, every = self.trainer, self._round_of(self.trainer.state.global_step), self.trainer.args.num_iterations
        if self._iterator is None:
            self._begin(now, epoch_iterator)
            if t.on_policy and t.args.rollouts.staleness:
                t.sync_engine()
        last = min(now + t.args.rollouts.staleness, self._round_of(t.state.max_steps - 1))
        with random_state_kept():
            self._read(last)
        missing = [n for n in range(now, last + 1) if n not in self._rounds and n in self._examples]
        sample = t.sampler_of_now() if missing and t.args.rollouts.staleness else None
        for n in missing:
            groups = self._examples.pop(n)
            examples = [example for group in groups for example in group]
            if n in self._stored:
                work: Callable[[], Made] = partial(self._restored, n, len(groups), examples, self._stored.pop(n))
            else:
                work = partial(self._made, n * every, len(groups), examples, sample)
            self._rounds[n] = self._worker.submit(work) if sample is not None else _done(work)
        if now not in self._rounds:
            return None
        with t.meters.timed("time/waited"):
            made = on_every_rank(self._rounds[now].result)
        self._rounds = {n: future for n, future in self._rounds.items() if n >= now}
        return made

    def wait(self) -> None:
        """Until no round is under way.

        Raises:
            UserError: one of them failed; on every rank.
        """
        on_every_rank(lambda: [future.result() for future in self._rounds.values()] and None)

    def abandon(self) -> None:
        """Ends what is under way: nobody will ask for it."""
        self._worker.close()
        self._rounds = {}

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """The rounds that the next step and those after it are of."""
        self.wait()
        now = self._round_of(self.trainer.state.global_step)
        return {n: future.result().state_dict() for n, future in self._rounds.items() if n >= now}

    def _round_of(self, step: int) -> int:
        return step // self.trainer.args.num_iterations

    def _begin(self, now: int, epoch_iterator: Iterator[list[Any]]) -> None:
        """With the rows of round ``now``: where the trainer's own iterator stands, which counts one for every step."""
        t = self.trainer
        self._epoch, passed = divmod(now, self._rounds_of_epoch())
        self._reached = now
        if t.args.num_iterations == 1:
            self._iterator = epoch_iterator
            return
        self._iterator = self._rows_of(self._epoch)
        for _ in islice(self._iterator, passed * t.args.gradient_accumulation_steps):
            pass

    def _rows_of(self, epoch: int) -> Iterator[list[Any]]:
        loader: Any = self.trainer.callback_handler.train_dataloader
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        return iter(loader)

    def _rounds_of_epoch(self) -> int:
        """Rows without a length have one epoch."""
        t = self.trainer
        try:
            batches = len(t.callback_handler.train_dataloader)  # type: ignore[arg-type]
        except TypeError:
            return max(t.state.max_steps, 1)
        return max(-(-batches // t.args.gradient_accumulation_steps), 1)

    def _read(self, last: int) -> None:
        """The examples of every round up to ``last``, epoch after epoch, as the trainer's own loop would read them."""
        assert self._iterator is not None
        t = self.trainer
        while self._reached <= last:
            groups = list(islice(self._iterator, t.args.gradient_accumulation_steps))
            if not groups:
                self._epoch += 1
                self._iterator = self._rows_of(self._epoch)
                groups = list(islice(self._iterator, t.args.gradient_accumulation_steps))
            if not groups:
                return
            self._examples[self._reached] = groups
            self._reached += 1

    def _judges(self) -> dict[str, Teacher]:
        """The judges of one round; those that are asked ahead remember what they say."""
        asked = asked_ahead(self.trainer)
        return {name: asked.remembering(name, judge) for name, judge in self.trainer.judges.items()}

    def _made(self, step: int, parts: int, examples: Sequence[Any], sample: SampleLater | None) -> Made:
        if sample is None:
            with self.trainer.meters.timed("time/rollout"):
                return Made(step, parts, list(examples), self.trainer.draw(examples, step), self._judges())
        t, judges = self.trainer, self._judges()
        is_asked = bool(judges) and isinstance(judges.get("teacher", next(iter(judges.values()))), Prescored)
        before = bytes_received(t.teacher) if is_asked else None
        with Listening(t, judges) as listening:
            with t.meters.timed("time/rollout"):
                texts = t.draw(examples, step, lambda of, sampling: sample(of, sampling, listening.hear))
            listening.hear_all(texts)
        received = None if before is None else (bytes_received(t.teacher) or 0) - before
        return Made(step, parts, list(examples), texts, judges, received=received)

    def _restored(self, step: int, parts: int, examples: Sequence[Any], state: Mapping[str, Any]) -> Made:
        return Made.restored(step, parts, list(examples), self._judges(), state)


def _done(work: Callable[[], T]) -> Future[T]:
    """What ``work()`` comes to here and now."""
    future: Future[T] = Future()
    future.set_result(work())
    return future


class _Worker:
    """One thread that works through what it is given, in order. A daemon: Ctrl-C does not wait for a service.

    Args:
        number: of the run, the same on every rank.
    """

    def __init__(self, number: int) -> None:
        self._jobs: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._stop, self._number = threading.Event(), number
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._jobs.put((work, future))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="rounds-ahead", daemon=True)
            self._thread.start()
        return future

    def close(self) -> None:
        """Begins nothing more, and gives what is under way a moment."""
        self._stop.set()
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def _run(self) -> None:
        with channel(f"ahead-{self._number}", self._stop):
            while (job := self._jobs.get()) is not None and not self._stop.is_set():
                work, future = job
                try:
                    future.set_result(work())
                except BaseException as error:  # raised by whoever waits for the round
                    future.set_exception(error)
