"""What the worker processes of test_workers.py do. Apart from it, so that they need not import pytest."""

from __future__ import annotations

import os
import signal
import time
from typing import Any


def job(request: dict[str, Any]) -> dict[str, Any]:
    """Answers one request, or misbehaves as it says."""
    what = request["do"]
    if what == "sleep":
        time.sleep(request["s"])
    elif what == "compute":
        9 ** (9 ** (9**9))  # one long call into C, which no signal handler interrupts
    elif what == "eat":
        return {"size": len(bytearray(request["mb"] << 20))}
    elif what == "raise":
        raise KeyError("nothing here")
    elif what == "exit":
        os._exit(3)
    elif what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "print":
        print("noise on the wire", flush=True)
    elif what == "pid":
        return {"pid": os.getpid(), "keeper": os.getppid()}
    return {"echo": request.get("echo")}
