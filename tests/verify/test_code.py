"""Verdicts on honest programs: right ones pass, wrong ones fail for the right reason, whole benchmarks included."""

import gzip
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmdistill.errors import UserError
from llmdistill.verify.code import judge_program, run_functional, run_stdin, run_tests
from llmdistill.verify.printed import differs
from llmdistill.verify.sandbox import Sandbox

DATA = Path(os.environ.get("LLMDISTILL_DATA", Path(__file__).parents[3] / "shared/data")) / "benchmarks"


def read(name: str) -> list[dict]:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"no {name} in {DATA}; set LLMDISTILL_DATA")
    with gzip.open(path, "rt") if name.endswith("gz") else path.open() as lines:
        return [json.loads(line) for line in lines]


def humaneval(row: dict) -> tuple[str, str, dict]:
    tests = {"style": "asserts", "test": row["test"], "entry_point": row["entry_point"], "setup": row["prompt"]}
    return row["prompt"] + row["canonical_solution"], row["prompt"] + "    pass\n", tests


def mbpp(row: dict) -> tuple[str, str, dict]:
    setup = "\n".join([*row.get("test_imports", []), row.get("test_setup_code", "")])
    tests = {"style": "asserts", "test": row["test"], "entry_point": row["entry_point"], "setup": setup}
    return row["canonical_solution"], f"def {row['entry_point']}(*a, **k):\n    pass\n", tests


def leetcode(row: dict) -> tuple[str, str, dict]:
    name = row["entry_point"].partition(".")[2]
    tests = {"style": "asserts", "test": row["test"], "entry_point": row["entry_point"], "preamble": row["preamble"]}
    return row["canonical_solution"], f"class Solution:\n    def {name}(self, *a, **k):\n        pass\n", tests


# Upstream these oracles compute whether the answer is right and do not assert it: everything passes.
TESTS_NOTHING = {"Mbpp/737", "Mbpp/787", "Mbpp/794"}


@pytest.mark.parametrize(
    "every",
    [pytest.param(4, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.proof)],
    ids=["a fourth", "all"],
)
@pytest.mark.parametrize(
    "name, form",
    [
        ("humaneval.jsonl", humaneval),
        ("humanevalplus.jsonl.gz", humaneval),
        ("mbpp.jsonl", mbpp),
        ("mbpp_sanitized.jsonl", mbpp),
        ("mbppplus.jsonl.gz", mbpp),
        ("leetcode_functional.jsonl", leetcode),
    ],
)
def test_reference_solutions_score_100_and_empty_ones_0(name, form, every):
    """The check that execution really happens: a harness that runs nothing, or everything, fails it."""
    rows = read(name)[::every]
    jobs = [(row["id"], *form(row)) for row in rows]
    with ThreadPoolExecutor(2) as threads:
        right = list(threads.map(lambda job: judge_program(job[1], job[3]), jobs))
        empty = list(threads.map(lambda job: judge_program(job[2], job[3]), jobs))
    failed = {job[0]: (v.kind, v.detail) for job, v in zip(jobs, right, strict=True) if not v.passed}
    assert not failed
    assert {job[0] for job, v in zip(jobs, empty, strict=True) if v.passed} - TESTS_NOTHING == set()


MADE_UP = [
    ("def double(x):\n    return 2 * x", "assert double(3) == 6\nassert double('a') == 'aa'", "pass"),
    ("\ufeffdef double(x):\n    return 2 * x", "\ufeffassert double(3) == 6", "pass"),
    ("def double(x):\n    return x", "assert double(3) == 6", "wrong"),
    ("def double(x):\n    return x / 0", "assert double(3) == 6", "runtime_error"),
    ("def double(x):\n    while True: pass", "assert double(3) == 6", "timeout"),
    ("import time\ndef double(x):\n    time.sleep(99)", "assert double(3) == 6", "timeout"),
    ("def double(x):\n    return [0] * 10**10", "assert double(3) == 6", "memory"),
    ("def double(x:\n    return", "assert double(3) == 6", "syntax_error"),
    ("def other(x):\n    return 6", "assert double(3) == 6", "runtime_error"),
    ("raise ValueError('at load')", "assert double(3) == 6", "runtime_error"),
    ("", "assert double(3) == 6", "no_program"),
    ("def double(x):\n    assert False", "assert double(3) == 6", "runtime_error"),
    ("def double(x): return double(x)", "assert double(3) == 6", "runtime_error"),
    ("def double(x):\n    import os\n    os.fork()", "assert double(3) == 6", "violation"),
    ("def double(x):\n    import socket\n    socket.socket()", "assert double(3) == 6", "violation"),
]


@pytest.mark.parametrize("program, tests, kind", MADE_UP)
def test_kinds_of_verdict(program, tests, kind):
    limit = 0.5 if kind == "timeout" else 20.0
    verdict = run_tests(program, tests, time_limit_s=limit, memory_limit_mb=300)
    assert (verdict.kind, verdict.passed) == (kind, kind == "pass"), verdict
    assert verdict.seconds < limit + 5


@pytest.mark.parametrize(
    "value",
    [
        "None, True, 1, -1.5, 2**80, 1e300, float('inf'), 'é\\ud800', b'\\x00\\xff', 1j, 10**4000",
        "[1, [2, (3, {4})]], {'a': (1, 2), 3: [None]}, frozenset({1}), bytearray(b'x'), range(3), ...",
        "__import__('collections').deque([1, (2,)]), __import__('fractions').Fraction(1, 3)",
        "__import__('decimal').Decimal('1.10'), __import__('datetime').datetime(2024, 2, 29, 1)",
        "[(1, 2)] * 3000, [(i % 3, 'ab') for i in range(3000)], [(i, 1.0) for i in range(3000)]",
    ],
)
def test_plain_data_crosses_unchanged(value):
    """What goes to the program and back is equal and of the same types, at every depth."""
    tests = f"sent = ({value})\ngot = echo(sent)\nassert got == sent and repr(got) == repr(sent)\n"
    verdict = run_tests("def echo(x):\n    return x", tests)
    assert verdict.passed, verdict


def test_numpy_crosses():
    pytest.importorskip("numpy")
    program = "import numpy as np\ndef f(a):\n    return a * 2, a.sum(), np.float64(0.5)"
    tests = "import numpy as np\na, s, x = f(np.arange(4).reshape(2, 2))\nassert a.shape == (2, 2) and a[1, 1] == 6\n"
    verdict = run_tests(program, tests + "assert s == 6 and isinstance(s, np.integer) and x == 0.5\n")
    assert verdict.passed, verdict


def test_subclasses_count_as_their_plain_type():
    program = (
        "from collections import Counter, defaultdict, namedtuple, OrderedDict\nfrom enum import IntEnum\n"
        "class E(IntEnum):\n    A = 3\nP = namedtuple('P', 'x y')\n"
        "def f(): return [Counter('aab'), defaultdict(int, {1: 2}), P(1, 2), E.A, OrderedDict(a=1)]"
    )
    assert run_tests(program, "assert f() == [{'a': 2, 'b': 1}, {1: 2}, (1, 2), 3, {'a': 1}]").passed


def test_exceptions_cross_by_builtin_class():
    program = "class Bad(ValueError): pass\ndef f(x):\n    raise Bad(f'no {x}')"
    tests = "try:\n    f(3)\nexcept ValueError as e:\n    assert 'no 3' in str(e)\nelse:\n    assert False\n"
    assert run_tests(program, tests).passed
    assert run_tests("def f(x): pass", tests).kind == "wrong"


def test_objects_and_classes_of_the_program():
    program = (
        "class Stack:\n    def __init__(self, *xs): self.xs = list(xs)\n    def push(self, x): self.xs.append(x)\n"
        "    def __len__(self): return len(self.xs)\n    def __iter__(self): return iter(self.xs)\n"
        "    def __eq__(self, o): return self.xs == o.xs\n    def __repr__(self): return f'Stack{self.xs}'\n"
        "def make(n):\n    return Stack(*range(n))\ndef total(stacks): return sum(len(s) for s in stacks)\n"
        "def count(n):\n    for i in range(n): yield i\nLIMIT = 10\n"
    )
    tests = (
        "s = Stack(1)\ns.push(2)\nassert len(s) == 2 and list(s) == [1, 2] and s.xs == [1, 2]\n"
        "assert repr(s) == 'Stack[1, 2]'\n"
        "assert make(3) == Stack(0, 1, 2) and make(2) != Stack()\n"
        "assert isinstance(s, Stack) and not isinstance(1, Stack)\n"
        "assert total([s, make(3)]) == 5\nassert list(count(3)) == [0, 1, 2]\nassert LIMIT == 10\n"
        "s.xs = [7]\nassert len(s) == 1\n"
    )
    verdict = run_tests(program, tests)
    assert verdict.passed, verdict


def test_functions_as_arguments():
    program = "def apply(f, xs): return [f(x) for x in xs]"
    tests = "import math\nassert apply(lambda x: x + 1, [1, 2]) == [2, 3]\nassert apply(abs, [-1]) == [1]\n"
    tests += "assert apply(math.sqrt, iter([4])) == [2.0]\nassert apply(str, (1,)) == ['1']\n"
    assert run_tests(program, tests).passed


def test_more_that_tests_do():
    """Own exceptions, captured output, with blocks, arithmetic of the program's classes, coroutines, enum members."""
    for program, tests in [
        ("class E(KeyError): pass\ndef f(x): raise E(x)", "try: f(1)\nexcept E as e: assert isinstance(e, KeyError)"),
        ("class E(Exception): pass\ndef f(x): raise E(x)", "import unittest\nwith T.assertRaises(E): f(1)"),
        ("def f(): print('hi')", "import io, contextlib as c\nb = io.StringIO()\nwith c.redirect_stdout(b): f()\n"
         "assert b.getvalue() == 'hi\\n'"),
        ("class C:\n def __enter__(s): return 6\n def __exit__(s, *a): pass", "with C() as c: assert c == 6"),
        ("class V:\n def __init__(s, x): s.x = x\n def __mul__(s, k): return V(s.x * k)\n __rmul__ = __mul__\n"
         " def __neg__(s): return V(-s.x)\n def __eq__(s, o): return s.x == o.x",
         "assert V(1) * 3 == V(3) == 3 * V(1) and -V(1) == V(-1) and V(1) != V(2)"),
        ("async def f(x): return x", "import asyncio\nassert asyncio.run(f(3)) == 3"),
        ("from enum import Enum\nclass C(Enum): A = 1\ndef f(): return C.A", "assert f() is C.A and f().value == 1"),
    ]:  # fmt: skip
        verdict = run_tests(program, "import unittest\nT = unittest.TestCase()\n" + tests)
        assert verdict.passed, (tests, verdict)


def test_arguments_change_in_calls_that_are_statements():
    """As the docstring of run_tests says, and not inside an expression."""
    program = "def tidy(xs, seen):\n    xs.sort()\n    seen['n'] = len(xs)\n    return 0\n"
    tests = "xs, seen = [3, 1, 2], {}\ntidy(xs, seen)\nassert xs == [1, 2, 3] and seen == {'n': 3}\n"
    assert run_tests(program, tests).passed
    assert run_tests(program, "xs = [3, 1]\nassert tidy(xs, {}) == 0\nassert xs == [3, 1]\n").passed


def test_unittest_and_functions_named_test():
    case = "import unittest\nclass T(unittest.TestCase):\n    def test_f(self): self.assertEqual(f(2), 4)\n"
    case += "unittest.main()\n"
    assert run_tests("def f(x): return x * x", case).passed
    assert not run_tests("def f(x): return x", case).passed


def test_tests_that_use_nothing_of_the_program_do_not_pass():
    assert not run_tests("def f(x): return x", "assert True").passed
    assert not run_tests("def f(x): return x", "def check(g):\n    assert g(1) == 1").passed


def test_setup_wins_over_the_program_and_the_entry_point_over_the_setup():
    """HumanEval/38: decode(encode(s)) == s must not be passed by two functions that do nothing."""
    setup = "def encode(s): return s[::-1]\ndef decode(s):\n    'the prompt'\n"
    tests = {"style": "asserts", "test": "def check(f):\n    assert f(encode('ab')) == 'ab'", "entry_point": "decode"}
    tests["setup"] = setup
    assert judge_program("def encode(s): return s[::-1]\ndef decode(s): return s[::-1]", tests).passed
    assert judge_program("def encode(s): return s\ndef decode(s): return s", tests).kind == "wrong"


def test_main_blocks_run_as_scripts_only():
    program = "def f(): return 1\nif __name__ == '__main__':\n    print(input())\n"
    assert run_tests(program, "assert f() == 1").passed
    assert run_stdin(program, [("x\n", "x\n")]).passed


STDIN = [
    ("print(sum(map(int, input().split())))", "pass"),
    ("import sys\nprint(sum(int(x) for x in sys.stdin.read().split()))", "pass"),
    ("import sys\nsys.stdout.write(str(sum(map(int, sys.stdin.buffer.readline().split()))) + '\\n\\n')", "pass"),
    ("import os\nos.write(1, str(sum(map(int, os.read(0, 99).split()))).encode())", "pass"),
    ("print(sum(map(int, open(0).read().split())))", "pass"),
    ("def main():\n    print(f'{sum(map(int, input().split()))}.0  ')\nif __name__ == '__main__':\n    main()", "pass"),
    ("import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 26)\n"
     "def main():\n    print(sum(map(int, input().split())))\nthreading.Thread(target=main).start()", "pass"),
    ("import atexit, sys, io\nout = io.StringIO()\natexit.register(lambda: sys.__stdout__.write(out.getvalue()))\n"
     "print(sum(map(int, input().split())), file=out)", "pass"),
    ("print(sum(map(int, input().split())))\nimport sys\nsys.exit(0)", "pass"),
    ("import asyncio\nasync def m():\n    await asyncio.sleep(0)\n    print(3)\nasyncio.run(m())", "pass"),
    ("import numpy as np\nprint(np.array(input().split(), dtype=int).sum())", "pass"),
    ("open('note', 'w').write('3')\nprint(open('note').read())", "pass"),
    ("print(4)", "wrong"),
    ("print('3 3')", "wrong"),
    ("print(3)\nprint(3)", "wrong"),
    ("", "no_program"),
    ("pass", "wrong"),
    ("print(3)\nraise ValueError", "runtime_error"),
    ("print(3)\nimport sys\nsys.exit(1)", "runtime_error"),
    ("input()\ninput()", "runtime_error"),
    ("print(3", "syntax_error"),
    ("while True: pass", "timeout"),
    ("x = 'a' * 10**10", "memory"),
    ("import os\nos.system('ls')", "violation"),
]  # fmt: skip


@pytest.mark.parametrize("program, kind", STDIN)
def test_standard_input(program, kind):
    limit = 0.5 if kind == "timeout" else 20.0
    verdict = run_stdin(program, [("1 2\n", "3\n"), ("1 2", "3")], time_limit_s=limit)
    assert verdict.kind == kind, verdict


def test_numbers_in_output():
    """Integers exactly, fractions within 1e-6, text as it is."""
    assert run_stdin("print(0.3333333)", [("", "0.33333333")]).passed
    assert run_stdin("print('YES', 1.0, '1e3')", [("", "YES 1 1000")]).passed
    assert not run_stdin("print(0.334)", [("", "0.33333333")]).passed
    assert not run_stdin("print(10**18 + 1)", [("", str(10**18))]).passed
    assert not run_stdin("print('yes')", [("", "YES")]).passed
    assert not run_stdin("print('nan')", [("", "0.5")]).passed


@pytest.mark.parametrize(
    "expected, got",
    [
        ("0110", "110"), ("110", "0110"), ("1000", "1_000"), ("3", "\u0663"), ("007", "7"), ("5", "+5"), ("0", "00"),
        ("1", "1\u00a0"), ("12", "1\u20612"), ("0.5", ".5e"), ("-0110", "-110"), ("1e3", "0x3e8"), ("²", "2"),
    ],
)  # fmt: skip
def test_digits_that_are_no_such_number(expected, got):
    """Strings of digits, other alphabets' digits and Python's own spellings are text."""
    assert differs(expected, got) and differs(f"x {expected}", f"x {got}")
    assert differs(expected, expected) is None


def test_numbers_that_are_written_in_other_ways():
    for expected, got in (("2", "2.0"), ("0.3", "0.30000000000000004"), ("1e-7", "0.0000001"), ("-1.5", "-1.50"),
                          ("123456789.123456", "123456789.123999"), ("1 2\n3", "1.0  2\n3\n\n"),
                          ("0", "-0.0")):  # fmt: skip
        assert differs(expected, got) is None, (expected, got)
    assert differs("1\n2", "1\n\n2") and differs("1", "1 1") and differs("1 1", "1") and differs("0.333333", "0.333")
    assert "line 2" in (differs("1\n2\n3", "1\n4\n3") or "")


UNCALLED = [
    "def test_a():\n    assert f(1) == 2\n",
    "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        self.assertEqual(f(1), 2)\n",
    "class TestF:\n    def setup_method(self): self.x = 1\n    def test_a(self):\n        assert f(self.x) == 2\n",
    "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        self.assertEqual(f(1), 2)\n"
    "unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(T))\n",
    "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        self.assertEqual(f(1), 2)\n"
    "unittest.main(exit=False)\n",
    "async def test_a():\n    assert f(1) == 2\n",
    "assert f(1) > 1\ndef test_a():\n    assert f(1) == 2\n",
    "import pytest\n@pytest.mark.parametrize('x, y', [(2, 4), pytest.param(1, 2)])\n"
    "def test_a(x, y):\n    assert f(x) == y\n",
    "import pytest\n@pytest.mark.parametrize('x', [2, 1])\n@pytest.mark.parametrize(('k',), [[1], [2]])\n"
    "def test_a(x, k, more=0):\n    assert f(x * k) == 2 * x * k\n",
    "import pytest\nclass TestF:\n    @pytest.mark.parametrize(argnames='x', argvalues=[2, 1])\n"
    "    def test_a(this, x):\n        assert f(x) == 2 * x\n",
]


@pytest.mark.parametrize("tests", UNCALLED)
def test_tests_that_nobody_calls_are_run(tests):
    assert run_tests("def f(x): return 2 * x", tests).passed
    assert run_tests("def f(x): return x + 2", tests).kind == "wrong"


def test_tests_that_are_defined_and_cannot_be_run_do_not_pass():
    for tests in ("def check(g):\n    assert g(1) == 2\n", "def helper():\n    assert f(1) == 2\n",
                  "def test_a(fixture):\n    assert f(1) == fixture\n", "x = lambda: f(1) == 2\n"):  # fmt: skip
        assert run_tests("def f(x): return 2 * x", tests).kind == "wrong", tests
        assert run_tests("helper = check = x = fixture = 1\ndef f(x): return 2 * x", tests).kind == "wrong", tests
    assert run_tests("LIMIT = 10", "assert LIMIT == 10").passed


def test_globals_of_the_program_that_a_call_changes():
    program = "count, log, last = 0, [], None\ndef f(x):\n    global count, last, first\n    count += 1\n"
    program += "    log.append(x)\n    last = first = {'x': x}\n"
    tests = "assert count == 0 and log == []\nf(3)\nassert count == 1 and log == [3] and last == first == {'x': 3}\n"
    tests += "f(4)\nassert count == 2 and log == [3, 4] and last['x'] == 4\n"
    verdict = run_tests(program, tests)
    assert verdict.passed, verdict
    assert run_tests(program, "count = 7\nf(1)\nassert count == 7").passed, "what the tests have rebound is theirs"


SURROUNDINGS = [
    "import resource\nfor s in ((2**28, -1), (-1, -1), [2**28, resource.RLIM_INFINITY]):\n"
    "    resource.setrlimit(resource.RLIMIT_STACK, s)\nprint(input())",
    "print(open('/dev/stdin').read())",
    "from pathlib import Path\nprint(Path('/dev/stdin').read_text())",
    "import os\nprint(os.read(os.open('/dev/stdin', os.O_RDONLY), 99).decode())",
    "open('/dev/stdout', 'w').write(input())",
    "import fileinput\nprint(*fileinput.input('/dev/stdin'))",
    "import os, sys\nassert os.path.isabs(os.path.abspath(__file__)) and sys.argv[0] == __file__\nprint(input())",
    "\ufeffprint(input())",
    "print(len(str(10 ** 5000)) and input())",
    f"assert {'7' * 5000} % 10 == 7\nprint(input())",
]


@pytest.mark.parametrize("program", SURROUNDINGS)
@pytest.mark.parametrize("mode", ["namespaces", "landlock"])
def test_what_programs_expect_around_them(program, mode, sandboxes):
    verdict = run_stdin(program, [("1 2\n", "1 2\n")], sandbox=sandboxes(mode))
    assert verdict.passed, verdict


@pytest.fixture(scope="module")
def sandboxes():
    made = {}

    def get(mode):
        try:
            if mode not in made:
                made[mode] = Sandbox(1, mode=mode)
        except UserError as error:
            pytest.skip(str(error))
        return made[mode]

    yield get
    for sandbox in made.values():
        sandbox.close()


def test_numbers_of_any_length_in_the_harness():
    """Python's limit of 4,300 digits is one for web servers: arguments, answers and literals may be longer."""
    seven = "7" * 6000
    assert run_functional("def f(n): return 10 ** n", "f", [("5000", "1" + "0" * 5000)]).passed
    assert run_functional("def f(n): return n", "f", [(seven, seven)]).passed
    assert run_functional("def f(n): return n + 1", "f", [(seven, seven)]).kind == "wrong"
    assert run_tests("def f(n): return str(7 ** n)", "assert len(f(9000)) == len(str(7 ** 9000))").passed
    assert run_tests("def f(n): return n", f"assert f({seven}) == {seven}").passed
    assert run_tests("def f(n): return n + 1", f"assert f({seven}) == {seven}, f({seven})").kind == "wrong"
    assert run_stdin("print(int(input()) * 10)", [(seven, seven + "0")]).passed


def test_functional():
    """The two forms in which LiveCodeBench writes arguments, methods and functions, JSON's words."""
    method = (
        "class Solution:\n    def add(self, n: int, xs: List[List[int]]) -> int:\n        return n + sum(map(sum, xs))"
    )
    cases = [
        ("n = 5, xs = [[2,4],[0]]", "11"),
        ("xs = [[1]], n = 1", "2"),
        ("5\n[[1], [2]]", "8"),
        ("n = 1\nxs = []", "1"),
    ]
    for name in ("add", "Solution().add"):
        assert run_functional(method, name, cases).passed
    assert run_functional(method, "add", [("n = 5, xs = [[2,4]]", "12")]).kind == "wrong"
    assert run_functional("def add(a, b): return a + sum(map(sum, b))", "add", cases[:1]).passed
    flip = "class Solution:\n    def flip(self, a, s): return [not a, s, None]"
    assert run_functional(flip, "flip", [('a = true, s = "x, y = 1"', '[false,"x, y = 1",null]')]).passed
    assert run_functional("def f(x): return x / 3", "f", [("1", "0.33333333")]).passed
    assert run_functional("def f(x): return (x, str(x))", "f", [("x = -1", "[-1, '-1']")]).passed
    assert run_functional("def g(x): return x", "f", [("1", "1")]).kind == "runtime_error"
    assert run_functional("def f(x): return 1 / x", "f", [("1", "1"), ("0", "0")]).kind == "runtime_error"


def test_linked_lists_of_the_preamble_cross():
    """Objects of the preamble's classes go over as such, of any length."""
    preamble = "class ListNode:\n    def __init__(self, val=0, next=None): self.val, self.next = val, next\n"
    program = "class Solution:\n    def length(self, head):\n        n = 0\n"
    program += "        while head: head, n = head.next, n + 1\n        return n"
    tests = "head = None\nfor i in range(3000): head = ListNode(i, head)\nassert Solution().length(head) == 3000\n"
    assert run_tests(program, tests, preamble=preamble).passed


@pytest.mark.parametrize("name", ["livecodebench_v5_public.jsonl", "code_contests_stdio.jsonl"])
def test_every_row_of_the_suites_without_references_can_be_judged(name):
    """A program that prints or returns nothing is wrong everywhere, and no row's tests are refused."""
    for row in read(name)[::9]:
        cases = json.loads(row["test"])
        tests = {"style": row["test_type"], "cases": cases}
        program = "pass\n"
        if row["test_type"] == "functional":
            tests["entry_point"] = row["entry_point"]
            program = row["starter_code"].rstrip() + "\n        pass\n"
        assert judge_program(program, tests).kind == "wrong", row["id"]


LCB_SOLUTIONS = {
    "lcb_v5/3517": (
        "class Solution:\n    def shortestDistanceAfterQueries(self, n: int, queries: List[List[int]]) -> List[int]:\n"
        "        back = [[i - 1] for i in range(n)]\n        out = []\n        for a, b in queries:\n"
        "            back[b].append(a)\n            d = [0] * n\n            for i in range(1, n):\n"
        "                d[i] = min(d[j] for j in back[i]) + 1\n            out.append(d[-1])\n        return out\n"
    ),
    "lcb_v5/abc365_d": (
        "n = int(input())\ns = input().strip()\nwin = {'R': 'P', 'P': 'S', 'S': 'R'}\nbest = {h: 0 for h in 'RPS'}\n"
        "for c in s:\n    new = {}\n    for h in 'RPS':\n        if win[h] == c: continue\n"
        "        new[h] = max(v for g, v in best.items() if g != h) + (win[c] == h)\n    best = new\n"
        "print(max(best.values()))\n"
    ),
}


@pytest.mark.parametrize("row_id", LCB_SOLUTIONS)
def test_own_solutions_of_livecodebench(row_id):
    row = next(row for row in read("livecodebench_v5_public.jsonl") if row["id"] == row_id)
    tests = {"style": row["test_type"], "cases": json.loads(row["test"])}
    if row["test_type"] == "functional":
        tests["entry_point"] = row["entry_point"]
    verdict = judge_program(LCB_SOLUTIONS[row_id], tests)
    assert verdict.passed, verdict


def test_bad_input_is_named():
    """Mistakes in what the user gives are UserErrors that say what to change, not verdicts on the program."""
    for tests, word in [
        ({"style": "assert"}, "style"),
        ({"style": "asserts"}, "test"),
        ({"style": "stdin", "cases": []}, "cases"),
        ({"style": "asserts", "test": "assert (", "entry_point": "f"}, "tests"),
        ({"style": "asserts", "test": "assert f()", "tset": 1}, "tset"),
    ]:
        with pytest.raises(UserError, match=word):
            judge_program("def f(): pass", tests)
    with pytest.raises(UserError, match="time_limit_s"):
        run_tests("def f(): pass", "f()", time_limit_s=0)
    assert judge_program(None, {"style": "stdin", "cases": [["", ""]]}).kind == "no_program"


def test_output_that_is_far_too_long_is_wrong_unread():
    """Megabytes are no answer to a question of one line, and are not gone through by who asks; to one of megabytes
    they are."""
    million = "print('6' + ' ' * (2 << 20))"  # the right word, and two megabytes of nothing
    verdict = run_stdin(million, [("", "6\n")])
    assert verdict.kind == "wrong" and "2097154 bytes; what was expected has 2 characters" in verdict.detail
    lines = "for i in range(300_000): print(i, end='  \\n')"
    assert run_stdin(lines, [("", "".join(f"{i}\n" for i in range(300_000)))], time_limit_s=60).passed
