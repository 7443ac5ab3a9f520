"""The fork server: a small process that has Python's usual modules loaded, shuts itself in, and forks a confined
child for every program. Runs as `python -c`, started by sandbox.py, which it obeys over one socket.

What it never does is read a test or an expected output. Those go to the judge's process in a memory file that this
process only passes on, so that no program, forked from here, can find the answers in the memory it inherits.

Order in a child: new session, resource limits, a private folder, another uid (root only), no capabilities, death with
its parent, Landlock, system-call filter; then "+" on a pipe, then the program.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from llmdistill.verify import (
    confine,
    confine_cgroup,
    confine_identity,
    confine_namespaces,
    confine_seccomp,
    programs,
    sandbox_candidate,
    sandbox_judge,
)
from llmdistill.verify.sandbox_wire import read_whole, write_all

PROGRAM_ENDED = 3  # the judge's exit status when the program's process went away under it
JUDGE_MEMORY = 1 << 30  # bytes at least; tests that hold more (Mbpp/255: 120 million items) come with a larger limit
_REPORT = 100  # the descriptor on which a child says that it is confined
_PRELOADED = ["bisect", "cmath", "collections", "copy", "dataclasses", "datetime", "decimal", "enum", "fractions"]
_PRELOADED += ["functools", "heapq", "inspect", "itertools", "json", "math", "operator", "queue", "random", "re"]
_PRELOADED += ["statistics", "string", "textwrap", "threading", "typing", "unittest", "numpy", "numpy.testing"]


class Zygote:
    def __init__(self, control: socket.socket, mode: str, paths: list[str]) -> None:
        self.control, self.mode = control, mode
        self.paths = confine_namespaces.readable_paths(paths)
        self.namespaces: list[str] = []
        self.started_by_root = os.geteuid() == 0
        self.identity = confine_identity.Identity()
        self.outside: int | None = None  # the programs' uid as the machine sees it
        self.tasks: confine_identity.TaskLimit | None = None
        self.dies_first = confine_identity.die_first()
        self.landlock = confine.landlock_abi() if mode != "none" else 0
        self.base_memory = 0

    def enter(self) -> None:
        """Raises OSError where this mode cannot be had."""
        for name in _PRELOADED:
            with suppress(ImportError):
                importlib.import_module(name)
        with open("/proc/self/statm") as text:  # before /proc is out of sight
            self.base_memory = int(text.read().split()[0]) * resource.getpagesize()
        if self.mode == "none":
            confine.adopt_orphans()
            return
        if not confine_seccomp.supported():
            raise OSError("no seccomp filter for this kernel or machine")
        if self.mode == "namespaces":
            self.outside = confine_identity.unused_uid() if self.started_by_root else None
            self.namespaces, uid, counted_apart = confine_namespaces.enter(self.paths, self.outside)
            self.identity = confine_identity.Identity(uid)
            self.outside = None if uid is None else self.outside
            self._become_first_process()
            os.chdir("/tmp")
            self.tasks = confine_identity.TaskLimit(counted_apart=counted_apart)
        elif self.landlock < 1:
            raise OSError("the kernel has no Landlock")
        else:
            self.identity = confine_identity.own_identity(self.paths)
            self.outside = self.identity.uid
            self.tasks = confine_identity.TaskLimit(counted_apart=self.outside is not None)
        confine.bound_capabilities()

    def _become_first_process(self) -> None:
        """Fork: the child is process 1 of the new process namespace, whose end ends all in it; the parent waits."""
        child = os.fork()
        if child:
            self.control.close()
            status = os.waitpid(child, 0)[1]
            os._exit(abs(os.waitstatus_to_exitcode(status)))
        confine.die_with_parent()

    def means(self) -> dict[str, Any]:
        """What is in force, as sandbox.confinement() tells it."""
        return {
            "mode": self.mode,
            "namespaces": self.namespaces,
            "landlock_abi": self.landlock,
            "seccomp": self.mode != "none",
            "switches_to_uid": self.outside,
            "keeps_capability": self.identity.capability is not None,
            "root": self.started_by_root and self.outside is None,
            "rlimits": ["as", "cpu", "fsize", "nofile", "core", "stack", "memlock", "msgqueue"]
            + (["nproc"] if self.tasks is not None and self.tasks.enforced else []),
            "private_folder": bool(self.namespaces),
            "dies_first": self.dies_first,
        }

    def serve(self) -> NoReturn:
        gc.collect()
        gc.freeze()  # children share these pages instead of copying them at their first collection
        while True:
            data, fds, _, _ = socket.recv_fds(self.control, 65536, 8)
            if not data:  # the parent closed or died
                os._exit(0)
            try:
                reply = self.run(json.loads(data), fds)
            except Exception as error:
                reply = {"error": f"{type(error).__name__}: {error}"}
            finally:
                for fd in fds:
                    os.close(fd)
            with suppress(BrokenPipeError):
                self.control.send(json.dumps(reply).encode())

    def run(self, job: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """Run a job; see sandbox.Sandbox for its fields. Returns wait statuses, seconds and kilobytes."""
        if job["mode"] == "probe":
            child = self._fork(job, [], lambda: _probe(job["secret"]))
            status = self._wait([child], time.monotonic() + 10)[child]
            return {"program": status["status"]}
        if job["mode"] == "script":
            program, stdin, stdout, stderr = fds
            text = lambda: read_whole(program).decode("utf-8", "surrogatepass")  # noqa: E731
            candidate = self._fork(job, [stdin, stdout, stderr], sandbox_candidate.run_script, text)
            return self._await(candidate, None, job)
        if job["mode"] == "extract":
            request, found = fds
            worker = self._fork(job, [-1, -1, -1, found], _extract, lambda: read_whole(request))
            return self._await(worker, None, job)
        program, task, verdict = fds
        to_program, to_judge = os.pipe(), os.pipe()
        try:
            text = lambda: json.loads(read_whole(program))  # noqa: E731
            candidate = self._fork(
                job,
                [-1, -1, -1, to_program[0], to_judge[1]],
                lambda both: sandbox_candidate.answer_calls(both[0], both[1], 3, 4),
                text,
            )
            own = {**job, "memory": max(job["memory"], JUDGE_MEMORY)}
            content = lambda: read_whole(task)  # noqa: E731
            try:
                judge = self._fork(own, [-1, -1, -1, to_judge[0], to_program[1], verdict], _judge, content)
            except OSError:
                self._end(candidate)
                raise
        finally:
            for fd in (*to_program, *to_judge):
                os.close(fd)
        return self._await(candidate, judge, job)

    def _fork(
        self, job: dict[str, Any], files: list[int], work: Callable[..., Any], load: Callable[[], Any] | None = None
    ) -> int:
        """Fork a confined child that has only ``files`` open (as 0, 1, 2, ...; -1: /dev/null) and does ``work`` with
        what ``load`` read before. Returns its pid once it is confined; raises OSError where that fails."""
        ready, report = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                content = () if load is None else (load(),)
                report = self._confine(job, files, report)
                os.write(report, b"+")
                os.close(report)
                work(*content)
                status = 0
            except BaseException as error:
                for fd in (_REPORT, report):  # wherever it is by now
                    with suppress(BaseException):
                        os.write(fd, f"{type(error).__name__}: {error}".encode()[:500])
                        break
            finally:
                os._exit(status)
        os.close(report)
        try:
            word = os.read(ready, 500)
        finally:
            os.close(ready)
        if word != b"+":
            self._end(child)
            raise OSError(f"a child could not be confined: {word.decode('utf-8', 'replace') or 'it died'}")
        return child

    def _confine(self, job: dict[str, Any], files: list[int], report: int) -> int:
        """All that a child gives up. Returns where ``report`` is then."""
        os.setsid()
        self.control.close()
        null = os.open("/dev/null", os.O_RDWR)
        wanted = [null if fd < 0 else fd for fd in (files + [-1, -1, -1])[: max(3, len(files))]]
        high = [os.dup2(fd, 200 + i) for i, fd in enumerate([*wanted, report])]  # out of the way of 0, 1, 2, ...
        for i, fd in enumerate(high[:-1]):
            os.dup2(fd, i)
        report = os.dup2(high[-1], _REPORT)
        confine.close_files([*range(len(wanted)), report])
        os.environ.clear()
        sys.argv = ["program"]
        confine.limit_resources(
            address_space=self.base_memory + job["memory"],
            file_bytes=job["output"],
            cpu_seconds=math.ceil(job["time"]) + 1,
            tasks=None if self.tasks is None else self.tasks.now(),
            open_files=128,
        )
        if self.mode == "none":
            confine.die_with_parent()
            return report
        if self.namespaces:
            confine_namespaces.private_folder("/tmp", job["disk"], self.identity.uid, self.paths)
        os.chdir("/tmp" if self.namespaces else "/")
        confine.become(self.identity.uid, self.identity.capability)
        confine.die_with_parent()
        if self.landlock:
            devices = list(confine_namespaces.DEVICES)
            confine.landlock([*self.paths, *devices], ["/dev/null", *(["/tmp"] if self.namespaces else [])])
        confine_seccomp.filter_system_calls(
            may_change_files=bool(self.namespaces), may_truncate=bool(self.namespaces) or self.landlock >= 3
        )
        return report

    def _await(self, candidate: int, judge: int | None, job: dict[str, Any]) -> dict[str, Any]:
        """Wait for the judge (else the program), at most the job's time; then nothing of the two is left."""
        start = time.monotonic()
        main = candidate if judge is None else judge
        both = [candidate] if judge is None else [candidate, judge]
        ended = self._wait(both, start + job["time"], until=main)
        if judge in ended and ended[judge]["status"] == PROGRAM_ENDED:  # its own end is a moment away
            ended |= self._wait([pid for pid in both if pid not in ended], time.monotonic() + 2)
        seconds = time.monotonic() - start
        for pid in both:
            if pid not in ended:
                self._end(pid)
        if self.mode == "none":
            _end_leftovers()
        return {
            "timeout": main not in ended,
            "seconds": seconds,
            "program": ended.get(candidate, {}).get("status"),
            "judge": ended.get(judge, {}).get("status") if judge is not None else None,
            "cpu": ended.get(candidate, {}).get("cpu"),
        }

    def _wait(self, pids: list[int], deadline: float, until: int | None = None) -> dict[int, dict[str, Any]]:
        """Reap children until the deadline, until all of them have ended or ``until`` has."""
        handles = {os.pidfd_open(pid): pid for pid in pids}
        ended: dict[int, dict[str, Any]] = {}
        poll = select.poll()
        for handle in (*handles, self.control.fileno()):
            poll.register(handle, select.POLLIN if handle in handles else select.POLLHUP)
        try:
            while len(ended) < len(handles) and until not in ended and (left := deadline - time.monotonic()) > 0:
                for handle, _ in poll.poll(math.ceil(left * 1000)):
                    if handle not in handles:  # nobody waits for the result any more
                        for pid in pids:
                            with suppress(ProcessLookupError):
                                os.kill(pid, signal.SIGKILL)
                        os._exit(0)
                    _, status, usage = os.wait4(handles[handle], 0)
                    code = os.waitstatus_to_exitcode(status)
                    ended[handles[handle]] = {"status": code, "cpu": usage.ru_utime + usage.ru_stime}
                    poll.unregister(handle)
        finally:
            for handle in handles:
                os.close(handle)
        return ended

    def _end(self, pid: int) -> None:
        for kill in (os.killpg, os.kill):  # the group counts where programs may fork
            with suppress(ProcessLookupError, PermissionError):
                kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _judge(task: bytes) -> NoReturn:
    verdict, program_ended = sandbox_judge.run(task, 3, 4)
    write_all(5, verdict)
    os._exit(PROGRAM_ENDED if program_ended else 0)


def _extract(request: bytes) -> None:
    write_all(3, json.dumps(programs.extract_request(json.loads(request))).encode())


def _probe(secret: str) -> None:
    """Try what must not work. A confined process dies of SIGSYS at the end; every other end means: not confined."""
    for attempt in (lambda: os.open(secret, os.O_RDONLY), socket.socket, lambda: os.open(secret, os.O_WRONLY)):
        try:
            attempt()
        except OSError:
            continue
        os._exit(1)
    os.fork()


def _end_leftovers() -> None:
    """Without a filter programs may leave daemons; orphans come to this process (adopt_orphans)."""
    for _ in range(1000):
        with open(f"/proc/self/task/{os.getpid()}/children") as text:
            children = [int(pid) for pid in text.read().split()]
        if not children:
            return
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def main(arguments: str) -> NoReturn:
    """Entry point of the process: JSON with the control socket's number, mode and paths."""
    options = json.loads(arguments)
    control = socket.socket(fileno=options["control"])
    control.set_inheritable(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.set_int_max_str_digits(0)  # time is limited as it is: a number of 5,000 digits is no attack
    try:
        in_group = confine_cgroup.join(options["group"])  # before anything is forked
        zygote = Zygote(control, options["mode"], options["paths"])
        zygote.enter()
    except OSError as error:
        control.send(json.dumps({"error": str(error)}).encode())
        os._exit(1)
    control.send(json.dumps({"means": {**zygote.means(), "control_group": in_group}}).encode())
    zygote.serve()
