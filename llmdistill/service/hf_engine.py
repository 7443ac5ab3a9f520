"""A transformers model behind the service: any architecture, exact full-vocabulary scores, caller-chosen ids.

Requests of different callers are merged: the scheduler takes the one that waits longest and fills its batch, up to
``batch_tokens``, with the waiting ones nearest to it in length. One thread runs the model.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
from safetensors.torch import load_file

from llmdistill.models.generation import Watch, generate
from llmdistill.service.adapters import Uses, check_adapter
from llmdistill.service.engine import Done, EngineDead, Evidence, GenerateJob, Sample, ScoreJob, Told
from llmdistill.service.problems import first_line
from llmdistill.teachers.base import TeacherInfo
from llmdistill.teachers.local import LocalTeacher
from llmdistill.texts import Prompt, Rollout, Sampling, collate
from llmdistill.tokenization.special import pad_id
from llmdistill.wire.hidden import HeadWeights

BATCHES = 4  # that are in the engine: it chooses among sequences of like length


@dataclass
class _Waiting:
    job: ScoreJob
    answer: asyncio.Future[Evidence]

    @property
    def key(self) -> tuple[int, int, bool]:
        """What may share a batch: blocks of one call have one width."""
        return self.job.top_k, -1 if self.job.chosen is None else self.job.chosen.shape[1], self.job.hidden is not None


class HFEngine:
    """Implements :class:`~llmdistill.service.engine.Engine` over a :class:`LocalTeacher`.

    Args:
        teacher: the model and its tokenizer.
        batch_tokens: tokens, padding included, of one forward pass.
    """

    kind = "hf"
    chosen_ids = True
    partial_weights = True
    transfer, workers = "", 1  # weights come over HTTP

    def __init__(self, teacher: LocalTeacher, *, batch_tokens: int = 16384, max_model_len: int | None = None) -> None:
        self.teacher, self.tokenizer, self.batch_tokens = teacher, teacher.tokenizer, batch_tokens
        self.capacity_tokens: int | None = BATCHES * batch_tokens
        self.max_top_k = teacher.info().vocab_size
        self.max_model_len = min(max_model_len or teacher.info().context_length, teacher.info().context_length)
        self.dtype = str(teacher.model.dtype).removeprefix("torch.")
        self.adapters: dict[str, str] = {}
        self.weights_bytes = 4 * sum(p.numel() for p in teacher.model.parameters())
        self._shapes = {name: tuple(p.shape) for name, p in teacher.model.state_dict().items()}
        self._inner: dict[str, str] = {}  # what peft calls an adapter
        self._uses = Uses()
        self._numbers = itertools.count()
        self._waiting: list[_Waiting] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._scorings: SimpleQueue[tuple[list[ScoreJob], Future[list[Evidence]]]] = SimpleQueue()
        self._loop_task: asyncio.Task[None] | None = None
        self._more = asyncio.Event()
        self._peft: Any = None
        self._head: tuple[str, HeadWeights] | None = None  # and whose it is
        self._failed = False  # something, since the last look
        self._dead = ""  # why

    @property
    def info(self) -> TeacherInfo:
        return self.teacher.info()

    async def start(self) -> None:
        await self._on_thread(self.head)  # takes a fingerprint of all of it

    async def check(self) -> None:
        """Whatever failed, a few tokens have to go through: an error of the GPU that sticks would fail for ever."""
        if self._dead:
            raise EngineDead(self._dead)
        if self._failed:
            self._failed = False
            await self._look()

    async def score(self, jobs: Sequence[ScoreJob], done: Done | None = None) -> list[Evidence]:
        if self._dead:
            raise EngineDead(self._dead)
        if self._loop_task is None:
            self._loop_task = asyncio.create_task(self._run())
            self._loop_task.add_done_callback(self._ended)
        loop = asyncio.get_running_loop()
        answers: list[asyncio.Future[Evidence]] = []
        for i, job in enumerate(jobs):
            answers.append(loop.create_future())
            if done is not None:
                answers[-1].add_done_callback(partial(_tell, done, i))
            if job.start == job.stop:
                empty = job.block(self.info) if job.hidden is None else job.states(self.info, self.head())
                answers[-1].set_result(empty)
            else:
                self._waiting.append(_Waiting(job, answers[-1]))
        self._more.set()
        return list(await asyncio.gather(*answers))

    async def generate(self, job: GenerateJob, told: Told | None = None) -> list[list[Sample]]:
        if self._dead:
            raise EngineDead(self._dead)
        given_up = threading.Event()
        try:
            grown = None if told is None else _Grown(told, asyncio.get_running_loop(), self._score_next)
            with self._uses.of(job.adapter):
                return await self._on_thread(self._generate, job, given_up, grown)
        except asyncio.CancelledError:
            given_up.set()  # what runs ends with its batch
            raise
        except Exception:
            self._failed = True
            raise

    async def load_weights(self, folder: Path, partial: bool) -> None:
        await self._on_thread(self._load, folder, partial)

    async def join(self, init: dict[str, Any], replica: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        raise ValueError("transformers takes weights over HTTP")

    async def receive(self, update: dict[str, Any]) -> None:
        raise EngineDead("transformers takes weights over HTTP")

    def check_adapter(self, folder: Path) -> None:
        check_adapter(folder, self._shapes)

    async def add_adapter(self, name: str, folder: Path) -> None:
        try:
            await self._on_thread(self._add_adapter, name, folder)
        except Exception as error:
            raise EngineDead(f"an adapter was half loaded into the model: {first_line(error)}") from error
        self.adapters[name] = str(folder)

    async def remove_adapter(self, name: str) -> None:
        del self.adapters[name]
        await self._uses.ended(name)
        await self._on_thread(self._remove_adapter, name)

    async def close(self) -> None:
        if self._loop_task is not None:
            self._loop_task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    # ---------------------------------------------------------------- scoring

    async def _run(self) -> None:
        while True:
            await self._more.wait()
            # callers that went away without waiting for the answer
            self._waiting = [w for w in self._waiting if not w.answer.done()]
            if not self._waiting:
                self._more.clear()
                continue
            batch = next_batch(self._waiting, self.batch_tokens)
            taken = {id(w) for w in batch}
            self._waiting = [w for w in self._waiting if id(w) not in taken]
            try:
                blocks = await self._scored([w.job for w in batch])
            except Exception as error:
                self._failed = True
                for waiting in batch:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(error)
                continue
            for waiting, block in zip(batch, blocks, strict=True):
                if not waiting.answer.done():
                    waiting.answer.set_result(block)

    async def _scored(self, jobs: list[ScoreJob]) -> list[Evidence]:
        """On the model's thread: when it is free, or between two tokens of samples that somebody watches grow."""
        scored: Future[list[Evidence]] = Future()
        self._scorings.put((jobs, scored))
        self._thread.submit(self._score_next)
        return await asyncio.wrap_future(scored)

    def _score_next(self) -> None:
        try:
            jobs, scored = self._scorings.get_nowait()
        except Empty:  # it was done in between
            return
        if scored.set_running_or_notify_cancel():
            try:
                scored.set_result(self._score(jobs))
            except BaseException as error:
                scored.set_exception(error)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """The task that scores is done: at the end, or it has died, and those who wait must not for ever."""
        if task.cancelled():
            return
        self._dead = f"the scoring task has ended: {first_line(task.exception() or RuntimeError())}"
        for waiting in self._waiting:
            if not waiting.answer.done():
                waiting.answer.set_exception(EngineDead(self._dead))
        self._waiting = []

    async def _look(self) -> None:
        ids = [min(1, self.info.vocab_size - 1)] * 2
        try:
            await self._on_thread(self._score, [ScoreJob(ids, 1, 2, 0)])
        except Exception as error:
            self._dead = f"the model no longer scores two tokens: {first_line(error)}"
            raise EngineDead(self._dead) from error

    def head(self) -> HeadWeights:
        info, found = self.info, self.teacher.head
        if self._head is None or self._head[0] != info.fingerprint:
            linear = found.linear
            bias = None if linear.bias is None else linear.bias.detach()
            made = HeadWeights(linear.weight.detach(), bias, found.logit_scale, found.softcap)
            self._head = (info.fingerprint, made)
        return self._head[1]

    def _score(self, jobs: list[ScoreJob]) -> list[Evidence]:
        rollout: Rollout = collate(
            [j.ids[: j.start] for j in jobs],
            [j.ids[j.start : j.stop] for j in jobs],
            pad_id=pad_id(self.teacher.tokenizer),
        )
        if jobs[0].hidden is not None:
            with self._as(None):
                states = self.teacher.dense(rollout).hidden_NH.split(rollout.row_counts)
            return [job.states(self.info, self.head(), rows) for job, rows in zip(jobs, states, strict=True)]
        chosen = None if jobs[0].chosen is None else torch.cat([j.chosen for j in jobs])  # type: ignore[misc]
        with self._as(None):
            return list(self.teacher.score(rollout, jobs[0].top_k, chosen))

    # ---------------------------------------------------------------- generation, weights, adapters

    def _generate(self, job: GenerateJob, given_up: threading.Event, grown: _Grown | None) -> list[list[Sample]]:
        n, samples = job.sampling.samples_per_prompt, list[Sample]()
        longest = max(map(len, job.prompts)) + job.sampling.max_new_tokens
        share = max(1, self.batch_tokens // (longest * n))  # between two of them a caller may be gone
        with self._as(job.adapter) as model:
            for a in range(0, len(job.prompts), share):
                if given_up.is_set():
                    return []
                part = slice(a, a + share)
                watch = None if grown is None else partial(grown, a * n, given_up)
                samples += self._samples(model, job.prompts[part], job.rows[part], job.sampling, job.eos_ids, watch)
        return [samples[i : i + n] for i in range(0, len(samples), n)]

    def _samples(
        self,
        model: Any,
        prompts: list[list[int]],
        rows: list[int],
        sampling: Sampling,
        eos_ids: tuple[int, ...],
        watch: Watch | None = None,
    ) -> list[Sample]:
        pad = pad_id(self.teacher.tokenizer)
        asked = [Prompt(ids, "") for ids in prompts]
        more: dict[str, Any] = {"tokenizer": self.tokenizer, "batch_tokens": self.batch_tokens, "watch": watch}
        drawn = generate(model, asked, sampling, eos_ids=eos_ids, pad_id=pad, rows=rows, **more)
        assert drawn.behavior_logprobs is not None
        columns = zip(drawn.input_ids, drawn.behavior_logprobs, drawn.completion_mask, drawn.finish, strict=True)
        return [Sample(ids[mask].tolist(), lps[mask].tolist(), finish) for ids, lps, mask, finish in columns]

    @torch.no_grad()
    def _load(self, folder: Path, partial: bool) -> None:
        model = self.teacher.model
        own = model.state_dict()  # the tensors themselves
        found = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
        if self._peft is not None:
            raise ValueError("the model has adapters; new weights go into a model without")
        wrong = [n for n, t in found.items() if n not in own or own[n].shape != t.shape]
        unique = {name for name, _ in model.named_parameters()}  # a tied matrix once
        missing = [] if partial else sorted(unique - set(found))
        if wrong or missing or not found:
            what = f"unknown or of another shape: {wrong[:3]}" if wrong else f"missing: {missing[:3] or 'all of them'}"
            raise ValueError(f"the weights do not fit the model; {what}")
        for name, tensor in found.items():
            own[name].copy_(tensor)
        self.teacher.forget_info()
        self.head()

    def _add_adapter(self, name: str, folder: Path) -> None:
        from peft import PeftConfig, PeftModel

        inner = f"a{next(self._numbers)}"  # the old one of that name stays until the new one is there
        config = PeftConfig.from_pretrained(str(folder))
        config.init_lora_weights = True  # type: ignore[attr-defined]  # other ways to start change the base weights
        config.inference_mode = True
        if self._peft is None:
            model: Any = self.teacher.model
            self._peft = PeftModel.from_pretrained(model, str(folder), adapter_name=inner, config=config).eval()
        else:
            self._peft.load_adapter(str(folder), adapter_name=inner, peft_config=config)
        if name in self._inner:
            self._peft.delete_adapter(self._inner[name])
        self._inner[name] = inner

    def _remove_adapter(self, name: str) -> None:
        if self.adapters:
            self._peft.delete_adapter(self._inner.pop(name))
        else:  # the last one: the model is as it was
            self._inner.clear()
            self.teacher.model, self._peft = self._peft.unload(), None

    @contextmanager
    def _as(self, adapter: str | None) -> Iterator[Any]:
        """The model with that adapter, or without any."""
        if self._peft is None:
            yield self.teacher.model
        elif adapter is None:
            with self._peft.disable_adapter():
                yield self.teacher.model
        else:
            self._peft.set_adapter(self._inner[adapter])
            yield self._peft

    async def _on_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)


class _Grown:
    """Tells, on the loop, of samples that grow on the model's thread; ``between`` works there after each token."""

    def __init__(self, told: Told, loop: asyncio.AbstractEventLoop, between: Callable[[], None]) -> None:
        self.told, self.loop, self.between = told, loop, between
        self.ids: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[float]] = {}

    def __call__(
        self, first: int, given_up: threading.Event, numbers: Sequence[int], ids: Sequence[int], lps: Sequence[float]
    ) -> bool:
        for number, token, logprob in zip(numbers, ids, lps, strict=True):
            self.ids.setdefault(first + number, []).append(token)
            self.logprobs.setdefault(first + number, []).append(logprob)
            so_far = (list(self.ids[first + number]), list(self.logprobs[first + number]))
            self.loop.call_soon_threadsafe(self.told, first + number, *so_far)
        self.between()
        return not given_up.is_set()


def _tell(done: Done, index: int, answer: asyncio.Future[Evidence]) -> None:
    if not answer.cancelled() and answer.exception() is None:
        done(index, answer.result())


def next_batch(waiting: Sequence[_Waiting], batch_tokens: int) -> list[_Waiting]:
    """The one that waits longest and those nearest to it in length, padded size within ``batch_tokens``."""
    first = waiting[0]
    alike = sorted((w for w in waiting if w.key == first.key), key=lambda w: w.job.stop)
    low = high = next(i for i, w in enumerate(alike) if w is first)
    while True:
        below = first.job.stop - alike[low - 1].job.stop if low > 0 else None
        above = alike[high + 1].job.stop - first.job.stop if high + 1 < len(alike) else None
        if below is None and above is None:
            break
        down = above is None or (below is not None and below <= above)
        longest = alike[high if down else high + 1].job.stop
        if longest * (high - low + 2) > batch_tokens:
            break
        low, high = (low - 1, high) if down else (low, high + 1)
    return list(alike[low : high + 1])
