"""Programs that attack: none may pass, hang, reach anything outside, or leave anything behind.

Each attack runs in every mode that this machine grants, and all of them once more as an unprivileged user.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

from llmdistill.errors import UserError
from llmdistill.verify.code import run_stdin, run_tests
from llmdistill.verify.sandbox import Sandbox
from tests.verify.attack_programs import REACHING_OUT, RESOURCES
from tests.verify.forgery_programs import FORGERY

REPO = Path(__file__).parents[2]
ATTACKS = RESOURCES | REACHING_OUT | FORGERY

# Where a float is compared, as the plus suites do; anything that these attacks answer must fail here.
TESTS = (
    "import math\ntry:\n    import numpy as np\nexcept ImportError:\n    np = None\n"
    "r = f(3)\nassert r == 6 or (np is not None and isinstance(r, (float, list)) and np.allclose(r, 6.0)), r\n"
    "assert math.isclose(r, 6) and abs(r - 6) < 1e-6 and len([r]) == 1 and all([r == 6])\n"
)


class Scene:
    """A home with a secret, two listeners, and what to look for afterwards."""

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
        assert "SESAME" not in detail and "root:" not in detail
        assert self.token not in detail.replace(f"/{self.token}", "")
        assert self.state() == self.before
        for place in ("/tmp", "/var/tmp", "/dev/shm", "/", "/usr/lib", "/run", os.getcwd()):
            assert not [name for name in os.listdir(place) if self.token in name], place
        for listener in (self.tcp, self.abstract):
            with pytest.raises(BlockingIOError):
                listener.accept()
        with pytest.raises(BlockingIOError):
            self.datagrams.recv(10)

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


@pytest.fixture(scope="module", params=["namespaces", "landlock"])
def pool(request):
    try:
        made = Sandbox(1, mode=request.param)
    except UserError as error:
        pytest.skip(str(error))
    with made:
        yield made


@pytest.fixture(scope="module")
def scene():
    made = Scene()
    yield made
    made.close()


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name, pool, scene):
    """Not passed, over in time, nothing read, written, reached or left; and the next program is judged as ever."""
    program = scene.program(ATTACKS[name])
    before = descendants(os.getpid())
    start = time.monotonic()
    verdict = run_tests(program, TESTS, time_limit_s=0.4, memory_limit_mb=400, sandbox=pool)
    assert time.monotonic() - start < 20  # a busy machine is slow to fork; a hang is for ever
    assert not verdict.passed and verdict.kind != "pass", verdict
    assert len(verdict.detail) < 10_000
    scene.check(verdict.detail)
    assert descendants(os.getpid()) == before
    assert run_tests("def f(x): return 2 * x", TESTS, sandbox=pool).passed


SCRIPTS = {
    "endless output": ("while True: print('x' * 10**6)", "violation timeout"),
    "endless errors": (
        "import sys\nwhile True: print('x' * 10**6, file=sys.stderr)",
        "violation timeout runtime_error",
    ),
    "daemon that prints": ("import os\nif os.fork() == 0: os.setsid()\nprint(6)", "violation"),
    "prints the listing": (
        "import os\nprint(os.listdir('/'))\nprint(open('SECRET').read())",
        "violation runtime_error",
    ),
    "reads its output back": ("import os\nprint(os.pread(1, 99, 0), os.pread(2, 99, 0))", "wrong runtime_error"),
    "exits early": ("import os\nos._exit(0)", "wrong"),
    "ignores a signal": ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", "timeout"),
    "thread that stays": ("import threading as t, time\nt.Thread(target=time.sleep, args=[99]).start()", "timeout"),
    "numbers that explode": ("print('1e999999999')", "wrong"),
    "stops": ("import os\nos.kill(os.getpid(), 19)", "timeout"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_attacking_script(name, pool, scene):
    program, kinds = SCRIPTS[name]
    verdict = run_stdin(scene.program(program), [("3\n", "6\n")], time_limit_s=0.4, memory_limit_mb=400, sandbox=pool)
    assert verdict.kind in kinds.split(), verdict
    scene.check(verdict.detail)


def test_expected_outputs_are_not_in_the_programs_memory(pool):
    """A program that scans its own memory finds neither this run's tests nor those of the run before. That the scan
    finds what is there shows a program that holds the needle itself."""
    program = (
        "import ctypes, os\n"
        "here = 'a text that lies where texts lie'\n"
        "def f(x):\n"
        "    bases = {id(o) & ~0xffffff for o in (f, here, f.__code__, bytearray(10**6), [0] * 1000)}\n"
        "    starts = {s for b in bases for s in range(b - (32 << 20), b + (48 << 20), 4096)}\n"
        "    r, w = os.pipe()\n"
        "    hits = 0\n"
        "    libc = ctypes.CDLL(None)\n"
        "    for start in starts:\n"
        "        # write(2) from an unmapped page fails with EFAULT instead of killing us\n"
        "        n = libc.write(w, ctypes.c_void_p(start), ctypes.c_size_t(4096))\n"
        "        page = os.read(r, n) if n > 0 else b''\n"
        "        at = page.find(b'-7351')\n"
        "        hits += at >= 6 and page[at - 6 : at][::-1] == b'ELDEEN'\n"
        "    return hits\n"
    )
    tests = "assert f(3) == 0, 'NEEDLE-7351'\n"
    for _ in range(2):
        verdict = run_tests(program, tests, time_limit_s=20, sandbox=pool)
        assert verdict.passed, verdict
    control = run_tests(program + "own = 'NEEDLE-7351'\n", "assert f(3) > 0", time_limit_s=20, sandbox=pool)
    assert control.passed, control


UNPRIVILEGED = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import types
import importlib.util
spec = importlib.util.spec_from_file_location("attacks", sys.argv[1] + "/attacks.py")
stub = types.ModuleType("pytest")
class Raises:
    def __init__(self, kind): self.kind = kind
    def __enter__(self): pass
    def __exit__(self, kind, *_):
        assert kind is not None and issubclass(kind, self.kind)
        return True
stub.raises = Raises
stub.fixture = lambda *a, **k: (lambda f: f)
stub.mark = types.SimpleNamespace(parametrize=lambda *a, **k: (lambda f: f), slow=lambda f: f)
sys.modules["pytest"] = stub
attacks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(attacks)
assert os.geteuid() != 0
modes = {}
for mode in ("namespaces", "landlock"):
    try:
        pool = attacks.Sandbox(1, mode=mode)
    except attacks.UserError as error:
        modes[mode] = str(error)
        continue
    scene = attacks.Scene()
    for name in attacks.ATTACKS:
        try:
            attacks.test_attack(name, pool, scene)
        except AssertionError as error:
            raise SystemExit(f"{mode}: {name}: {error}")
    modes[mode] = pool.means
    pool.close()
    scene.close()
    assert attacks.descendants(os.getpid()) == set()
print(json.dumps(modes))
"""


@pytest.mark.slow
def test_as_an_unprivileged_user(tmp_path_factory):
    """The same attacks by another uid, with a Python that this uid can read."""
    python = next((p for p in ("/usr/bin/python3", "/usr/local/bin/python3") if os.path.exists(p)), None)
    if os.geteuid() != 0 or python is None:
        pytest.skip("needs root, to become another user, and a system Python")
    if subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode:
        pytest.skip(f"{python} is older than 3.11")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        package = Path(folder) / "llmdistill"
        shutil.copytree(REPO / "llmdistill/verify", package / "verify", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPO / "llmdistill/errors.py", package)
        (package / "__init__.py").write_text("")
        (package / "verify/__init__.py").write_text("")
        shutil.copy(__file__, Path(folder) / "attacks.py")
        tests = Path(folder) / "tests/verify"
        tests.mkdir(parents=True)
        for name in ("attack_programs.py", "forgery_programs.py"):
            shutil.copy(Path(__file__).with_name(name), tests)
        (Path(folder) / "home").mkdir()
        for path in [Path(folder), *Path(folder).rglob("*")]:
            path.chmod(0o755)
        os.chown(Path(folder) / "home", 65534, 65534)
        done = subprocess.run(
            [python, "-c", UNPRIVILEGED, folder],
            user=65534, group=65534, extra_groups=[], cwd="/", capture_output=True, text=True, timeout=300,
            env={"ATTACK_HOME": f"{folder}/home", "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    modes = json.loads(done.stdout)
    assert any(isinstance(means, dict) for means in modes.values()), modes
    print(modes, file=sys.stderr)
