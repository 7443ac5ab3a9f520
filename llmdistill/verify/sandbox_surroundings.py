"""What a program expects around it and the sandbox does not have: made to look as if it were there.

Convenience, not confinement: a program may undo all of it and gains nothing. Runs in the program's process.
"""

from __future__ import annotations

import builtins
import io
import os
import resource
import sys
import types
from collections.abc import Callable
from typing import Any

SCRIPT = "/tmp/program.py"
"""``__file__`` of the program. There is no such file; programs take its folder, or its name for messages."""

_STREAMS = {f"{folder}/{name}": fd for folder in ("/dev/fd", "/proc/self/fd") for fd, name in enumerate("012")}
_STREAMS |= {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}


def surround(module: types.ModuleType) -> None:
    """``__file__``, names for the standard streams (there is no /proc and no /dev/stdin to open), and a setrlimit that
    takes what it can get."""
    module.__dict__["__file__"] = SCRIPT
    sys.argv = [SCRIPT]
    builtins.open = io.open = _with_streams(io.open)  # type: ignore[assignment]
    os.open = _with_streams(os.open)
    resource.setrlimit = _lenient(resource.setrlimit)


def _with_streams(opener: Callable[..., Any]) -> Callable[..., Any]:
    def open(file: Any, *args: Any, **keywords: Any) -> Any:
        path = os.fspath(file) if isinstance(file, str | os.PathLike) else None
        if not isinstance(path, str) or path not in _STREAMS:
            return opener(file, *args, **keywords)
        fd = os.dup(_STREAMS[path])
        return fd if opener is _OS_OPEN else opener(fd, *args, **keywords)

    return open


_OS_OPEN = os.open


def _lenient(setrlimit: Callable[..., None]) -> Callable[..., None]:
    """Programs ask for a stack of 256 MiB or of no limit before they recurse; hard limits stay what they are."""

    def lowered(which: int, limits: Any) -> None:
        hard = resource.getrlimit(which)[1]
        asked = [hard if value in (-1, resource.RLIM_INFINITY) else int(value) for value in limits]
        if hard != resource.RLIM_INFINITY:
            asked = [min(value, hard) for value in asked]
        setrlimit(which, tuple(asked))

    return lowered
