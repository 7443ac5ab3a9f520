"""Writing files so that neither a kill nor a power loss leaves half of one, and reading back what may be damaged."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmdistill.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def atomic_write(file: str | Path, content: str | bytes | Callable[[Path], None], *, exclusive: bool = False) -> bool:
    """Replaces ``file``, whose folder is made if need be, in one move: a reader sees the old content or the new.

    Content and move are on the disk when this returns. What was there stays where anything fails.

    Args:
        content: text (written as UTF-8), bytes, or a function that writes the file whose path it is given.
        exclusive: leave a file alone that is there already; of several writers one wins.

    Returns:
        Whether it was written: False where ``exclusive`` found a file.

    Raises:
        UserError: the disk is full.
        OSError: whatever else the file system says.
    """
    target = Path(file)
    with full_disk_is_said(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(descriptor)
        temporary = Path(name)
        try:
            temporary.chmod(_mode(target))  # mkstemp's are for nobody else
            if callable(content):
                content(temporary)
            else:
                temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            sync(temporary)
            if exclusive:
                os.link(temporary, target)
            else:
                os.replace(temporary, target)
        except FileExistsError:
            return False
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()
        sync(target.parent)
    return True


def sync(path: str | Path) -> None:
    """Has the disk keep a file's content, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing
            raise
    finally:
        os.close(descriptor)


@contextmanager
def full_disk_is_said(file: str | Path) -> Iterator[None]:
    """A full disk, or a quota, becomes a message that says what is safe and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise UserError(
            f"{file} cannot be written: {error.strerror}. What was written before is whole. "
            "Fix: make room there, then the same command again."
        ) from error


def read_json(file: str | Path, fix: str) -> Any | None:
    """The JSON in ``file``; None where there is no such file.

    Args:
        fix: what to do about a file that is damaged, for the message.

    Raises:
        UserError: it is empty, cut off or no JSON, as a power loss may leave it.
    """
    try:
        return json.loads(Path(file).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}. Fix: {fix}") from error


def _mode(target: Path) -> int:
    """The permissions of the file that is replaced, or those that a new one would get."""
    with suppress(FileNotFoundError):
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
