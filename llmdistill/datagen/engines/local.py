"""Engines in this process. Calls arrive one by one from writers; a thread hands them to the model in good company."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from llmdistill.datagen.calls import Call, Drawn, sampled_from
from llmdistill.datagen.engines.base import Reader, ended
from llmdistill.models.generation import generate
from llmdistill.models.vllm_engine import InProcessVLLM
from llmdistill.models.vllm_requests import generation_params
from llmdistill.texts.rollout import Prompt, Rollout, Sampling
from llmdistill.tokenization.special import eos_ids, pad_id

Item = tuple[Call, "Future[Drawn]"]


class _Fed:
    """A thread that owns a model and works off a queue of calls."""

    def __init__(self, reader: Reader, in_flight: int) -> None:
        self.reader, self.in_flight = reader, in_flight
        self._calls: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, call: Call) -> Future[Drawn]:
        future: Future[Drawn] = Future()
        self._calls.put((call, future))
        return future

    def close(self) -> None:
        self._closed.set()
        self._calls.put(None)

    def _run(self) -> None:
        while not self._closed.is_set() and (first := self._calls.get()) is not None:
            self._work(first)

    def _work(self, first: Item) -> None:
        """Answers a call, and others that are waiting by then."""
        raise NotImplementedError

    def _waiting(self) -> Item | None:
        """The next call, if there is one already."""
        try:
            return self._calls.get_nowait()
        except queue.Empty:
            return None

    def _read(self, item: Item) -> tuple[str, list[int], str] | None:
        """What the model reads; None, and the call is answered, where that cannot be."""
        if self._closed.is_set() or not item[1].set_running_or_notify_cancel():
            return None
        try:
            return self.reader.read(item[0])
        except ValueError as error:
            item[1].set_exception(error)
            return None

    def _drawn(
        self, call: Call, prompt: list[int], opened: str, ids: list[int], logprobs: list[float], finish: str
    ) -> Drawn:
        text, by_itself, cut = ended(self.reader.text(ids), finish, call.stop)
        if cut:  # the ids go on behind the text
            return Drawn(opened + text, "stop", len(ids), len(prompt), len(opened))
        of = sampled_from(call.sampling)
        end: Any = "stop" if by_itself else "length"
        return Drawn(opened + text, end, len(ids), len(prompt), len(opened), prompt, ids, logprobs, of)


class VLLMEngine(_Fed):
    """vLLM in this process, which takes calls as they come and answers each as soon as it is finished."""

    def __init__(self, engine: InProcessVLLM, reader: Reader, eos: Sequence[int], in_flight: int = 256) -> None:
        self.engine, self.eos = engine, tuple(eos)
        self._open: dict[str, tuple[Item, list[int], str]] = {}
        self._count = 0
        super().__init__(reader, in_flight)

    def close(self) -> None:
        super().close()
        self._thread.join()  # between two of its steps the engine can be closed
        self.engine.close()

    def _work(self, first: Item) -> None:
        try:
            for name, output in self.engine.stream(_Arriving(self, first), self.in_flight):
                (call, future), prompt, opened = self._open.pop(name)
                logprobs = [float(x) for x in output.logprobs.logprobs]
                finish = output.finish_reason or "stop"
                future.set_result(self._drawn(call, prompt, opened, list(output.token_ids), logprobs, finish))
        except BaseException as error:  # the engine is gone, and with it what it was working at
            for (_, future), _, _ in self._open.values():
                future.set_exception(error)
            self._open.clear()

    def request(self, item: Item) -> tuple[str, list[int], Any] | None:
        """Name, ids and parameters of a call; None where it cannot be asked."""
        if (read := self._read(item)) is None:
            return None
        _, ids, opened = read
        self._count += 1
        name = str(self._count)
        self._open[name] = (item, ids, opened)
        return name, ids, generation_params(item[0].sampling, item[0].sampling.seed, self.eos)


class _Arriving:
    """The calls that are there. It may have another one later, after having had none: vLLM asks again at each step."""

    def __init__(self, engine: VLLMEngine, first: Item) -> None:
        self.engine, self.first = engine, list[Item]([first])

    def __iter__(self) -> Iterator[tuple[str, list[int], Any]]:
        return self

    def __next__(self) -> tuple[str, list[int], Any]:
        while True:
            item = self.first.pop() if self.first else self.engine._waiting()
            if item is None:
                raise StopIteration
            if (request := self.engine.request(item)) is not None:
                return request


class HFEngine(_Fed):
    """transformers' ``generate``: batches of calls that are drawn alike.

    What a call draws does not depend on its company up to rounding; with ``batch_size`` 1 not at all.
    """

    def __init__(self, model: Any, reader: Reader, batch_size: int = 16) -> None:
        self.model, self.batch_size = model, batch_size
        self.eos, self.pad = eos_ids(model, reader.tokenizer), pad_id(reader.tokenizer)
        super().__init__(reader, 4 * batch_size)

    def _work(self, first: Item) -> None:
        items = [first]
        while len(items) < 4 * self.batch_size and (item := self._waiting()) is not None:
            items.append(item)
        read = [(item, *found) for item in items if (found := self._read(item)) is not None]
        alike: dict[Any, list[tuple[Item, str, list[int], str]]] = {}
        for entry in read:
            alike.setdefault(tuple(entry[0][0].drawn.items()), []).append(entry)
        for group in alike.values():
            group.sort(key=lambda entry: -len(entry[2]))
            for start in range(0, len(group), self.batch_size):
                self._batch(group[start : start + self.batch_size])

    def _batch(self, batch: list[tuple[Item, str, list[int], str]]) -> None:
        try:
            prompts, seeds = (
                [Prompt(ids, text) for _, text, ids, _ in batch],
                [item[0].sampling.seed for item, *_ in batch],
            )
            drawn = self._generated(prompts, replace(batch[0][0][0].sampling, seed=0), seeds)
        except BaseException as error:
            for (_, future), *_ in batch:
                future.set_exception(error)
            return
        assert drawn.behavior_logprobs is not None
        for i, ((call, future), _, prompt, opened) in enumerate(batch):
            mask = drawn.completion_mask[i]
            ids, logprobs = drawn.input_ids[i][mask].tolist(), drawn.behavior_logprobs[i][mask].tolist()
            future.set_result(self._drawn(call, prompt, opened, ids, logprobs, str(drawn.finish[i])))

    def _generated(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> Rollout:
        """One completion of each prompt, of which each has a seed of its own."""
        return generate(self.model, prompts, sampling, eos_ids=self.eos, pad_id=self.pad, rows=seeds)
