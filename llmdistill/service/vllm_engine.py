"""vLLM behind the service: its async engine merges what is asked, within its token budget, in processes of its own."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llmdistill.compat.vllm import async_arguments, kv_cache_tokens, load_async_vllm
from llmdistill.compat.vllm_clients import Seat, seated
from llmdistill.compat.vllm_prompts import free_bytes, step_tokens
from llmdistill.compat.vllm_scores import admit_chosen_ids
from llmdistill.compat.vllm_senders import BACKENDS
from llmdistill.errors import UserError
from llmdistill.models.vllm_requests import drawn, generation_params, hidden_rows, scored_rows, scoring_params
from llmdistill.service.adapters import Uses, check_adapter
from llmdistill.service.engine import Done, EngineDead, Evidence, GenerateJob, Sample, ScoreJob, Told, cancelling
from llmdistill.service.problems import Problem, first_line
from llmdistill.teachers.base import TeacherInfo
from llmdistill.teachers.fingerprint import is_tied, stored_shapes, weights_fingerprint
from llmdistill.teachers.heads import stored_head
from llmdistill.teachers.vllm import describe
from llmdistill.texts import request_seed
from llmdistill.texts.stops import StopStrings, stop_strings
from llmdistill.wire.hidden import HeadWeights, HiddenBlock

FEW_CELLS = 1 << 14  # of evidence, that cost less than handing them to a thread
GPU_ADAPTERS = 4  # that are computed with at one time
RESETS, RESET_S = 50, 0.1


class AsyncVLLMEngine:
    """Implements :class:`~llmdistill.service.engine.Engine` over vLLM's ``AsyncLLM``.

    Args:
        model_path: folder or hub name, with its tokenizer.
        max_top_k: the most tokens a job may list; the vocabulary size allows all.
        updatable: whether :meth:`load_weights` will be called (twice the memory for weights on a CPU).
        max_lora_rank: 0: no adapters.
        max_adapters: that will be loaded at one time.
        transfer: the backend of vLLM's weight-transfer API by which a trainer may send weights; empty: none.
        seat: at an engine that several processes ask; None: it has one of its own.
        options: further arguments of vLLM's engine.

    Raises:
        UserError: vLLM or the model cannot be loaded.
    """

    kind = "vllm"
    chosen_ids = True
    partial_weights = False  # until the workers have been asked
    capacity_tokens: int | None = None

    def __init__(
        self,
        model_path: str,
        *,
        dtype: str = "bfloat16",
        max_top_k: int = 128,
        max_model_len: int | None = None,
        kv_cache_gib: float = 0.5,
        gpu_memory_utilization: float = 0.9,
        trust_remote_code: bool = False,
        updatable: bool = False,
        max_lora_rank: int = 0,
        max_adapters: int = 4,
        transfer: str = "",
        seat: Seat | None = None,
        **options: Any,
    ) -> None:
        self._info, self.tokenizer = describe(model_path, trust_remote_code)
        self._shapes = stored_shapes(model_path)
        if (updatable or max_lora_rank) and not self._shapes:
            raise UserError(
                f"--model {model_path!r} has no safetensors files; what is pushed is held against their shapes, or a "
                "wrong push would end the engine. Fix: save the model as safetensors."
            )
        self.weights_bytes = 4 * sum(map(math.prod, self._shapes.values()))
        self._tied = is_tied(model_path)
        self._head: HeadWeights | None = None  # one that is pushed to is another after each push
        self._updatable, self._trust_remote_code = updatable, trust_remote_code
        self.max_lora_rank = max_lora_rank
        self.max_top_k, self.max_model_len = bounds(self._info, max_top_k, max_model_len)
        self.dtype = dtype
        if seat is not None:
            self.engine = seated(seat)
        else:
            settings = settings_of_vllm(
                self._info,
                dtype=dtype,
                max_top_k=max_top_k,
                max_model_len=max_model_len,
                kv_cache_gib=kv_cache_gib,
                gpu_memory_utilization=gpu_memory_utilization,
                trust_remote_code=trust_remote_code,
                updatable=updatable,
                max_lora_rank=max_lora_rank,
                max_adapters=max_adapters,
                transfer=transfer,
                **options,
            )
            self.engine = load_async_vllm(model_path, **settings)
        self.transfer, self.workers = transfer, int(self.engine.vllm_config.parallel_config.world_size)
        self._must_mend = admit_chosen_ids(self.engine)
        self.adapters: dict[str, str] = {}
        self._lora: dict[str, Any] = {}
        self._uses = Uses()
        # requests and adapters of all processes have numbers of their own
        self._first = seat is None or seat.index == 0
        self._numbers = itertools.count(1) if seat is None else itertools.count(1 + seat.index, seat.count)

    async def start(self) -> None:
        with _death_is_named():
            if self._first:  # of those that ask the same workers
                await self.engine.collective_rpc("llmdistill_mend", args=(self._must_mend,))
            if not self._updatable and all(await self.engine.collective_rpc("llmdistill_gives_hidden")):
                self._head = await asyncio.to_thread(stored_head, self._info.name, self._trust_remote_code)
            self.capacity_tokens = kv_cache_tokens(self.engine)
            self.partial_weights = all(await self.engine.collective_rpc("llmdistill_takes_part"))

    async def check(self) -> None:
        with _death_is_named():
            await self.engine.check_health()

    @property
    def info(self) -> TeacherInfo:
        return self._info

    async def score(self, jobs: Sequence[ScoreJob], done: Done | None = None) -> list[Evidence]:
        async def scored(i: int) -> Evidence:
            block = await self._score(jobs[i])
            if done is not None:
                done(i, block)
            return block

        async with cancelling() as group:
            # the longest first: what is left at the end is short
            order = sorted(range(len(jobs)), key=lambda i: -jobs[i].stop)
            tasks = {i: group.create_task(scored(i)) for i in order}
        return [tasks[i].result() for i in range(len(jobs))]

    def head(self) -> HeadWeights | None:
        return self._head

    def renamed(self, fingerprint: str) -> None:
        """Another process has put weights of that name into the engine."""
        self._info = replace(self._info, fingerprint=fingerprint)

    async def _hidden(self, job: ScoreJob, head: HeadWeights) -> HiddenBlock:
        if job.start == job.stop:
            return job.states(self._info, head)
        at = np.arange(job.start, job.stop)
        params = scoring_params(len(job.ids), at, 0, self._info.vocab_size, None, hidden=True)
        return job.states(self._info, head, hidden_rows(await self._ask(job.ids, params), at))

    async def _score(self, job: ScoreJob) -> Evidence:
        if job.hidden is not None and self._head is not None:
            return await self._hidden(job, self._head)
        if job.start == job.stop:
            return job.block(self._info)
        vocab, at = self._info.vocab_size, np.arange(job.start, job.stop)
        params = scoring_params(len(job.ids), at, job.top_k, vocab, job.chosen)
        output = await self._ask(job.ids, params)
        if len(at) * (job.top_k + 1) <= FEW_CELLS:
            return job.block(self._info, scored_rows(output, at, job.top_k, vocab, job.chosen))
        rows = await asyncio.to_thread(scored_rows, output, at, job.top_k, vocab, job.chosen)
        return job.block(self._info, rows)

    async def generate(self, job: GenerateJob, told: Told | None = None) -> list[list[Sample]]:
        stops = stop_strings(self.tokenizer, job.sampling.stop)

        def grown(number: int) -> Callable[[Any], None] | None:
            def tell(output: Any) -> None:
                ended = stops is not None and stops.ends(output.token_ids)  # looking at all of it costs more
                found = drawn(output, stops if ended else None)
                told(number, found.ids, found.logprobs)  # type: ignore[misc]

            return tell if told is not None else None

        asked = [(ids, row, j) for ids, row in zip(job.prompts, job.rows, strict=True) for j in job.sampling.numbers]
        n, lora = job.sampling.samples_per_prompt, self._lora[job.adapter] if job.adapter else None
        with self._uses.of(lora.lora_int_id if lora else None):
            async with cancelling() as group:
                tasks = [
                    group.create_task(
                        self._ask(
                            ids,
                            generation_params(
                                job.sampling, request_seed(job.sampling.seed, row, j), job.eos_ids, told is not None
                            ),
                            lora,
                            stops,
                            grown(number),
                        )
                    )
                    for number, (ids, row, j) in enumerate(asked)
                ]
        found = [drawn(task.result().outputs[0], stops) for task in tasks]
        samples = [Sample(one.ids, one.logprobs, one.finish) for one in found]
        return [samples[i : i + n] for i in range(0, len(samples), n)]

    async def _ask(
        self,
        ids: list[int],
        params: Any,
        lora: Any = None,
        stops: StopStrings | None = None,
        grown: Callable[[Any], None] | None = None,
    ) -> Any:
        name = f"r{next(self._numbers)}"
        with _death_is_named():
            try:
                asked = self.engine.generate({"prompt_token_ids": ids}, params, name, lora_request=lora)
                last = None
                async for last in asked:
                    if grown is not None:
                        grown(last.outputs[0])
                    if stops is not None and stops.ends(last.outputs[0].token_ids):
                        await self.engine.abort(name)
                        break
            except ValueError as error:  # what vLLM checks and we do not
                raise Problem(400, "invalid", f"the engine refuses the request: {first_line(error)}") from None
        return last

    async def load_weights(self, folder: Path, partial: bool) -> None:
        if partial and not self.partial_weights:
            raise ValueError("this engine takes complete sets of weights only")
        await asyncio.to_thread(lambda: self._check(stored_shapes(folder), partial))
        try:
            await self.engine.collective_rpc("llmdistill_load", args=(str(folder), partial))
            await self._forget_prefixes()
        except Exception as error:  # some weights may be in: what would answer now is neither the old nor the new
            raise EngineDead(f"new weights could not be loaded into vLLM: {first_line(error)}") from error
        pushed = await asyncio.to_thread(weights_fingerprint, folder)
        if partial:  # the rest is what it was
            pushed = hashlib.blake2b(f"{self._info.fingerprint}{pushed}".encode(), digest_size=8).hexdigest()
        self._info = replace(self._info, fingerprint=pushed)

    async def join(self, init: dict[str, Any], replica: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._check(dict(shapes), partial=False)
        try:
            await self.engine.collective_rpc("llmdistill_join", args=(json.dumps(init), replica))
        except Exception as error:
            raise ValueError(f"vLLM cannot join the trainer: {first_line(error)}") from error

    async def receive(self, update: dict[str, Any]) -> None:
        try:
            found = await self.engine.collective_rpc("llmdistill_receive", args=(json.dumps(update),))
            await self._forget_prefixes()
        except Exception as error:  # some weights may be in
            raise EngineDead(f"the trainer's weights did not come whole: {first_line(error)}") from error
        self._info = replace(self._info, fingerprint=found[0])

    async def _forget_prefixes(self) -> None:
        """What the prefix cache holds was computed with the old weights. vLLM says no while a block of it is in use, as
        by a request that was just cancelled.

        Raises:
            RuntimeError: it keeps saying no. Samples of new weights behind old prefixes would look like any others.
        """
        for _ in range(RESETS):
            if await self.engine.reset_prefix_cache():
                return
            await asyncio.sleep(RESET_S)
        raise RuntimeError("vLLM does not let go of the prefix cache of the old weights")

    def check_adapter(self, folder: Path) -> None:
        check_adapter(folder, self._shapes, self.max_lora_rank)

    async def add_adapter(self, name: str, folder: Path) -> None:
        from vllm.lora.request import LoRARequest

        request = LoRARequest(name, next(self._numbers), str(folder))
        with _death_is_named():
            await self.engine.add_lora(request)
        old, self._lora[name], self.adapters[name] = self._lora.get(name), request, str(folder)
        if old is not None:
            await self._remove(old)

    async def remove_adapter(self, name: str) -> None:
        del self.adapters[name]
        await self._remove(self._lora.pop(name))

    async def _remove(self, lora: Any) -> None:
        """A request that still runs would have vLLM read its files again."""
        await self._uses.ended(lora.lora_int_id)
        with _death_is_named():
            await self.engine.remove_lora(lora.lora_int_id)

    async def close(self) -> None:
        self.engine.shutdown()

    def _check(self, found: dict[str, tuple[int, ...]], partial: bool) -> None:
        """Refuses weights that do not fit before any of them is loaded."""
        wrong = [name for name, shape in found.items() if self._shapes.get(name, shape) != shape]
        twice = {"lm_head.weight"} if self._tied else set()  # the same matrix as the embeddings: once is enough
        unknown = sorted(set(found) - set(self._shapes) - twice)
        missing = [] if partial else sorted(set(self._shapes) - set(found) - twice)
        if self._shapes and (wrong or unknown or missing or not found):
            what = f"of another shape: {wrong[:3]}" if wrong else f"unknown: {unknown[:3]}, missing: {missing[:3]}"
            raise ValueError(f"the weights do not fit the model; {what}")


def bounds(info: TeacherInfo, max_top_k: int, max_model_len: int | None) -> tuple[int, int]:
    """Tokens listed at a position and tokens of a sequence, at most, of what is asked for and the model has."""
    return min(max_top_k, info.vocab_size), min(max_model_len or info.context_length, info.context_length)


def settings_of_vllm(
    info: TeacherInfo,
    *,
    max_top_k: int,
    max_model_len: int | None,
    kv_cache_gib: float,
    gpu_memory_utilization: float,
    max_lora_rank: int,
    max_adapters: int,
    transfer: str,
    **options: Any,
) -> dict[str, Any]:
    """Of :func:`~llmdistill.compat.vllm.async_arguments`, from those of :class:`AsyncVLLMEngine`."""
    vocab = info.vocab_size
    listed, longest = bounds(info, max_top_k, max_model_len)
    if max_lora_rank:
        # all of them in CPU memory, and room for the next one of a name before the last one goes
        options |= {"enable_lora": True, "max_lora_rank": max_lora_rank}
        options |= {"max_loras": min(max_adapters, GPU_ADAPTERS), "max_cpu_loras": max_adapters + 1}
    if budget := options.get("max_num_batched_tokens"):
        free = free_bytes(gpu_memory_utilization)
        options["max_num_batched_tokens"] = step_tokens(budget, free, listed, vocab)
    return {
        "seed": 0,
        # vLLM insists on generating a token after what it scores
        "max_model_len": longest + 1,
        "max_logprobs": -1 if listed == vocab else listed,
        "kv_cache_bytes": int(kv_cache_gib * (1 << 30)),
        "gpu_memory_utilization": gpu_memory_utilization,
        "transfer": BACKENDS[transfer] if transfer else "",
        **options,
    }


def shared_arguments(model_path: str, *, trust_remote_code: bool = False, **settings: Any) -> Any:
    """vLLM's arguments of an engine that several processes ask, each by a seat at it. Args as of
    :class:`AsyncVLLMEngine`, all of them.

    Raises:
        UserError: as there.
    """
    info, _ = describe(model_path, trust_remote_code)
    return async_arguments(model_path, **settings_of_vllm(info, trust_remote_code=trust_remote_code, **settings))


@contextmanager
def _death_is_named() -> Iterator[None]:
    """The engine's end, whatever vLLM calls it, as :class:`EngineDead`."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EngineDead("vLLM's engine process has died") from error
