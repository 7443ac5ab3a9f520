"""Runs attacks and says what they reached. Without pytest: another user's Python runs this file too.

python -m tests.verify.attack_runner [whole]   # all attacks in all modes that this machine grants: reports as JSON
"""

import json
import os
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from llmdistill.errors import UserError
from llmdistill.verify.code import Verdict, run_tests
from llmdistill.verify.sandbox import Sandbox
from tests.verify.attack_programs import REACHING_OUT
from tests.verify.attack_resources import RESOURCES
from tests.verify.forgery_programs import FORGERY, SLOW_BY_SHAPE
from tests.verify.forgery_shapes import SHAPES

TIME_LIMIT_S = 0.6  # endless attacks last this long
REPORTING_S = 20.0  # for those that have an end: a busy machine must not make a time-out of it
MEMORY_MB = 400
THREADS = {"uid": 64, "user": 1200}  # of a uid of their own; beyond what an ordinary user runs already
MODES = ("namespaces", "landlock")


class Scene:
    """A home with a secret, three listeners, and what to look for afterwards."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(dir=os.environ.get("ATTACK_HOME") or Path.home()))
        self.token = f"attack-{uuid.uuid4().hex}"
        self.secret = self.home / "secret"
        self.secret.write_text(f"SESAME {self.token}")
        self.before = self.state()
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.abstract = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.abstract.bind(f"\0{self.token}")
        self.abstract.listen()
        self.datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.datagrams.bind(f"\0{self.token}-d")
        for listener in (self.tcp, self.abstract, self.datagrams):
            listener.settimeout(0)
        os.environ["ATTACK_TOKEN"] = self.token

    def program(self, text: str) -> str:
        port, parent = str(self.tcp.getsockname()[1]), str(os.getpid())
        words = [("SECRET", str(self.secret)), ("HOME", str(self.home)), ("PORT", port), ("PARENT", parent)]
        for word, value in [*words, ("SOCKET", self.token), ("TOKEN", self.token)]:
            text = text.replace(word, value) if len(text) < 1 << 20 else text
        return text

    def state(self) -> tuple:
        status = self.secret.stat()
        return sorted(os.listdir(self.home)), self.secret.read_text(), status.st_mode, status.st_mtime_ns

    def check(self, detail: str) -> None:
        """Nothing of the secret in what a program said, nothing changed, nothing left, nothing received."""
        assert "SESAME" not in detail and "root:" not in detail, detail
        assert self.token not in detail.replace(f"/{self.token}", ""), detail
        assert self.state() == self.before
        for place in ("/tmp", "/var/tmp", "/dev/shm", "/", "/usr/lib", "/run", os.getcwd()):
            assert not [name for name in os.listdir(place) if self.token in name], place
        assert not self.received()

    def received(self) -> list[str]:
        """Listeners that somebody reached since the last time."""
        reached = []
        for name, receive in (("tcp", self.tcp.accept), ("abstract", self.abstract.accept)):
            with suppress(BlockingIOError):
                receive()[0].close()
                reached.append(name)
        with suppress(BlockingIOError):
            reached.append(self.datagrams.recv(99).decode())
        return reached

    def close(self) -> None:
        for listener in (self.tcp, self.abstract, self.datagrams):
            listener.close()
        shutil.rmtree(self.home)


def descendants(root: int) -> set[int]:
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


def reach_out(name: str, pool: Sandbox, scene: Scene) -> str:
    """Run the attack; its report. Raises AssertionError for one that reached something, or did not get to report."""
    program = scene.program(REACHING_OUT[name])
    tests = "found = f(3)\nassert found == [], found"
    verdict = run_tests(program, tests, time_limit_s=REPORTING_S, memory_limit_mb=MEMORY_MB, sandbox=pool)
    assert verdict.passed or verdict.kind == "violation", verdict
    scene.check(verdict.detail)
    return "refused, nothing reached" if verdict.passed else f"killed: {verdict.detail}"


def exhaust(title: str, pool: Sandbox, scene: Scene) -> str:
    """Run the attack; how it ended. Raises AssertionError where that is not one of the ends it may have."""
    name, kinds, claim = ([part.strip() for part in title.split("|")] + [""])[:3]
    threads = THREADS["user" if pool.means["switches_to_uid"] is None and os.geteuid() else "uid"]
    claim = claim.replace("THREADS", str(threads))
    tests = f"number = f(3)\nassert {claim.replace('f(3)', 'number')}, number" if claim else "assert f(3) == 6"
    limit = TIME_LIMIT_S if "timeout" in kinds else REPORTING_S
    program = scene.program(RESOURCES[title])
    start = time.monotonic()
    verdict = run_tests(program, tests, time_limit_s=limit, memory_limit_mb=MEMORY_MB, sandbox=pool)
    assert time.monotonic() - start < limit + 20  # a busy machine is slow to fork; a hang is for ever
    assert verdict.kind in kinds.split(), (name, verdict)
    assert len(verdict.detail) < 10_000
    scene.check(verdict.detail)
    return f"{verdict.kind}: {verdict.detail[:100]}"


def forge(name: str, shape: str, pool: Sandbox, scene: Scene) -> Verdict:
    """Judge a program that is wrong and wants to pass by tests of this shape. Raises AssertionError where it does, and
    where its time was over: that shows nothing."""
    slow = (name, shape) in SLOW_BY_SHAPE
    limits = {"time_limit_s": TIME_LIMIT_S if slow else REPORTING_S, "memory_limit_mb": MEMORY_MB}
    verdict = SHAPES[shape](scene.program(FORGERY[name]), sandbox=pool, **limits)
    assert not verdict.passed and verdict.kind != "pass", (name, shape, verdict)
    assert verdict.kind != "timeout" or slow, (name, shape, verdict)
    assert len(verdict.detail) < 10_000
    scene.check(verdict.detail)
    return verdict


def pairs(whole: bool) -> Iterator[tuple[str, str]]:
    """Every forgery with every shape; or every forgery with one shape, every shape with some: the judge is the same in
    all modes, and one of them sees every forgery with every shape (test_forgeries.py)."""
    shapes = list(SHAPES)
    if whole:
        return ((name, shape) for name in FORGERY for shape in shapes)
    return ((name, shapes[number % len(shapes)]) for number, name in enumerate(FORGERY))


def still_judges(pool: Sandbox) -> bool:
    return run_tests("def f(x): return 2 * x", "assert f(3) == 6", sandbox=pool).passed


def run_all(mode: str, whole: bool = False) -> dict[str, object]:
    """Every attack in this mode: what became of each."""
    pool, scene = Sandbox(1, mode=mode), Scene()
    with pool:
        assert still_judges(pool)
        before = descendants(os.getpid())
        report: dict[str, object] = {"means": pool.means}
        report["reaching out"] = {name: reach_out(name, pool, scene) for name in REACHING_OUT}
        report["resources"] = {name: exhaust(name, pool, scene) for name in RESOURCES}
        report["forgeries"] = {
            f"{name} | {shape}": forge(name, shape, pool, scene).kind for name, shape in pairs(whole)
        }
        assert descendants(os.getpid()) == before
        assert still_judges(pool)
    scene.close()
    return report


def run_everything(whole: bool = False) -> dict[str, object]:
    """The report of every mode, or why this machine does not grant it."""
    reports: dict[str, object] = {}
    for mode in MODES:
        try:
            reports[mode] = run_all(mode, whole)
        except UserError as refusal:
            reports[mode] = str(refusal)
    assert descendants(os.getpid()) == set()
    return reports


def table(reports: dict[str, object]) -> str:
    """How many attacks of a kind ended how, by mode."""
    lines = []
    for mode, report in reports.items():
        if not isinstance(report, dict):
            lines.append(f"| {mode} | not granted | | | {report} |")
            continue
        for kind in ("reaching out", "resources", "forgeries"):
            ends = Counter(str(end).partition(":")[0] for end in report[kind].values())
            told = ", ".join(f"{count} {end}" for end, count in ends.most_common())
            lines.append(f"| {mode} | {kind} | {len(report[kind])} | 0 | {told} |")
    return "\n".join(
        ["| mode | attacks | runs | reached something | how they ended |", "|---|---|---|---|---|", *lines]
    )


if __name__ == "__main__":
    json.dump(run_everything(sys.argv[1:] == ["whole"]), sys.stdout)
