"""The pool of fork servers: what confines, several threads, nothing left, and what happens when parts of it die."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from llmdistill.errors import UserError
from llmdistill.verify import confine_seccomp
from llmdistill.verify import sandbox as module
from llmdistill.verify.code import run_stdin, run_tests
from llmdistill.verify.confine_cgroup import Group, join
from llmdistill.verify.sandbox import Limits, Sandbox, SandboxFailure, confinement, describe, shared_sandbox
from llmdistill.verify.sandbox_means import in_words, remains
from tests.verify.test_attacks import descendants

DOUBLE = "def double(x): return 2 * x"
ASK = "assert double(3) == 6"


def gone(pids: set[int], within_s: float = 5.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]:
            return True
        time.sleep(0.02)
    return False


def test_something_real_confines_here():
    """Not an assumption about the kernel: the machines that run these tests must grant a mode."""
    means = confinement()
    assert means["mode"] in ("namespaces", "landlock") and means["seccomp"]
    assert means["landlock_abi"] or means["namespaces"]
    assert "seccomp" in describe() and "UNCONFINED" not in describe()
    if os.geteuid() == 0:
        assert means["switches_to_uid"] not in (None, 0) and not means["root"] and "nproc" in means["rlimits"]
    assert means["dies_first"]


def sandbox_of(mode: str, workers: int = 1) -> Sandbox:
    try:
        return Sandbox(workers, mode=mode)
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give its programs another uid")
@pytest.mark.parametrize("mode", ["namespaces", "landlock"])
def test_roots_programs_have_a_uid_of_their_own_by_worker(mode):
    """Also where Python lies in root's home, out of another user's reach: imports work all the same."""
    program = "import os\nimport xml.dom.minidom\ndef who(): return os.getresuid(), os.getresgid(), os.getgroups()"
    seen = []
    for _ in range(2):
        with sandbox_of(mode) as pool:
            seen.append(pool.means["switches_to_uid"])
            inside = 1 if mode == "namespaces" else seen[-1]
            expected = f"(({inside},) * 3, ({inside},) * 3, [])"
            verdict = run_tests(program, f"assert who() == {expected}, who()", sandbox=pool)
            assert verdict.passed, verdict
    assert 0 not in seen and len(set(seen)) == 2


@pytest.mark.parametrize("mode", ["namespaces", "landlock"])
def test_the_kernel_ends_programs_before_the_trainer_when_memory_runs_out(mode):
    with sandbox_of(mode) as pool:

        def sleep() -> None:
            with suppress(SandboxFailure):
                pool.script("import time\ntime.sleep(99)", "", Limits(time_s=99))

        thread, server = threading.Thread(target=sleep), pool._all[0].process.pid
        thread.start()
        while len(running := descendants(server)) < (2 if mode == "namespaces" else 1):
            assert thread.is_alive()
        scores = {Path(f"/proc/{pid}/oom_score_adj").read_text().strip() for pid in running | {server}}
        os.kill(server, signal.SIGKILL)
        thread.join(30)
        assert gone(running), "what runs goes with its fork server"
        assert scores == {"1000"}


def test_what_remains_is_said():
    """By the line that every result carries: Landlock hides contents and not that files exist."""
    with sandbox_of("landlock") as pool:
        line = in_words(pool.means)
        exists = run_tests(
            "import os\ndef f(): return os.path.exists('/etc/shadow')", "assert f() is True", sandbox=pool
        )
        assert exists.passed and "they see whether files exist" in line and "what remains" in line
    with sandbox_of("namespaces") as pool:
        exists = run_tests(
            "import os\ndef f(): return os.path.exists('/etc/shadow')", "assert f() is True", sandbox=pool
        )
        assert not exists.passed and "whether files exist" not in in_words(pool.means)
    bare = {**pool.means, "rlimits": [], "root": True, "dies_first": False, "keeps_capability": True}
    assert len(remains(bare)) == len(remains(pool.means)) + 4


def test_control_groups_where_they_are_delegated(tmp_path):
    """On a tree that looks like one (few machines of tests delegate any): limits are written, groups go away with
    their owner, and one whose controllers are missing is left alone."""
    assert Group.make([tmp_path]) is None
    (tmp_path / "cgroup.subtree_control").write_text("cpu io\n")
    assert Group.make([tmp_path]) is None
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory pids\n")
    ended = subprocess.Popen(["true"])
    ended.wait()
    abandoned = tmp_path / f"llmdistill-{ended.pid}-0123"
    abandoned.mkdir()
    group = Group.make([tmp_path / "missing", tmp_path])
    assert group is not None and not abandoned.exists()
    group.limit_memory(123 << 20)
    assert (group.folder / "pids.max").read_text() == "128"
    assert (group.folder / "memory.max").read_text() == str(123 << 20)
    assert not join(None) and not join(str(tmp_path / "missing")) and join(str(group.folder))
    with sandbox_of("landlock") as pool:
        assert pool.means["control_group"] == (Group.make() is not None)


def test_without_confinement_it_is_refused_by_name(monkeypatch):
    def refuse(mode):
        raise module._Refused("not here")

    monkeypatch.setattr(module, "_Worker", refuse)
    with pytest.raises(UserError, match="--allow_unsafe_exec"):
        Sandbox()
    monkeypatch.setattr(module.sys, "platform", "darwin")
    with pytest.raises(UserError, match="only Linux"):
        Sandbox(allow_unsafe_exec=True)


def test_allow_unsafe_exec_keeps_what_there_is():
    with Sandbox(1, allow_unsafe_exec=True) as pool:
        assert pool.means["mode"] == confinement()["mode"]


def test_unconfined_mode_still_limits_and_cleans_up(nothing_confines):
    """Where nothing confines and the user insists: time, memory and daemons are still dealt with."""
    with Sandbox(1, allow_unsafe_exec=True) as pool:
        assert pool.means["mode"] == "none"
        assert run_tests(DOUBLE, ASK, sandbox=pool).passed
        before = descendants(os.getpid())
        daemon = (
            "import os, time\ndef double(x):\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n"
        )
        daemon += "            time.sleep(99)\n        os._exit(0)\n    os.wait()\n    return 6\n"
        assert run_tests(daemon, ASK, sandbox=pool).passed
        assert descendants(os.getpid()) == before
        assert run_tests("def double(x):\n    while True: pass", ASK, time_limit_s=0.5, sandbox=pool).kind == "timeout"
        assert run_tests("def double(x): return bytearray(10**10)", ASK, sandbox=pool).kind == "memory"


@pytest.mark.parametrize("mode", ["namespaces", "landlock"])
def test_close_leaves_no_process_and_no_descriptor(mode):
    files = set(os.listdir("/proc/self/fd"))
    before = descendants(os.getpid())
    try:
        pool = Sandbox(2, mode=mode)
    except UserError as error:
        pytest.skip(str(error))
    with pool, ThreadPoolExecutor(4) as threads:
        verdicts = list(threads.map(lambda i: run_tests(DOUBLE, ASK, sandbox=pool), range(12)))
        assert all(verdict.passed for verdict in verdicts)
        started = descendants(os.getpid()) - before
        assert 1 <= len(started) <= 4  # at most two processes a worker
    assert gone(started)
    assert set(os.listdir("/proc/self/fd")) == files
    with pytest.raises(RuntimeError, match="closed"):
        pool.script("", "", Limits())


def test_threads_get_their_own_results():
    """Verdicts of programs that run at the same time do not mix."""
    with ThreadPoolExecutor(8) as threads:
        results = threads.map(lambda i: run_stdin(f"print({i} + int(input()))", [(str(i), str(2 * i))]), range(64))
        assert all(verdict.passed for verdict in results)


def test_a_killed_fork_server_is_replaced():
    with Sandbox(1) as pool:
        assert run_tests(DOUBLE, ASK, sandbox=pool).passed
        os.kill(pool._all[0].process.pid, signal.SIGKILL)
        assert run_tests(DOUBLE, ASK, sandbox=pool).passed


def test_close_during_a_run_ends_it():
    pool = Sandbox(1)
    errors = []

    def long() -> None:
        try:
            pool.script("import time\ntime.sleep(60)", "", Limits(time_s=60))
        except (SandboxFailure, OSError, RuntimeError) as error:
            errors.append(error)

    thread = threading.Thread(target=long)
    thread.start()
    time.sleep(0.5)
    pids = descendants(os.getpid())
    mine = {pid for pid in pids if pid in descendants(pool._all[0].process.pid) | {pool._all[0].process.pid}}
    pool.close()
    thread.join(15)
    assert not thread.is_alive() and errors
    assert gone(mine)


def test_a_killed_parent_takes_everything_with_it():
    """SIGKILL of the Python that asked, in the middle of a program that would sleep for a minute."""
    code = (
        "import os, threading, time\nfrom llmdistill.verify.sandbox import Sandbox, Limits\npool = Sandbox(1)\n"
        "threading.Thread(target=pool.script, args=('import time; time.sleep(60)', '', Limits(time_s=60))).start()\n"
        "time.sleep(0.5)\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"ready\n"
        pids = descendants(parent.pid)
        assert len(pids) >= 2
        parent.kill()
    assert gone(pids)


def test_the_shared_sandbox_ends_with_its_process_and_survives_a_fork():
    code = (
        "import os\nfrom llmdistill.verify.code import run_tests\n"
        "from llmdistill.verify.sandbox import shared_sandbox\n"
        f"def ok(): return run_tests({DOUBLE!r}, {ASK!r}).passed\n"
        "assert ok()\npid = os.fork()\nif pid == 0: os._exit(0 if ok() else 1)\n"
        "assert os.waitpid(pid, 0)[1] == 0 and ok()\nprint(shared_sandbox()._all[0].process.pid)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert gone({int(done.stdout)})
    assert shared_sandbox() is shared_sandbox()


def verdict_of_filter(program: list, arch: int, number: int, *arguments: int) -> int:
    """Classic BPF, as far as the filter uses it."""
    data = {0: number, 4: arch} | {16 + 8 * i: value & 0xFFFFFFFF for i, value in enumerate(arguments)}
    at, loaded = 0, 0
    while True:
        code, yes, no, constant = program[at]
        at += 1
        if code == 0x06:
            return constant
        if code == 0x20:
            loaded = data.get(constant, 0)
        else:
            hit = {0x15: loaded == constant, 0x45: bool(loaded & constant), 0x35: loaded >= constant}[code]
            at += yes if hit else no


@pytest.mark.parametrize(
    "machine, arch, numbers",
    [  # read, openat, mmap, clone, execve, connect, kill, socket, chmod by descriptor
        ("x86_64", 0xC000003E, (0, 257, 9, 56, 59, 42, 62, 41, 268)),
        ("aarch64", 0xC00000B7, (63, 56, 222, 220, 221, 203, 129, 198, 53)),
    ],
)
def test_filter_of_both_machines(machine, arch, numbers):
    """The filter for the machine that these tests do not run on decides as the other does."""
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050001
    read, openat, mmap, clone, execve, connect, kill_call, sock, chmod = numbers
    program = confine_seccomp._program(machine, 4711, True, True)
    strict = confine_seccomp._program(machine, 4711, False, False)
    assert max(max(yes, no) for _, yes, no, _ in program) < 256 and len(program) < 4096

    def verdict(number, *arguments, of=program):
        return verdict_of_filter(of, arch, number, *arguments)

    assert [verdict(n) for n in (read, openat, mmap)] == [allow] * 3
    assert verdict(execve) == kill and verdict(clone, 17) == kill and verdict(clone, 0x10000) == allow
    assert verdict(kill_call, 4711) == allow and verdict(kill_call, 1) == kill and verdict(kill_call, -1) == kill
    assert verdict(sock) == refuse and verdict(connect) == refuse and verdict(9999) == refuse
    assert verdict(chmod) == allow and verdict(chmod, of=strict) == refuse
    assert verdict(openat, 0, 0, os.O_TRUNC, of=strict) == refuse and verdict(openat, 0, 0, 0, of=strict) == allow
    assert verdict_of_filter(program, 0x40000003, read) == kill  # another architecture's numbers (i386)
    assert verdict(0x40000000 + read) == kill  # x32


def test_limits_are_checked():
    for name in ("time_s", "memory_mb", "disk_mb", "output_mb"):
        with pytest.raises(UserError, match="above 0"):
            Limits(**{name: 0})
    with pytest.raises(UserError, match="workers"):
        Sandbox(0)


def test_importing_is_light():
    """Verdicts need no torch; grading processes start in a moment."""
    code = "import sys, llmdistill.verify.code, llmdistill.verify.programs\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_packages_of_a_python_under_tmp_are_there(tmp_path: Path) -> None:
    """The program's own /tmp covers an environment that was made there; its packages are shown, and nothing beside."""
    packages = tmp_path / "env" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "onlyhere.py").write_text("value = 7\n")
    (tmp_path / "env" / "secret.txt").write_text("secret")
    secret = str(tmp_path / "env" / "secret.txt")
    program = f"""
import os, sys
sys.path.insert(0, {str(packages)!r})
from onlyhere import value
found = os.path.exists({secret!r})
"""
    asked = f"""
from llmdistill.verify.code import run_tests
verdict = run_tests({program!r}, "assert value == 7 and not found", time_limit_s=20, memory_limit_mb=512)
assert verdict.passed, verdict
"""
    environment = {**os.environ, "PYTHONPATH": f"{packages}:{Path(__file__).resolve().parents[2]}"}
    subprocess.run([sys.executable, "-c", asked], check=True, env=environment, timeout=120)
