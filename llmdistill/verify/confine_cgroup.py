"""A control group (version 2) for a fork server and its programs, where this user was delegated one.

It bounds what address-space limits cannot: the memory of all of a program's processes together, files in memory
included, and the number of tasks, whoever they belong to. Most containers delegate none: then ``Group.make`` is None.
"""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path

_PREFIX = "llmdistill-"
_TASKS = 128


class Group:
    """One group. Its fork server joins it before it forks anything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._limit = 0

    @classmethod
    def make(cls, parents: list[Path] | None = None) -> Group | None:
        """A new group beneath this process's own or beside it, with a limit on tasks.

        Args:
            parents: where to try; default: what delegated() finds.
        """
        for parent in delegated() if parents is None else parents:
            _remove_abandoned(parent)
            folder = parent / f"{_PREFIX}{os.getpid()}-{uuid.uuid4().hex[:8]}"
            try:
                controllers = (parent / "cgroup.subtree_control").read_text().split()
                if not {"memory", "pids"} <= set(controllers):
                    continue
                folder.mkdir()
            except OSError:
                continue
            group = cls(folder)
            try:
                group._write("pids.max", str(_TASKS))
                with suppress(OSError):  # a kernel without swap accounting
                    group._write("memory.swap.max", "0")
            except OSError:
                group.remove()
                continue
            return group
        return None

    def limit_memory(self, size: int) -> None:
        """Bytes of all its processes together; the kernel ends one of them above it."""
        if size != self._limit:
            self._write("memory.max", str(size))
            self._limit = size

    def remove(self) -> None:
        """After its processes have ended."""
        with suppress(OSError):
            self.folder.rmdir()

    def _write(self, name: str, text: str) -> None:
        with open(self.folder / name, "w") as file:
            file.write(text)


def join(folder: str | None) -> bool:
    """Move the calling process. Whether it did: this user may write to a group and still not move itself there."""
    if folder is None:
        return False
    try:
        with open(Path(folder) / "cgroup.procs", "w") as file:
            file.write("0")
    except OSError:
        return False
    return True


def delegated() -> list[Path]:
    """This process's own group of version 2 and the one above it, as far as they may be written to. In the own one
    children get limits only if no process is left in it, so that often the one above is it."""
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        path = next(line[3:].strip() for line in groups if line.startswith("0::"))
        mount = next(line.split()[4] for line in mounts if line.partition(" - ")[2].startswith("cgroup2 "))
    except (OSError, StopIteration):
        return []
    own = Path(mount) / path.lstrip("/")
    parents = [own] if own == Path(mount) else [own, own.parent]
    return [folder for folder in parents if os.access(folder, os.W_OK)]


def _remove_abandoned(parent: Path) -> None:
    """Groups of processes that were killed before they could remove theirs."""
    for folder in parent.glob(f"{_PREFIX}*-*"):
        owner = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdigit() and not os.path.exists(f"/proc/{owner}"):
            with suppress(OSError):
                folder.rmdir()
