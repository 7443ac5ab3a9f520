"""The service: from a body to the engine and back. The protocol is in :mod:`llmdistill.wire.protocol`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import Request
from prometheus_client import CollectorRegistry, generate_latest

from llmdistill.service import requests as bodies
from llmdistill.service.adapters import Adapters
from llmdistill.service.answers import Answer, Answers, Work, Writing
from llmdistill.service.block_writer import BlockWriter
from llmdistill.service.bodies import Bodies, content_type
from llmdistill.service.engine import Engine, EngineDead, Evidence, GenerateJob, Sample, ScoreJob, Told, cancelling
from llmdistill.service.gate import Gate
from llmdistill.service.gone import unless_gone
from llmdistill.service.lengths import Lengths
from llmdistill.service.limits import Limits
from llmdistill.service.metrics import Metrics, engine_metrics
from llmdistill.service.parts import Parts
from llmdistill.service.problems import Problem, first_line, invalid
from llmdistill.service.remote_gate import RemoteGate
from llmdistill.service.text import TokenizedText, template_of, tokenized
from llmdistill.service.uploads import Uploads
from llmdistill.service.versions import Versions
from llmdistill.service.weights import Weights
from llmdistill.wire import protocol
from llmdistill.wire.blocks import ScoreBlock
from llmdistill.wire.bodies import Sequences, pack_completions
from llmdistill.wire.hidden import pack_head
from llmdistill.wire.tokens import secrets_of

REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
COMING_S = 0.5  # until a replica may have loaded what another one has
Beside = Callable[[Coroutine[Any, Any, list[list[Sample]]]], Awaitable[list[list[Sample]]]]
Read = Callable[[bytes, str], Work]  # of a body and its content type, on a thread


class Service:
    """One engine, its queue, and what it remembers.

    Args:
        token: one or several (:mod:`llmdistill.wire.tokens`) of which callers have to show one; None: nothing.
        weight_folders: where weights and adapters may be read from.
        accept_weights: whether weights may be uploaded.
        upload_folder: where they are written to on their way; None: memory.
        versions: where they are shared with other replicas; None: with none.
        on_dead: called once when the engine will not answer any more.
        gate: of several processes with one engine; None: its own.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits | None = None,
        *,
        token: str | None = None,
        weight_folders: Sequence[Path] = (),
        accept_weights: bool = False,
        upload_folder: Path | None = None,
        versions: Path | None = None,
        on_dead: Callable[[], None] = lambda: None,
        gate: Gate | RemoteGate | None = None,
    ) -> None:
        self.engine, self.limits, self.secrets = engine, limits or Limits(), secrets_of(token)
        self.on_dead, self.dead = on_dead, False
        self.gate = gate or Gate(self.limits, lambda: engine.capacity_tokens)
        self.lengths = Lengths()
        self.answers = Answers(self.limits.answers_bytes, self.limits.answers_s, self.limits.abandoned_s)
        self.metrics = Metrics()
        self.all_metrics: Callable[[], Awaitable[bytes]] = self._own_metrics
        self.bodies = Bodies(self.limits)
        self.uploads = Uploads(upload_folder)
        shared = Versions(versions) if versions is not None else None
        folders = list(weight_folders)
        self.weights = Weights(engine, self.gate, self.limits, self.uploads, folders, accept_weights, shared)
        self.weights.died = self.died
        self.adapters, self._changing_adapters = Adapters(self.uploads), asyncio.Lock()

    # ---------------------------------------------------------------- what is computed
    #
    # Each of these reads a body, which happens on a thread, and returns what is to be done about it.

    def score(self, data: bytes, kind: str) -> Work:
        asked, dtype, teacher = bodies.score_request(data, kind, self.limits)
        jobs = bodies.score_jobs(asked, self.engine, self.limits)
        return Writing(protocol.BLOCKS_TYPE, partial(self._blocks, jobs, dtype, teacher, None))

    def score_text(self, data: bytes, kind: str) -> Work:
        body = bodies.read(bodies.TextBody, data)
        bodies.check_texts(body, self.limits)
        template = template_of(self.engine.tokenizer, body.chat_template_kwargs)
        items = [tokenized(template, i, item) for i, item in enumerate(body.items)]
        spans = [(len(item.prompt_ids), len(item.prompt_ids) + len(item.ids)) for item in items]
        asked = Sequences(
            {"top_k": body.top_k},
            [np.asarray(item.prompt_ids + item.ids, np.int32) for item in items],
            np.asarray(spans, np.int64),
        )
        jobs = bodies.score_jobs(asked, self.engine, self.limits)
        return Writing(protocol.BLOCKS_TYPE, partial(self._blocks, jobs, body.dtype, body.teacher, items))

    async def _blocks(
        self,
        jobs: list[ScoreJob],
        dtype: str,
        expected: str | None,
        texts: Sequence[TokenizedText] | None,
        parts: Parts,
    ) -> None:
        """Writes the blocks in their order, each as soon as it and those before it are there."""

        def head() -> bytes:
            about = {
                "protocol": protocol.PROTOCOL_VERSION,
                "teacher": self.engine.info.fingerprint,
                "tokenizer": self.engine.info.tokenizer,
                "policy_version": self.weights.policy_version,
                "positions": sum(job.stop - job.start for job in jobs),
            }
            if texts is None:
                return json.dumps(about).encode()
            return _with(about, "items", [json.dumps(asdict(text)) for text in texts]).encode()

        writer = BlockWriter(len(jobs), dtype, head, parts)
        await self._scored(jobs, expected, writer)
        self.metrics.evidence.inc(parts.bytes)

    async def _scored(
        self, jobs: list[ScoreJob], expected: str | None, writer: BlockWriter | None = None
    ) -> list[Evidence]:
        """Evidence, of weights that do not change meanwhile."""
        listed = sum(job.chosen.numel() for job in jobs if job.chosen is not None)
        async with self.gate.admitted(sum(job.stop for job in jobs) + listed // 4):
            await self._expect(expected)
            try:
                if writer is None:
                    blocks = await self.engine.score(jobs)
                else:
                    async with cancelling() as group:
                        group.create_task(writer.write())
                        blocks = await self.engine.score(jobs, writer.add)
            except EngineDead:
                self.died()  # an answer that has begun to go out cannot say so
                raise
        self.metrics.positions.inc(sum(job.stop - job.start for job in jobs))
        return blocks

    async def scored(self, jobs: list[ScoreJob], expected: str) -> list[ScoreBlock]:
        """What the weights of that fingerprint say of the sequences.

        Raises:
            Problem: 409, there are others now.
        """
        found = await self._scored(jobs, expected)
        return [block for block in found if isinstance(block, ScoreBlock)]

    def generate(self, data: bytes, kind: str) -> Work:
        asked, body = bodies.generate_request(data, kind)
        job = bodies.generate_job(asked, body, self.engine, self.limits)
        return partial(self._generated, job, body.teacher, kind == protocol.IDS_TYPE)

    async def _generated(self, job: GenerateJob, expected: str | None, as_bytes: bool) -> Answer:
        drawn, fingerprint, version = await self.samples(job, expected)
        head = {"teacher": fingerprint, "policy_version": version}
        return await asyncio.to_thread(_drawn, head, drawn, as_bytes)

    async def samples(
        self, job: GenerateJob, expected: str | None = None, told: Told | None = None, beside: Beside | None = None
    ) -> tuple[list[list[Sample]], str, int]:
        """Samples of every prompt, and the fingerprint and version of the weights that drew them.

        Args:
            told: hears of them as they grow.
            beside: awaits them and asks the same weights about them meanwhile.
        """
        n, each = job.sampling.samples_per_prompt, self.lengths.expected(job.sampling.max_new_tokens)
        read = n * sum(map(len, job.prompts))
        async with self.gate.admitted(read + n * len(job.prompts) * each) as place:
            await self._expect(expected)
            bodies.known_adapter(job.adapter, self.engine)  # it may have gone while the request waited
            try:
                drawing = self.engine.generate(job) if told is None else self.engine.generate(job, told)
                drawn = await (drawing if beside is None else beside(drawing))
            except EngineDead:
                self.died()  # an answer that has begun to go out cannot say so
                raise
            fingerprint, version = self.engine.info.fingerprint, self.weights.policy_version
            lengths = [len(sample.ids) for samples in drawn for sample in samples]
            place.used = read + sum(lengths)
        self.lengths.drawn(lengths)
        self.metrics.generated.inc(sum(lengths))
        return drawn, fingerprint, version

    # ---------------------------------------------------------------- weights and adapters

    def load_folder(self, data: bytes, kind: str) -> Work:
        return _as_json(self.weights.from_folder(data))

    async def load_upload(self, request: Request) -> Answer:
        return _json(await self.weights.from_body(request))

    def offer(self, data: bytes, kind: str) -> Work:
        return _as_json(self.weights.offer(data))

    def join(self, data: bytes, kind: str) -> Work:
        return _as_json(self.weights.join(data))

    def receive(self, data: bytes, kind: str) -> Work:
        return _as_json(self.weights.receive(data))

    def add_adapter(self, data: bytes, kind: str) -> Work:
        body = bodies.read(bodies.AdapterBody, data)
        folder = bodies.allowed_folder(body.path, self.weights.folders)
        return partial(self._add_adapter, body.name, folder)

    async def _add_adapter(self, name: str, folder: Path) -> Answer:
        """While requests are at work; those of an adapter that had the name end with that one."""
        async with self._changing_adapters, self.gate.beside():
            loaded, most = self.engine.adapters, self.limits.adapters
            if name not in loaded and len(loaded) >= most:
                words = f"{len(loaded)} are loaded ({', '.join(loaded)}), at most {most}; remove one (--max_adapters)"
                raise Problem(400, "limit", f"adapters: {words}", field="name", limit=most)
            try:
                copy = await asyncio.to_thread(self.adapters.copied, folder, self.engine)
                try:
                    await self.engine.add_adapter(name, copy.path)
                except BaseException:
                    copy.remove()
                    raise
            except ValueError as error:
                raise invalid("path", f"{folder.name!r} was refused: {first_line(error)}") from None
            self.adapters.keep(name, copy)
            return _json({"adapters": list(loaded)})

    async def remove_adapter(self, name: str) -> Answer:
        """Once its requests are done; new ones are refused at once. Of an id that is none: 404."""
        async with self._changing_adapters, self.gate.beside():
            bodies.known_adapter(name, self.engine)
            await self.engine.remove_adapter(name)
            self.adapters.drop(name)
            return _json({"adapters": list(self.engine.adapters)})

    def head(self, data: bytes, kind: str) -> Work:
        return self._head

    async def _head(self) -> Answer:
        """Of what is served now. The next to ask for the same is given it without it being read again."""
        head = await asyncio.to_thread(self.engine.head)
        if head is None:
            raise Problem(404, "head", "this engine gives no hidden states, so there is no output head for them")
        return Answer(await asyncio.to_thread(pack_head, head), protocol.TENSORS_TYPE)

    def _head_info(self) -> dict[str, Any] | None:
        head = self.engine.head()
        if head is None:
            return None
        size = head.weight.nbytes + (0 if head.bias is None else head.bias.nbytes)
        return {"fingerprint": head.fingerprint, "width": head.weight.shape[1], "bytes": size}

    # ---------------------------------------------------------------- a request

    async def answered(
        self, request: Request, path: str, read: Read, *, kept: bool = True, waits: bool = False
    ) -> Answer:
        """The answer to a request whose body ``read`` understands; it is not held while that is worked out.

        Args:
            kept: whether the answer is, for the same request again.
            waits: whether ``read`` looks into files.

        Raises:
            Problem: whatever is wrong with it.
        """
        name = request_id(request)
        self.answers.release([done for done in request.headers.get("x-request-done", "").split(",") if done])
        kind = content_type(request)

        def prepared(data: bytes) -> tuple[bytes, Work]:  # on a thread, unless it is small
            # path and kind are part of what is asked
            digest = hashlib.blake2b(f"{path}\0{kind}\0".encode(), digest_size=16)
            digest.update(data)
            return digest.digest(), read(data, kind)

        digest, work = await self.bodies.read(request, prepared, waits=waits)
        return await unless_gone(request, self.answers.get(name if kept else None, digest, work))

    # ---------------------------------------------------------------- state

    def info(self) -> dict[str, Any]:
        engine, limits, info = self.engine, self.limits, self.engine.info
        return {
            "protocol": protocol.PROTOCOL_VERSION,
            "name": info.name,
            "teacher": info.fingerprint,
            "tokenizer": info.tokenizer,
            "vocab_size": info.vocab_size,
            "eos_ids": list(info.eos_ids),
            "context_length": min(info.context_length, engine.max_model_len),
            "template": info.template,
            "engine": engine.kind,
            "dtype": engine.dtype,
            "policy_version": self.weights.policy_version,
            "chosen_ids": engine.chosen_ids,
            "weights": self.weights.accepts,
            "partial_weights": engine.partial_weights and self.weights.partial,
            "adapters": list(engine.adapters),
            "head": self._head_info(),
            "transfer": self.weights.transfer(),
            "limits": {
                "top_k": min(limits.top_k, engine.max_top_k),
                "sequence_tokens": min(limits.sequence_tokens, engine.max_model_len),
                "sequences": limits.sequences,
                "positions": limits.positions,
                "new_tokens": limits.new_tokens,
                "body_bytes": limits.body_bytes,
                "json_bytes": min(limits.json_bytes, limits.body_bytes),
                "in_flight": limits.in_flight,
                "adapters": limits.adapters,
            },
        }

    async def exposition(self) -> bytes:
        """The metrics as they are now, of all processes with this engine."""
        return await self.all_metrics() + engine_metrics()

    async def _own_metrics(self) -> bytes:
        return generate_latest(self.counted())

    def counted(self) -> CollectorRegistry:
        """This process's metrics as they are now."""
        m, gate = self.metrics, self.gate
        m.in_house.set(gate.requests)
        m.tokens.set(gate.tokens)
        m.waiting.set(gate.waiting)
        m.pushed_out.set(gate.pushed_out)
        m.version.set(self.weights.policy_version)
        m.given_up.set(self.answers.cancelled)
        m.replayed.set(self.answers.replayed)
        m.kept.set(self.answers.bytes)
        return m.now()

    def died(self) -> None:
        if not self.dead:
            self.dead = True
            self.on_dead()

    async def _expect(self, fingerprint: str | None) -> None:
        mine = self.engine.info.fingerprint
        if fingerprint is not None and fingerprint != mine:
            newest = await self.weights.look()
            coming = newest is not None and newest.teacher == fingerprint  # another replica has them already
            raise Problem(
                409,
                "version" if coming else "fingerprint",
                f"the request expects weights {fingerprint}; here are {mine}{', not for long' if coming else ''}",
                field="teacher",
                retry_after_s=COMING_S if coming else None,
            )


def request_id(request: Request) -> str | None:
    """Raises Problem 400 for one that is none."""
    name = request.headers.get("x-request-id")
    if name is not None and not REQUEST_ID.fullmatch(name):
        raise invalid("X-Request-Id", "must be 1 to 128 letters, digits or _.:-")
    return name


def _drawn(head: dict[str, Any], drawn: list[list[Sample]], as_bytes: bool) -> Answer:
    if as_bytes:
        flat = [sample for samples in drawn for sample in samples]
        columns = ([getattr(sample, name) for sample in flat] for name in ("ids", "logprobs", "finish"))
        return Answer(pack_completions(head, *columns), protocol.COMPLETIONS_TYPE)
    written = [f"[{', '.join(json.dumps(asdict(sample)) for sample in samples)}]" for samples in drawn]
    return Answer(_with(head, "completions", written).encode(), protocol.JSON_TYPE)


def _with(head: dict[str, Any], name: str, written: list[str]) -> str:
    """The object with one more list, whose entries are JSON already: one call that writes megabytes of it would keep
    the loop's thread from running."""
    return f'{json.dumps(head)[:-1]}, "{name}": [{", ".join(written)}]}}'


def _json(content: dict[str, Any]) -> Answer:
    return Answer(json.dumps(content).encode(), protocol.JSON_TYPE)


def _as_json(work: Callable[[], Awaitable[dict[str, Any]]]) -> Work:
    async def answered() -> Answer:
        return _json(await work())

    return answered
