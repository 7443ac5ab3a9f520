"""New weights on their way into the engine: offered, then read from a folder or from the body of a request."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import Request
from safetensors import SafetensorError, safe_open

from llmdistill.errors import UserError
from llmdistill.service import requests as bodies
from llmdistill.service.bodies import too_large
from llmdistill.service.engine import Engine, EngineDead
from llmdistill.service.gate import Gate
from llmdistill.service.limits import Limits
from llmdistill.service.problems import Problem, first_line, invalid
from llmdistill.service.remote_gate import RemoteGate
from llmdistill.service.uploads import Uploads, no_room, written
from llmdistill.service.versions import Version, Versions
from llmdistill.teachers.fingerprint import weights_fingerprint

Told = dict[str, Any]
LEASE_S = 60.0  # for a trainer to begin what it was let to
TRANSFER_S = 600.0  # for all weights to come from a trainer


@dataclass(frozen=True)
class Push:
    """Which weights are in the engine: a push of the same is nothing new."""

    partial: bool
    version: int
    digest: str


@dataclass
class _Session:
    """A push by a trainer to the engine itself."""

    push: Push
    begun: asyncio.Future[None]  # nothing else is at work
    update: asyncio.Future[dict[str, Any]]  # what will be sent
    work: asyncio.Task[Told] = field(init=False)


class Weights:
    """Changes the engine's weights while nothing else is at work.

    Args:
        folders: weights may be read from these.
        accepts: whether the service takes any.
        versions: where pushed ones are shared with other replicas; None: this one stands alone.
    """

    def __init__(
        self,
        engine: Engine,
        gate: Gate | RemoteGate,
        limits: Limits,
        uploads: Uploads,
        folders: list[Path],
        accepts: bool,
        versions: Versions | None = None,
    ) -> None:
        self.engine, self.gate, self.limits, self.uploads = engine, gate, limits, uploads
        self.folders, self.accepts, self.versions = folders, accepts, versions
        self.partial = versions is None  # a version is whole: a replica may come from any other
        self._number = 0  # of the version that is in the engine
        self._fetching = asyncio.Lock()
        self.behind = False  # a later version is there
        self.policy_version = 0
        self._last: Push | None = None
        self._uploading = asyncio.Lock()
        self._session: _Session | None = None  # the last push of a trainer to the engine
        self.group: str | None = None  # of the trainer that sends to the engine
        self.died: Callable[[], None] = lambda: None
        self._offered: dict[str, asyncio.Event] = {}  # set when the one who was told to push has, or has not

    def offer(self, data: bytes) -> Callable[[], Awaitable[Told]]:
        """Whether a push is needed. To the first who asks: yes; others wait for what becomes of it.

        Raises:
            Problem: 400, 403.
        """
        self.check(False)
        body = bodies.read(bodies.OfferBody, data)
        return lambda: self._offer(body.digest, body.policy_version)

    async def _offer(self, digest: str, version: int) -> Told:
        while True:
            if self._last is not None and (self._last.digest, self._last.version) == (digest, version):
                return {"needed": False, **self._told()}
            newest = await self.look()
            if newest is not None and (newest.digest, newest.policy_version) == (digest, version):
                await self.fetch()
                continue
            under_way = self._offered.get(digest)
            if under_way is None:
                ended = self._offered[digest] = asyncio.Event()
                # one who says that it will push, and does not, keeps nobody else waiting for long
                asyncio.get_running_loop().call_later(self.limits.silence_s, self._lapse, digest, ended)
                return {"needed": True}
            await under_way.wait()

    def _lapse(self, digest: str, ended: asyncio.Event) -> None:
        if self._offered.get(digest) is not ended:
            return
        if self._uploading.locked():  # it may be that one, or stand behind another
            asyncio.get_running_loop().call_later(self.limits.silence_s, self._lapse, digest, ended)
        else:
            self._end(digest)

    def _end(self, digest: str) -> None:
        if ended := self._offered.pop(digest, None):
            ended.set()

    @asynccontextmanager
    async def _pushing(self, digest: str | None) -> AsyncIterator[None]:
        try:
            async with self._uploading:  # one at a time: each is as large as the model
                yield
        finally:
            if digest is not None:
                self._end(digest)

    def from_folder(self, data: bytes) -> Callable[[], Awaitable[Told]]:
        """Weights in files that the service can read.

        Raises:
            Problem: 400, 403.
        """
        self.check(False)
        body = bodies.read(bodies.WeightsBody, data)
        folder = bodies.allowed_folder(body.path, self.folders)
        check_files(folder)
        digest = body.digest or weights_fingerprint(folder)

        async def load() -> Told:
            async with self._pushing(digest):
                return await self._load(folder, Push(False, body.policy_version, digest))

        return load

    async def from_body(self, request: Request) -> Told:
        """Weights in the body: written to files as they come, then loaded at once.

        Raises:
            Problem: 400, 403, 408, 413, 507.
        """
        query = request.query_params
        version, partial, digest = query.get("policy_version", ""), query.get("partial", "false"), query.get("digest")
        self.check(partial in ("true", "1"))
        if not (version.isdecimal() and len(version) < 17 and int(version) < bodies.LARGEST):
            raise invalid("policy_version", f"is {version[:40]!r}; it must be a whole number below 2**53")
        if digest is not None and not re.fullmatch(bodies.DIGEST, digest):
            raise invalid("digest", f"is {digest[:40]!r}; it must match {bodies.DIGEST}")
        most = self.engine.weights_bytes * 5 // 4 + (1 << 20)
        declared = request.headers.get("content-length", "")
        size = int(declared[:20]) if declared.isdecimal() else 0
        if size > most:
            raise too_large(most)
        async with self._pushing(digest):
            with self.uploads.folder(size) as folder:
                stream = aiter(request.stream())
                found = await written(stream, folder / "model.safetensors", most, self.limits.silence_s)
                await asyncio.to_thread(check_files, folder)
                return await self._load(folder, Push(partial in ("true", "1"), int(version), digest or found))

    # ---------------------------------------------------------------- weights that a trainer sends to the engine itself

    def transfer(self) -> dict[str, Any] | None:
        """How that may be done; None where it may not."""
        if not (self.accepts and self.versions is None and self.engine.transfer):
            return None
        return {"backend": self.engine.transfer, "workers": self.engine.workers, "group": self.group}

    def join(self, data: bytes) -> Callable[[], Awaitable[Told]]:
        """The engine joins a trainer.

        Raises:
            Problem: 400, 403.
        """
        self.check(False)
        body, offered = bodies.read(bodies.JoinBody, data), self.transfer()
        if offered is None or offered["backend"] != body.backend:
            there = "over HTTP only" if offered is None else f"by {offered['backend']}"
            raise invalid("backend", f"is {body.backend[:20]!r}; this service takes weights {there} (--transfer)")
        shapes = {name: tuple(shape) for name, shape in body.shapes.items()}

        async def join() -> Told:
            async with self.gate.alone():
                self.group = None
                try:
                    async with asyncio.timeout(TRANSFER_S):
                        await self.engine.join(body.init, body.replica, shapes)
                except ValueError as error:
                    raise invalid("init", f"was refused: {first_line(error)}") from None
                except (TimeoutError, asyncio.CancelledError) as error:
                    raise self._half(error) from None
                self.group = body.group
            return {"group": self.group}

        return join

    def receive(self, data: bytes) -> Callable[[], Awaitable[Told]]:
        """The engine takes what its trainer sends. That is asked twice: whether it may be sent, and with what it is; in
        between nothing is at work, for a while.

        Raises:
            Problem: 400, 403; 409, of another trainer.
        """
        self.check(False)
        body = bodies.read(bodies.ReceiveBody, data)
        return partial(self._begun, body) if body.update is None else partial(self._received, body, body.update)

    async def _begun(self, body: bodies.ReceiveBody) -> Told:
        if body.group != self.group:
            raise Problem(409, "group", f"the engine is in no group {body.group!r} now", field="group")
        session = self._session
        if session is None or session.push.digest != body.digest:
            if session is not None and not session.work.done():
                raise Problem(409, "group", "another push is under way", field="digest")
            loop = asyncio.get_running_loop()
            push = Push(False, body.policy_version, body.digest)
            session = self._session = _Session(push, loop.create_future(), loop.create_future())
            session.work = loop.create_task(self._taken(session, body.group))
        await asyncio.wait((session.begun, session.work), return_when=asyncio.FIRST_COMPLETED)
        if session.work.done():
            session.work.result()
        return {"group": self.group}

    async def _received(self, body: bodies.ReceiveBody, update: dict[str, Any]) -> Told:
        session = self._session
        if session is None or session.push.digest != body.digest:
            raise Problem(409, "group", f"no push {body.digest!r} was begun", field="digest")
        if not session.update.done():
            session.update.set_result(update)
        return await session.work  # a caller who has gone for good ends it

    async def _taken(self, session: _Session, group: str) -> Told:
        async with self.gate.alone():
            session.begun.set_result(None)
            try:
                async with asyncio.timeout(LEASE_S):
                    update = await session.update
            except TimeoutError:
                raise Problem(409, "group", f"the trainer sent nothing for {LEASE_S:g} s", field="group") from None
            self.group = None  # whatever happens meanwhile ends it
            try:
                async with asyncio.timeout(TRANSFER_S):
                    await self.engine.receive(update)
            except (TimeoutError, asyncio.CancelledError) as error:
                raise self._half(error) from None
            self.policy_version, self._last, self.group = session.push.version, session.push, group
            return self._told()

    def _half(self, error: BaseException) -> EngineDead:
        """A worker that waits for a trainer cannot be called back: the process has to be started again."""
        self.died()
        why = f"nothing came in {TRANSFER_S:g} s" if isinstance(error, TimeoutError) else "its caller has gone"
        return EngineDead(f"weights were to come from a trainer, and {why}")

    def check(self, partial: bool) -> None:
        """Raises Problem: 403, no weights are taken; 400, no part of them."""
        if not self.accepts:
            raise Problem(403, "weights", "this service takes no weights; start it with --updatable")
        if partial and not (self.partial and self.engine.partial_weights):
            raise Problem(
                400,
                "partial_weights",
                "this engine takes complete sets of weights only (see /v1/info)",
                field="partial",
            )

    async def _load(self, folder: Path, push: Push) -> Told:
        """The same weights sent again for the same version are there already: a lost answer does no harm."""
        async with self.gate.alone():
            if push != self._last:
                try:
                    await self.engine.load_weights(folder, push.partial)
                except (ValueError, OSError) as error:
                    raise invalid("weights", f"were refused, the old ones stay: {first_line(error)}") from None
                if self.versions is not None:
                    told = folder, push.version, push.digest, self.engine.info.fingerprint
                    try:
                        self._number = (await asyncio.to_thread(self.versions.publish, *told)).number
                    except OSError as error:
                        raise no_room(first_line(error)) from None
                self.policy_version, self._last = push.version, push
            return self._told()

    # ---------------------------------------------------------------- what other processes put into the same engine

    def state(self) -> dict[str, Any]:
        """What they have to know of the weights that are in it."""
        return {**self._told(), "push": asdict(self._last) if self._last else None}

    def adopt(self, state: dict[str, Any]) -> None:
        """What another one has told."""
        self.policy_version = state["policy_version"]
        self._last = Push(**state["push"]) if state["push"] else None

    # ---------------------------------------------------------------- versions that other replicas took

    async def look(self) -> Version | None:
        """The newest version there is. While it is not in the engine, the service is not ready."""
        if self.versions is None:
            return None
        newest = await asyncio.to_thread(self.versions.latest)
        if newest is not None and newest.number > self._number:
            self.behind = True
        return newest

    async def fetch(self) -> None:
        """Loads the newest version, unless it is in the engine.

        Raises:
            UserError: it does not fit this replica's model.
        """
        async with self._fetching:
            newest = await self.look()
            if newest is None or newest.number <= self._number:
                self.behind = False
                return
            assert self.versions is not None
            async with self.gate.alone():
                if self._number < newest.number:  # no push has come before
                    await self._take(newest, self.versions.path(newest))
            self.behind = False

    async def _take(self, version: Version, folder: Path) -> None:
        try:
            await self.engine.load_weights(folder, False)
        except (ValueError, OSError) as error:
            if not folder.is_dir():  # so long that two others have come: the next look finds them
                return
            raise UserError(self._unlike(version, first_line(error))) from None
        if (found := self.engine.info.fingerprint) != version.teacher:
            raise UserError(self._unlike(version, f"they are {found} here and {version.teacher} there"))
        self._number, self.policy_version = version.number, version.policy_version
        self._last = Push(False, version.policy_version, version.digest)

    def _unlike(self, version: Version, why: str) -> str:
        assert self.versions is not None
        return (
            f"--versions {self.versions.folder} holds weights (version {version.number}) that another replica took and "
            f"this one does not: {why}. Fix: start all replicas with one checkpoint, engine and dtype; an empty folder "
            "for another model."
        )

    def _told(self) -> Told:
        return {"teacher": self.engine.info.fingerprint, "policy_version": self.policy_version}


def check_files(folder: Path) -> None:
    """Refuses what is no safetensors file before the engine hears of it.

    Raises:
        Problem: 400.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise invalid("weights", f"are missing: no safetensors files in {folder.name!r}")
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise invalid("weights", f"were refused, the old ones stay: no safetensors file: {error}") from None
