"""The service: from a body to the engine and back. The protocol is in :mod:`llmdistill.wire.protocol`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import Request
from safetensors import SafetensorError, safe_open

from llmdistill.service import requests as bodies
from llmdistill.service.answers import Answer, Answers
from llmdistill.service.engine import Engine, GenerateJob, Sample, ScoreJob
from llmdistill.service.gate import Gate
from llmdistill.service.limits import Limits
from llmdistill.service.metrics import Metrics
from llmdistill.service.problems import Problem, first_line, invalid
from llmdistill.service.text import template_of, tokenized
from llmdistill.teachers.fingerprint import weights_fingerprint
from llmdistill.wire import protocol
from llmdistill.wire.blocks import ScoreBlock, encode

REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
Work = Callable[[], Awaitable[Answer]]
UPLOADS = "llmdistill-weights-"


class Service:
    """One engine, its queue, and what it remembers.

    Args:
        token: what callers have to show; None: nothing.
        weight_folders: where weights and adapters may be read from.
        accept_weights: whether weights may be uploaded.
        on_dead: called once when the engine will not answer any more.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits | None = None,
        *,
        token: str | None = None,
        weight_folders: Sequence[Path] = (),
        accept_weights: bool = False,
        on_dead: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine, self.limits, self.token = engine, limits or Limits(), token
        self.weight_folders, self.accept_weights, self.on_dead = list(weight_folders), accept_weights, on_dead
        self.gate = Gate(self.limits)
        self.answers = Answers(self.limits.answers_bytes, self.limits.answers_s)
        self.metrics = Metrics()
        self.bodies = bodies.Bodies(self.limits)
        self.policy_version = 0
        self.dead = False
        self._last_push: tuple[bool, int, str] | None = None
        self._uploading = asyncio.Lock()
        self._reading = asyncio.Semaphore(2)  # bodies that are parsed at one time

    # ---------------------------------------------------------------- what is computed
    #
    # Each of these reads a body, which happens on a thread, and returns what is to be done about it.

    def score(self, data: bytes) -> Work:
        body = bodies.read(bodies.ScoreBody, data)
        jobs = bodies.score_jobs(body, self.engine, self.limits)
        return partial(self._blocks, jobs, body.dtype, body.teacher, {})

    def score_text(self, data: bytes) -> Work:
        body = bodies.read(bodies.TextBody, data)
        bodies.check_texts(body, self.limits)
        template = template_of(self.engine.tokenizer, body.chat_template_kwargs)
        items = [tokenized(template, i, item) for i, item in enumerate(body.items)]
        score = bodies.ScoreBody(
            sequences=[item.prompt_ids + item.ids for item in items],
            positions=[(len(item.prompt_ids), len(item.prompt_ids) + len(item.ids)) for item in items],
            top_k=body.top_k,
        )
        jobs = bodies.score_jobs(score, self.engine, self.limits)
        return partial(self._blocks, jobs, body.dtype, body.teacher, {"items": [asdict(item) for item in items]})

    async def _blocks(self, jobs: list[ScoreJob], dtype: str, expected: str | None, extra: dict[str, Any]) -> Answer:
        listed = sum(job.chosen.numel() for job in jobs if job.chosen is not None)
        async with self.gate.admitted(sum(job.stop for job in jobs) + listed // 4):
            self._expect(expected)
            blocks = await self.engine.score(jobs)
            info, version = self.engine.info, self.policy_version
        positions = sum(job.stop - job.start for job in jobs)
        head = {
            "protocol": protocol.PROTOCOL_VERSION,
            "teacher": info.fingerprint,
            "tokenizer": info.tokenizer,
            "policy_version": version,
            "positions": positions,
            **extra,
        }
        data = await asyncio.to_thread(_packed, head, blocks, dtype)
        self.metrics.positions.inc(positions)
        self.metrics.evidence.inc(len(data))
        return Answer(data, protocol.BLOCKS_TYPE)

    def generate(self, data: bytes) -> Work:
        body = bodies.read(bodies.GenerateBody, data)
        return partial(self._generated, bodies.generate_job(body, self.engine, self.limits), body.teacher)

    async def _generated(self, job: GenerateJob, expected: str | None) -> Answer:
        drawn, fingerprint, version = await self.samples(job, expected)
        completions = [[asdict(sample) for sample in samples] for samples in drawn]
        return _json({"teacher": fingerprint, "policy_version": version, "completions": completions})

    async def samples(self, job: GenerateJob, expected: str | None = None) -> tuple[list[list[Sample]], str, int]:
        """Samples of every prompt, and the fingerprint and version of the weights that drew them."""
        n = job.sampling.samples_per_prompt
        async with self.gate.admitted(sum(n * (len(ids) + job.sampling.max_new_tokens) for ids in job.prompts)):
            self._expect(expected)
            bodies.known_adapter(job.adapter, self.engine)  # it may have gone while the request waited
            drawn = await self.engine.generate(job)
            fingerprint, version = self.engine.info.fingerprint, self.policy_version
        self.metrics.generated.inc(sum(len(sample.ids) for samples in drawn for sample in samples))
        return drawn, fingerprint, version

    # ---------------------------------------------------------------- weights and adapters

    def load_folder(self, data: bytes) -> Work:
        self._accepts_weights()
        body = bodies.read(bodies.WeightsBody, data)
        folder = bodies.allowed_folder(body.path, self.weight_folders)
        _check_files(folder)
        return partial(self._load, folder, False, body.policy_version, weights_fingerprint(folder))

    async def load_upload(self, request: Request) -> Answer:
        """Weights in the body: written to memory-backed files as they come, then loaded at once."""
        self._accepts_weights()
        query = request.query_params
        version, partial_ = query.get("policy_version", ""), query.get("partial", "false") in ("true", "1")
        if not (version.isdecimal() and len(version) < 17 and int(version) < bodies.LARGEST):
            raise invalid("policy_version", f"is {version[:40]!r}; it must be a whole number below 2**53")
        most = self.engine.weights_bytes * 5 // 4 + (1 << 20)
        async with self._uploading:  # one at a time: each is as large as the model
            folder = Path(tempfile.mkdtemp(prefix=f"{UPLOADS}{os.getpid()}-", dir=_upload_root()))
            try:
                digest, received = hashlib.blake2b(digest_size=16), 0
                with (folder / "model.safetensors").open("wb") as file:
                    async for chunk in request.stream():
                        received += len(chunk)
                        if received > most:
                            raise bodies.too_large(most)
                        digest.update(chunk)
                        file.write(chunk)
                _check_files(folder)
                return await self._load(folder, partial_, int(version), digest.hexdigest())
            except OSError as error:
                raise Problem(507, "storage", f"no room for the weights: {first_line(error)}") from None
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    async def _load(self, folder: Path, partial_: bool, version: int, name: str) -> Answer:
        """The same weights sent again for the same version are there already: a lost answer does no harm."""
        async with self.gate.alone():
            push = (partial_, version, name)
            if push != self._last_push:
                try:
                    await self.engine.load_weights(folder, partial_)
                except (ValueError, OSError) as error:
                    raise invalid("weights", f"were refused, the old ones stay: {first_line(error)}") from None
                self.policy_version, self._last_push = version, push
            return _json({"teacher": self.engine.info.fingerprint, "policy_version": version})

    def add_adapter(self, data: bytes) -> Work:
        body = bodies.read(bodies.AdapterBody, data)
        return partial(self._add_adapter, body.name, bodies.allowed_folder(body.path, self.weight_folders))

    async def _add_adapter(self, name: str, folder: Path) -> Answer:
        async with self.gate.alone():
            try:
                await self.engine.add_adapter(name, folder)
            except (ValueError, OSError) as error:
                raise invalid("path", f"holds no adapter for this model: {first_line(error)}") from None
            return _json({"adapters": list(self.engine.adapters)})

    async def remove_adapter(self, name: str) -> Answer:
        async with self.gate.alone():
            bodies.known_adapter(name, self.engine)
            await self.engine.remove_adapter(name)
            return _json({"adapters": list(self.engine.adapters)})

    def _accepts_weights(self) -> None:
        if not self.accept_weights:
            raise Problem(403, "weights", "this service takes no weights; start it with --updatable")

    # ---------------------------------------------------------------- a request

    async def answered(self, request: Request, path: str, read: Callable[[bytes], Work]) -> Answer:
        """The answer to a request whose body ``read`` understands; it is not held while that is worked out.

        Raises:
            Problem: whatever is wrong with it.
        """
        name = request.headers.get("x-request-id")
        if name is not None and not REQUEST_ID.fullmatch(name):
            raise invalid("X-Request-Id", "must be 1 to 128 letters, digits or _.:-")
        async with self.bodies.read(request) as data:
            # the path is part of what is asked
            digest = hashlib.blake2b(path.encode() + b"\0", digest_size=16)
            async with self._reading:
                await asyncio.to_thread(digest.update, data)
                try:
                    work = await asyncio.to_thread(read, data)
                finally:
                    del data
        return await self.answers.get(name, digest.digest(), work)

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
            "policy_version": self.policy_version,
            "chosen_ids": engine.chosen_ids,
            "weights": self.accept_weights,
            "adapters": list(engine.adapters),
            "limits": {
                "top_k": min(limits.top_k, engine.max_top_k),
                "sequence_tokens": min(limits.sequence_tokens, engine.max_model_len),
                "sequences": limits.sequences,
                "positions": limits.positions,
                "new_tokens": limits.new_tokens,
                "body_bytes": limits.body_bytes,
                "in_flight": limits.in_flight,
            },
        }

    def exposition(self) -> bytes:
        """The metrics as they are now."""
        m, gate = self.metrics, self.gate
        m.in_house.set(gate.requests)
        m.tokens.set(gate.tokens)
        m.version.set(self.policy_version)
        m.replayed.set(self.answers.replayed)
        m.kept.set(self.answers.bytes)
        return m.text()

    def died(self) -> None:
        if not self.dead:
            self.dead = True
            self.on_dead()

    def _expect(self, fingerprint: str | None) -> None:
        mine = self.engine.info.fingerprint
        if fingerprint is not None and fingerprint != mine:
            raise Problem(
                409,
                "fingerprint",
                f"the request expects weights {fingerprint}; here are {mine}",
                field="teacher",
            )


def forget_uploads() -> None:
    """Removes what services that were killed in the middle of an upload have left."""
    for folder in (Path(_upload_root() or tempfile.gettempdir())).glob(f"{UPLOADS}*"):
        pid = folder.name.removeprefix(UPLOADS).split("-")[0]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _upload_root() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _check_files(folder: Path) -> None:
    """Refuses what is no safetensors file before the engine hears of it."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise invalid("weights", f"are missing: no safetensors files in {folder.name!r}")
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise invalid("weights", f"were refused, the old ones stay: no safetensors file: {error}") from None


def _packed(head: dict[str, Any], blocks: Sequence[ScoreBlock], dtype: str) -> bytes:
    return protocol.pack_frames([json.dumps(head).encode(), *(encode(block, dtype) for block in blocks)])


def _json(content: dict[str, Any]) -> Answer:
    return Answer(json.dumps(content).encode(), "application/json")
