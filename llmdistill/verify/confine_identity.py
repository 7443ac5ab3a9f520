"""Who a confined process is: a user of its own where root starts it, and how many tasks that user may have.

A uid that nobody else has keeps programs from the files, the signals and the task counts of the user's other processes
and of each other. Programs of an ordinary user stay that user.
"""

from __future__ import annotations

import os
import resource
import struct
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from llmdistill.verify.confine import become

NOBODY = 65534
TASKS = 64  # processes and threads of one program and its judge
_HEADROOM = 512  # tasks beyond those that an ordinary user has already: other programs are among them
_RECOUNT_S = 5.0
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2
# Far from the ids of people, services and containers; the second for user namespaces, which have few.
_UNUSED = (range(0x70000000, 0x71000000), range(61184, 65519))


@dataclass(frozen=True)
class Identity:
    """What a confined process becomes.

    Attributes:
        uid: the user (and group) it switches to; None: it stays who it is.
        capability: the one it keeps, to read files that only root may (a Python in root's home); None: none.
    """

    uid: int | None = None
    capability: int | None = None


def unused_uid() -> int | None:
    """A random id from a range that nobody uses; None where this user namespace maps none."""
    mapped = [_mapped(f"/proc/self/{kind}_map") for kind in ("uid", "gid")]
    for ids in _UNUSED:
        if all(any(ids[0] in there and ids[-1] in there for there in ranges) for ranges in mapped):
            return ids[struct.unpack("I", os.urandom(4))[0] % len(ids)]
    return NOBODY if all(any(NOBODY in there for there in ranges) for ranges in mapped) else None


def _mapped(path: str) -> list[range]:
    with open(path) as lines:
        numbers = [[int(word) for word in line.split()] for line in lines]
    return [range(first, first + count) for first, _, count in numbers]


def own_identity(paths: Iterable[str]) -> Identity:
    """Another user for root's programs, tried: one that can read this Python and these files and folders, if need be by
    a capability that Landlock narrows to them."""
    uid = unused_uid() if os.geteuid() == 0 else None
    if uid is None:
        return Identity()
    for capability in (None, _DAC_READ_SEARCH, _DAC_OVERRIDE):
        identity = Identity(uid, capability)
        if _reads_as(identity, paths):
            return identity
    return Identity()


def _reads_as(identity: Identity, paths: Iterable[str]) -> bool:
    """Whether such a process could import from there: a Python in root's home is out of others' reach."""
    readable = [os.__file__, *(path for path in paths if os.access(path, os.R_OK))]

    def read() -> None:
        become(identity.uid, identity.capability)
        for path in readable:
            os.close(os.open(path, os.O_RDONLY))

    return succeeds(read)


def succeeds(action: Callable[[], None]) -> bool:
    """Whether a child of this process, which must have one thread, does it without an error."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class TaskLimit:
    """RLIMIT_NPROC for confined processes: of a uid of their own, or beyond what their user runs already."""

    def __init__(self, *, counted_apart: bool) -> None:
        self._apart = counted_apart
        self._limit: int | None = TASKS if counted_apart else None
        self._counted = float("-inf")
        self.enforced = counted_apart or (os.geteuid() != 0 and self._works())

    def now(self) -> int | None:
        """None where it would not hold, or would keep threads from programs that need one."""
        if not self.enforced or self._apart:
            return self._limit
        if time.monotonic() - self._counted > _RECOUNT_S:
            self._limit, self._counted = _tasks_of(os.getuid()) + _HEADROOM, time.monotonic()
        return self._limit

    def _works(self) -> bool:
        """Processes that cannot be seen from here (a container's host) may be counted: then no thread would start."""
        limit = _tasks_of(os.getuid()) + _HEADROOM

        def start_a_thread() -> None:
            hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
            allowed = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(resource.RLIMIT_NPROC, (allowed, allowed))
            thread = threading.Thread(target=int)
            thread.start()
            thread.join()

        return succeeds(start_a_thread)


def _tasks_of(uid: int) -> int:
    """Threads of a user, as far as this process sees them."""
    count = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError, ValueError, IndexError):
                if entry.stat().st_uid == uid:
                    with open(f"/proc/{entry.name}/stat") as text:
                        count += int(text.read().rpartition(")")[2].split()[17])
    return count


def die_first() -> bool:
    """Let the kernel end this process and its children before any other when memory runs out. Whether it will."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        return False
    return True
