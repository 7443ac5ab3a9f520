"""Running programs that nobody has read: confined processes, several at a time, at some tens of programs a second.

A Sandbox keeps fork servers (sandbox_zygote.py). Each confines itself and forks, for one program, a process that runs
the program and one that runs the tests. What confines them depends on the kernel and is tried at start, not assumed:

- "namespaces": a root directory with Python and shared libraries only, no network, process table of its own, a folder
  in memory that vanishes with the process; Landlock, a system-call filter and resource limits on top.
- "landlock": where user namespaces are forbidden (many containers): file access limited by Landlock to reading Python
  and libraries, no writing at all; the same filter and limits. That files exist, and how large they are, can be seen.
- "none": neither is there. Refused, unless allow_unsafe_exec; then only limits of time, memory and output hold.

Both confined modes forbid, by the filter: new processes and programs, sockets, signals to others, ptrace, io_uring,
namespaces. Root's programs run as a uid that each worker has for itself. What a machine leaves open is said by
``describe()``; SECURITY.md says what is promised.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmdistill.errors import UserError
from llmdistill.verify.confine_cgroup import Group
from llmdistill.verify.confine_worker import clean_environment, package_folders
from llmdistill.verify.sandbox_means import in_words

_MIB = 1 << 20
_GRACE_S = 10.0  # what a fork server may be late before it is given up
_BESIDE_THE_PROGRAM = 1 << 30  # bytes of a control group: the fork server, tests and outputs in memory files
_JUDGE_MEMORY = 1 << 30  # sandbox_zygote.JUDGE_MEMORY, which lives in the fork server's world
_SIGSYS = 31
# Loads the zygote without importing the package (torch and friends): the two __init__ files are left out.
_BOOT = """
import sys, types
for name, path in (("llmdistill", sys.argv[1]), ("llmdistill.verify", sys.argv[1] + "/verify")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [path]
from llmdistill.verify.sandbox_zygote import main
main(sys.argv[2])
"""


class SandboxFailure(RuntimeError):
    """A fork server died or does not answer; says nothing of the program. The next job gets a fresh one."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        timeout: it was killed at its time limit.
        seconds: wall time from confined start to end.
        program: exit status of the program's process, -N for signal N; None if it was still there at the end.
        judge: the same of the tests' process; None in script mode.
        output: what the job left: the verdict's JSON, or the program's standard output.
        errors: the end of the program's standard error (script mode).
    """

    timeout: bool
    seconds: float
    program: int | None
    judge: int | None
    output: bytes
    errors: bytes


@dataclass(frozen=True)
class Limits:
    """What a job may use: seconds of wall time, MiB of memory, of files in its folder, and of each output."""

    time_s: float = 10.0
    memory_mb: int = 1024
    disk_mb: int = 64
    output_mb: int = 16

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                limit = {"time_s": "time_limit_s", "memory_mb": "memory_limit_mb"}.get(name, name)
                raise UserError(f"{limit} is {value}; it must be above 0")


_EXTRACTION = Limits(time_s=10.0, memory_mb=512)


class Sandbox:
    """A pool of fork servers. Safe to use from several threads; close() or a with block ends every process.

    Args:
        workers: programs run at a time; default: the number of usable cores.
        allow_unsafe_exec: run even where nothing confines the programs. Where something does, it stays in force.
        mode: "namespaces" or "landlock": this one and no other; default: the strongest that the machine grants.
    Raises:
        UserError: nothing confines programs here and allow_unsafe_exec is false; the mode asked for is not granted.
    """

    def __init__(self, workers: int | None = None, *, allow_unsafe_exec: bool = False, mode: str | None = None) -> None:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
        self.workers = cores if workers is None else workers
        if self.workers < 1:
            raise UserError(f"workers is {workers}; a sandbox needs at least 1")
        self.allow_unsafe_exec = allow_unsafe_exec
        self._idle: queue.Queue[_Worker | None] = queue.Queue()
        self._all: list[_Worker] = []
        self._lock = threading.Lock()
        self._closed = False
        self._mode, first = _first_worker(allow_unsafe_exec, mode)
        self.means = first.means
        self._all.append(first)
        self._idle.put(first)
        for _ in range(self.workers - 1):
            self._idle.put(None)  # a place; its fork server starts when it is needed

    def script(self, program: str, stdin: str, limits: Limits) -> Outcome:
        """Run a whole program on this input."""
        files = [_memory_file(_utf8(program)), _memory_file(_utf8(stdin)), _memory_file(), _memory_file()]
        return self._run({"mode": "script"}, files, limits, output=2, errors=3)

    def calls(self, program: str, preamble: str, task: dict[str, Any], limits: Limits) -> Outcome:
        """Load the program in one process (after the preamble), and run the task of sandbox_judge.py in another."""
        content = json.dumps([program, preamble]).encode()
        files = [_memory_file(content), _memory_file(json.dumps(task).encode()), _memory_file()]
        return self._run({"mode": "calls"}, files, limits, output=2, errors=None)

    def extract(self, completion: str, entry_point: str | None, prompt: str | None) -> str | None:
        """programs.extract_program in a confined process; None also where it takes too long or too much."""
        request = {"completion": completion, "entry_point": entry_point, "prompt": prompt}
        files = [_memory_file(json.dumps(request).encode()), _memory_file()]
        outcome = self._run({"mode": "extract"}, files, _EXTRACTION, output=1, errors=None)
        try:
            found = json.loads(outcome.output)
        except ValueError:  # it was stopped: whatever that text is, it is no program
            return None
        return found if isinstance(found, str) else None

    def _run(self, job: dict[str, Any], files: list[int], limits: Limits, output: int, errors: int | None) -> Outcome:
        job |= {"time": limits.time_s, "memory": int(limits.memory_mb * _MIB)}
        job |= {"disk": int(limits.disk_mb * _MIB), "output": int(limits.output_mb * _MIB)}
        try:
            with self._worker() as worker:
                reply = worker.ask(job, files, limits.time_s + _GRACE_S)
            text = _content(files[output], job["output"])
            tail = b"" if errors is None else _content(files[errors], job["output"])[-2000:]
        finally:
            for fd in files:
                os.close(fd)
        return Outcome(reply["timeout"], reply["seconds"], reply["program"], reply["judge"], text, tail)

    @contextlib.contextmanager
    def _worker(self) -> Iterator[_Worker]:
        if self._closed:
            raise RuntimeError("this Sandbox is closed")
        worker = self._idle.get()
        try:
            if self._closed:  # while this thread waited for its turn
                raise RuntimeError("this Sandbox is closed")
            if worker is None or not worker.alive:
                fresh = _Worker(self._mode)
                with self._lock:
                    if worker in self._all:
                        self._all.remove(worker)
                    self._all.append(fresh)
                worker = fresh
            yield worker
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End all processes. Jobs that are running fail with SandboxFailure."""
        self._closed = True
        with self._lock:
            workers, self._all = self._all, []
        for worker in workers:
            worker.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """One fork server. Raises UserError where its mode cannot be had."""

    def __init__(self, mode: str) -> None:
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.group = Group.make() if mode != "none" else None
        options = json.dumps(
            {
                "control": its.fileno(),
                "mode": mode,
                "paths": package_folders(),
                "group": str(self.group.folder) if self.group else None,
            }
        )
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-s", "-P", "-c", _BOOT, str(Path(__file__).parent.parent), options],
                pass_fds=[its.fileno()],
                env=clean_environment(),  # no token of the user's reaches a program, whatever it reads
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        finally:
            its.close()
        self.control = mine
        self.alive = True
        try:
            self.means: dict[str, Any] = self._reply(60.0)["means"]
            if mode != "none":
                self._prove()
        except (SandboxFailure, _Refused):
            self.close()
            raise

    def _prove(self) -> None:
        """Confinement is what a child finds, not what this code meant to set up."""
        with tempfile.NamedTemporaryFile() as secret:
            os.chmod(secret.name, 0o644)
            reply = self.ask({"mode": "probe", "secret": secret.name, **_PROBE_LIMITS}, [], 20.0)
        if reply["program"] != -_SIGSYS:
            raise _Refused(f"a confined child did what it must not (status {reply['program']})")

    def ask(self, job: dict[str, Any], files: list[int], timeout_s: float) -> dict[str, Any]:
        """Raises SandboxFailure when no answer comes; the fork server is ended then."""
        try:
            if self.group is not None and self.means["control_group"]:
                judge = max(job["memory"], _JUDGE_MEMORY)
                self.group.limit_memory(job["memory"] + judge + job["disk"] + 2 * job["output"] + _BESIDE_THE_PROGRAM)
            socket.send_fds(self.control, [json.dumps(job).encode()], files)
            return self._reply(timeout_s)
        except (OSError, _Refused) as problem:
            self.close()
            raise SandboxFailure(f"the sandbox's fork server failed: {problem}") from None
        except BaseException:  # an interrupt: its answer would meet the next question
            self.close()
            raise

    def _reply(self, timeout_s: float) -> dict[str, Any]:
        self.control.settimeout(timeout_s)
        try:
            data = self.control.recv(65536)
        except TimeoutError:
            data = b""
        if not data:
            self.process.kill()
            errors = self.process.communicate()[1]
            raise SandboxFailure(f"the sandbox's fork server ended: {errors.decode('utf-8', 'replace')[-500:]}")
        reply: dict[str, Any] = json.loads(data)
        if "error" in reply:
            raise _Refused(reply["error"])
        return reply

    def close(self) -> None:
        self.alive = False
        self.control.close()
        self.process.kill()  # process 1 of the namespace dies with it, and all others with that
        self.process.wait()
        if self.process.stderr is not None:
            self.process.stderr.close()
        if self.group is not None:
            self.group.remove()


class _Refused(Exception):
    """This kernel or container does not grant what was asked for."""


_PROBE_LIMITS = {"time": 10.0, "memory": 256 * _MIB, "disk": _MIB, "output": _MIB}


def _first_worker(allow_unsafe_exec: bool, wanted: str | None) -> tuple[str, _Worker]:
    """The strongest mode that this machine grants, or the one that is wanted."""
    reasons = []
    if sys.platform == "linux":
        for mode in ("namespaces", "landlock") if wanted is None else (wanted,):
            try:
                return mode, _Worker(mode)
            except (_Refused, SandboxFailure) as refusal:
                reasons.append(f"{mode}: {refusal}")
        if allow_unsafe_exec:
            return "none", _Worker("none")
    else:
        reasons.append(f"the platform is {sys.platform}, and only Linux is supported")
    how = "" if sys.platform != "linux" else ", or --allow_unsafe_exec to run programs with time and memory limits only"
    raise UserError(
        f"code verdicts need a sandbox and this machine offers none ({'; '.join(reasons)}). Use a kernel with "
        f"Landlock (5.13 or later) or one that lets users make namespaces{how}"
    )


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _memory_file(content: bytes = b"") -> int:
    fd = os.memfd_create("llmdistill", os.MFD_CLOEXEC)
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _content(fd: int, limit: int) -> bytes:
    parts, at = [], 0
    while at < limit and (part := os.pread(fd, min(limit - at, _MIB), at)):
        parts.append(part)
        at += len(part)
    return b"".join(parts)


_shared: dict[bool, Sandbox] = {}
_shared_owner = os.getpid()
_shared_lock = threading.Lock()


def _forget_shared() -> None:
    """A forked process must not talk into its parent's sockets, nor wait for a lock that no thread of it holds."""
    global _shared_owner, _shared_lock
    _shared.clear()
    _shared_owner, _shared_lock = os.getpid(), threading.Lock()


os.register_at_fork(after_in_child=_forget_shared)


def shared_sandbox(allow_unsafe_exec: bool = False) -> Sandbox:
    """The process's own Sandbox, made at first use and closed at exit. A forked process makes its own."""
    with _shared_lock:
        if not _shared:
            atexit.unregister(close_shared)
            atexit.register(close_shared)
        if allow_unsafe_exec not in _shared:
            _shared[allow_unsafe_exec] = Sandbox(allow_unsafe_exec=allow_unsafe_exec)
        return _shared[allow_unsafe_exec]


def close_shared() -> None:
    """End the processes of shared_sandbox(); the next use starts them again."""
    with _shared_lock:
        if _shared_owner == os.getpid():
            for sandbox in _shared.values():
                sandbox.close()
        _shared.clear()


def confinement(allow_unsafe_exec: bool = False) -> dict[str, Any]:
    """What confines programs on this machine, tried and not guessed: mode, namespaces, landlock_abi, seccomp,
    switches_to_uid (outside of the namespaces, of the first worker), root (they stay uid 0), keeps_capability (to read
    Python), rlimits, private_folder, dies_first (when memory runs out), control_group. Raises UserError where nothing
    does."""
    return dict(shared_sandbox(allow_unsafe_exec).means)


def describe(allow_unsafe_exec: bool = False) -> str:
    """confinement() in a line for people, with what it leaves open."""
    return in_words(confinement(allow_unsafe_exec))
