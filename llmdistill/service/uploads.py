"""Folders that weights are written to on their way into the engine, and adapters are copied to while they are loaded.

Each is held by a lock on a file in it, which the kernel lets go of when the process ends, however that happens. What
nobody holds is what a killed service left, and is removed; another service's, in another container with process numbers
of its own but the same memory-backed disk, is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import io
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from llmdistill.service.problems import Problem, first_line

PREFIX, BEGUN = "llmdistill-weights-", "llmdistill-begun-"
PART_BYTES = 1 << 22  # that are hashed and written at a time, on a thread
SPARE_BYTES = 1 << 24  # left on the disk
FORGOTTEN_S = 3600.0  # until a folder that was made and never locked goes


class Uploads:
    """Where they are made.

    Args:
        root: None: memory, where the system has it, else its folder for temporary files.
    """

    def __init__(self, root: Path | None = None) -> None:
        shared = Path("/dev/shm")
        self.root = root or (shared if shared.is_dir() else Path(tempfile.gettempdir()))

    @contextmanager
    def folder(self, needed: int = 0) -> Iterator[Path]:
        """A folder of one's own, gone afterwards.

        Args:
            needed: bytes that will be written to it.

        Raises:
            Problem: 507, there is no room for them, or none at all.
        """
        made = self.held_folder(needed)
        try:
            yield made.path
        finally:
            made.remove()

    def held_folder(self, needed: int = 0) -> Held:
        """As :meth:`folder`, until it is removed."""
        try:
            if needed > (free := shutil.disk_usage(self.root).free - SPARE_BYTES):
                raise no_room(f"{needed} bytes are to come and {self.root} has {max(free, 0)} to spare")
            # locked before it has the name by which others look for what is left over
            begun = Path(tempfile.mkdtemp(prefix=BEGUN, dir=self.root))
            lock = (begun / "lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX)
            return Held(begun.rename(self.root / (PREFIX + begun.name.removeprefix(BEGUN))), lock)
        except OSError as error:
            raise no_room(first_line(error)) from None

    def clear(self, now: float | None = None) -> None:
        """Removes what services that were killed have left."""
        for folder in self.root.glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError), (folder / "lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        oldest = (time.time() if now is None else now) - FORGOTTEN_S
        for folder in self.root.glob(f"{BEGUN}*"):
            with contextlib.suppress(OSError):
                if folder.stat().st_mtime < oldest:
                    shutil.rmtree(folder, ignore_errors=True)


class Held:
    """A folder and the lock on it."""

    def __init__(self, path: Path, lock: object) -> None:
        self.path, self._lock = path, lock

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()  # type: ignore[attr-defined]


async def written(stream: AsyncIterator[bytes], file: Path, most: int, silence_s: float) -> str:
    """Writes a body to ``file`` as it comes, hashing and writing on a thread; the hash.

    Raises:
        Problem: 413, it is larger than ``most``; 408, nothing came for ``silence_s``; 507, no room.
    """
    digest, size = hashlib.blake2b(digest_size=16), 0
    parts, held = list[bytes](), 0
    try:
        with file.open("wb", buffering=0) as target:
            async with _talking(stream, silence_s) as chunks:
                async for chunk in chunks:
                    size, held = size + len(chunk), held + len(chunk)
                    if size > most:
                        raise Problem(413, "limit", f"the body is larger than {most} bytes", field="body", limit=most)
                    parts.append(chunk)
                    if held >= PART_BYTES:
                        await asyncio.to_thread(_keep, parts, digest, target)
                        parts, held = [], 0
            await asyncio.to_thread(_keep, parts, digest, target)
    except OSError as error:
        raise no_room(first_line(error)) from None
    return digest.hexdigest()


def _keep(parts: list[bytes], digest: hashlib.blake2b, target: io.FileIO) -> None:
    """Joins, hashes and writes: for a thread."""
    data = b"".join(parts)
    digest.update(data)
    rest = memoryview(data)
    while rest:
        rest = rest[target.write(rest) :]


@asynccontextmanager
async def _talking(stream: AsyncIterator[bytes], silence_s: float) -> AsyncIterator[AsyncIterator[bytes]]:
    """The chunks; a time-out each."""

    async def chunks() -> AsyncIterator[bytes]:
        while True:
            try:
                async with asyncio.timeout(silence_s):
                    chunk = await anext(stream)
            except StopAsyncIteration:
                return
            except TimeoutError:
                words = f"nothing of the body came for {silence_s:g} s"
                raise Problem(408, "limit", words, limit=silence_s) from None
            yield chunk

    made = chunks()
    try:
        yield made
    finally:
        await made.aclose()  # type: ignore[attr-defined]


def no_room(why: str) -> Problem:
    """507: the disk is full."""
    return Problem(507, "storage", f"no room for the weights: {why}. Fix: --upload_folder on a larger disk")
