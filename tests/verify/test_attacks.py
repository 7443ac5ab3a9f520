"""Programs that attack the machine: none may reach anything outside, hang, or leave anything behind.

Each attack runs in every mode that this machine grants, and all of them once more as an unprivileged user. It reports
what it reached (attack_programs.py), and a sandbox that lets everything pass shows that it would reach it.
"""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from llmdistill.errors import UserError
from llmdistill.verify.code import run_stdin, run_tests
from llmdistill.verify.sandbox import Sandbox
from tests.verify import attack_runner
from tests.verify.attack_programs import REACHING_OUT
from tests.verify.attack_resources import RESOURCES
from tests.verify.attack_runner import Scene, descendants, exhaust, reach_out, still_judges

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=attack_runner.MODES)
def pool(request):
    try:
        made = Sandbox(1, mode=request.param)
    except UserError as error:
        pytest.skip(str(error))
    with made:
        yield made


@pytest.mark.parametrize("name", REACHING_OUT)
def test_nothing_is_reached(name, pool, scene):
    """It tried, was refused or killed, and the next program is judged as ever."""
    before = descendants(os.getpid())
    reach_out(name, pool, scene)
    assert descendants(os.getpid()) == before
    assert still_judges(pool)


@pytest.mark.parametrize("name", RESOURCES)
def test_resources_are_limited(name, pool, scene):
    before = descendants(os.getpid())
    exhaust(name, pool, scene)
    assert descendants(os.getpid()) == before
    assert still_judges(pool)


# Attacks whose success does no harm to a machine that runs tests.
HARMLESS = ["read a secret", "list a folder", "read by link", "parent's memory", "connect", "abstract socket", "daemon"]
HARMLESS += ["pair to abstract socket", "write home", "change modes"]


def test_the_attacks_work_where_nothing_confines(nothing_confines):
    """The control: without confinement each of these reaches something, so that reaching nothing means something."""
    with Sandbox(1, allow_unsafe_exec=True) as unconfined:
        for name in HARMLESS:
            own = Scene()  # it will not be the same afterwards
            program = own.program(REACHING_OUT[name])
            verdict = run_tests(program, "assert f(3) == []", time_limit_s=20, sandbox=unconfined)
            left = [Path(place, own.token) for place in ("/var/tmp", "/dev/shm", "/", "/usr/lib", "/run")]
            for path in left:
                path.unlink(missing_ok=True)
                shutil.rmtree(f"{path}-d", ignore_errors=True)
            shutil.rmtree("/l", ignore_errors=True)
            Path("/l").unlink(missing_ok=True)
            own.close()
            assert verdict.kind == "wrong", (name, verdict)


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
    "lines by the million": ("print('\\n' * 10**7 + '6')", "wrong"),
    "stops": ("import os\nos.kill(os.getpid(), 19)", "timeout"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_attacking_script(name, pool, scene):
    program, kinds = SCRIPTS[name]
    limit = attack_runner.TIME_LIMIT_S if "timeout" in kinds else attack_runner.REPORTING_S
    verdict = run_stdin(scene.program(program), [("3\n", "6\n")], time_limit_s=limit, memory_limit_mb=400, sandbox=pool)
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
    # Many of them: one alone may lie across two pages, or in an arena that the system put far away.
    own = "own = ['NEEDLE-7351' + 'x' * (i % 400) for i in range(2000)]\n"
    control = run_tests(program + own, "assert f(3) > 0", time_limit_s=20, sandbox=pool)
    assert control.passed, control


def as_nobody(*words: str) -> dict[str, object]:
    """What the runner reports when another uid runs it, with a Python that this uid can read."""
    python = next((p for p in ("/usr/bin/python3", "/usr/local/bin/python3") if os.path.exists(p)), None)
    if os.geteuid() != 0 or python is None:
        pytest.skip("needs root, to become another user, and a system Python")
    if subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode:
        pytest.skip(f"{python} is older than 3.11")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        package, tests = Path(folder) / "llmdistill", Path(folder) / "tests/verify"
        shutil.copytree(REPO / "llmdistill/verify", package / "verify", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPO / "llmdistill/errors.py", package)
        for empty in (package / "__init__.py", package / "verify/__init__.py"):
            empty.write_text("")
        tests.mkdir(parents=True)
        for pattern in ("attack_*.py", "forgery_*.py"):
            for file in Path(__file__).parent.glob(pattern):
                shutil.copy(file, tests)
        (Path(folder) / "home").mkdir()
        for path in [Path(folder), *Path(folder).rglob("*")]:
            path.chmod(0o755)
        os.chown(Path(folder) / "home", 65534, 65534)
        done = subprocess.run(
            [python, "-m", "tests.verify.attack_runner", *words],
            user=65534, group=65534, extra_groups=[], cwd=folder, capture_output=True, text=True, timeout=1500,
            env={"ATTACK_HOME": f"{folder}/home", "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    reports = json.loads(done.stdout)
    granted = {mode: report["means"] for mode, report in reports.items() if isinstance(report, dict)}
    assert granted and all(means["switches_to_uid"] is None for means in granted.values()), reports
    return reports


@pytest.mark.slow
def test_as_an_unprivileged_user():
    as_nobody()


@pytest.mark.proof
@pytest.mark.parametrize("user", ["this user", "nobody"])
def test_every_attack_in_every_mode_and_every_forgery_by_tests_of_every_shape(user, capsys):
    """The table of eval/proof/verdicts.md; what this machine does not grant is said there."""
    reports = as_nobody("whole") if user == "nobody" else attack_runner.run_everything(whole=True)
    with capsys.disabled():
        print(f"\n{user}:\n{attack_runner.table(reports)}")
