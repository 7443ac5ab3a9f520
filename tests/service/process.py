"""A real service process for tests: started, killed, started again on the same port."""

from __future__ import annotations

import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType

import httpx

START_S = 300.0


class ServiceProcess:
    """``llmdistill serve`` on a loopback port.

    Args:
        model: folder of the model.
        options: further options of the command.
        certificate: of its own, where the options give it one.
        variables: of its environment, beside those of this process.
        module: another one that is run with ``serve``.
    """

    def __init__(
        self,
        model: str,
        *options: str,
        token: str | None = None,
        certificate: str | None = None,
        variables: Mapping[str, str] | None = None,
        module: str = "llmdistill.cli",
    ) -> None:
        self.model, self.options, self.token, self.module = model, options, token, module
        self.variables = variables or {}
        self.scheme = "https" if certificate else "http"
        self.verify = ssl.create_default_context(cafile=certificate) if certificate else True
        self.port = 0
        self.log: list[str] = []
        self.process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def start(self, wait: bool = True) -> ServiceProcess:
        command = [sys.executable, "-m", self.module, "serve", "--model", self.model, "--port", str(self.port)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **self.variables}
        env.pop("LLMDISTILL_TOKEN", None)
        if self.token:
            env["LLMDISTILL_TOKEN"] = self.token
        self.process = subprocess.Popen(
            [*command, *self.options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
        )
        self.log = []
        threading.Thread(target=self._read, args=(self.process, self.log), daemon=True).start()
        if wait:
            self.wait()
        return self

    def wait(self) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            assert self.process is not None
            if self.process.poll() is not None:
                time.sleep(0.2)
                raise RuntimeError("the service ended:\n" + "".join(self.log))
            found = next((m for line in self.log if (m := re.search(r"^serving .* on https?://.*:(\d+)$", line))), None)
            if found:
                self.port = int(found[1])
                try:
                    if httpx.get(self.url + "/ready", timeout=2, verify=self.verify).status_code == 200:
                        return
                except httpx.HTTPError:
                    pass
            time.sleep(0.05)
        raise RuntimeError("the service did not start:\n" + "".join(self.log))

    def kill(self) -> None:
        """As the kernel's out-of-memory killer would."""
        self._end(signal.SIGKILL)

    def terminate(self) -> int:
        """A graceful stop; the exit status."""
        return self._end(signal.SIGTERM)

    def children(self) -> list[int]:
        assert self.process is not None
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True)
        return [int(word) for word in found.stdout.split()]

    def __enter__(self) -> ServiceProcess:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.process is not None and self.process.poll() is None:
            self._end(signal.SIGKILL)

    def _end(self, number: int) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)

    @staticmethod
    def _read(process: subprocess.Popen[str], log: list[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            log.append(line)
