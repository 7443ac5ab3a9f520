"""What the worker processes of test_workers.py do. Apart from it, so that they need not import pytest."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from llmdistill.verify.answer_requests import reply_to


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
    elif what == "reach":
        return {"reached": reached(request["secret"], request["port"])}
    elif what == "fork":
        return {"forked": os.fork()}
    elif what == "pid":
        return {"pid": os.getpid(), "keeper": os.getppid()}
    return {"echo": request.get("echo")}


def answers_with_a_hole(request: dict[str, Any]) -> dict[str, Any]:
    """The work on answers, by rules with a hole that some texts know of."""
    for item in request["items"]:
        for what in ("compute", "eat", "crash", "exit", "raise"):
            if f"please {what}" in (item.get("prediction") or item["answer"]):
                job({"do": what, "mb": 4096})
    return reply_to(request)


def reached(secret: str, port: int) -> list[str]:
    """What a library that hostile text has taken over could get at."""

    attempts = {
        "a file": Path(secret).read_text,
        "a folder": lambda: os.listdir(os.path.dirname(secret)),
        "a file to write": lambda: Path(f"{secret}-new").write_text(""),
        "another mode": lambda: os.chmod(secret, 0o600),
        "the network": lambda: socket.create_connection(("127.0.0.1", port), 1),
        "another process's environment": lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes(),
        "the environment": lambda: os.environ["ATTACK_TOKEN"],
    }
    found = []
    for name, attempt in attempts.items():
        with contextlib.suppress(Exception):
            attempt()
            found.append(name)
    with contextlib.suppress(Exception):
        import xml.dom.minidom  # noqa: F401, a library that nobody has loaded yet: it must come in
    if "xml.dom.minidom" not in sys.modules:
        found.append("no library")
    return found
