"""The shapes that tests have, all of one question: f(x) is 2 x. For forgeries, which must fail each of them.

A right program passes every shape and a wrong one fails it (test_forgeries.py), so that a forgery that fails says
something.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from llmdistill.verify.code import Verdict, judge_program, run_functional, run_stdin, run_tests

ASSERTS = "assert f(3) == 6\nassert f(0) == 0\nassert f(-2) == -4\n"

CHECK = "def check(candidate):\n    assert candidate(3) == 6\n    assert candidate(-2) == -4\n"

UNITTEST = """
import unittest

class TestF(unittest.TestCase):
    def setUp(self):
        self.expected = {3: 6, -2: -4}

    def test_values(self):
        for x, expected in self.expected.items():
            with self.subTest(x=x):
                self.assertEqual(f(x), expected)

    def test_close(self):
        self.assertAlmostEqual(f(3), 6.0)
"""

PYTEST = """
def test_three():
    assert f(3) == 6

class TestMore:
    def test_minus(self):
        assert f(-2) == -4
"""

# What EvalPlus generates: inputs, results, and an oracle that compares floats by numpy where there is one.
EVALPLUS = """
try:
    import numpy as np
except ImportError:
    np = None

def is_floats(x):
    if isinstance(x, float):
        return True
    if isinstance(x, (list, tuple)) and x:
        return all(isinstance(i, float) for i in x)
    return np is not None and isinstance(x, np.ndarray) and x.dtype in (np.float64, np.float32)

def assertion(out, exp, atol):
    exact_match = out == exp
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if not exact_match and atol != 0:
        if np is None:
            assert abs(out - exp) <= atol
        else:
            assert type(out) == type(exp) or isinstance(out, (int, float))
            assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert exact_match

inputs = [[3], [-2]]
results = [6, -4]
for i, (inp, exp) in enumerate(zip(inputs, results)):
    assertion(f(*inp), exp, 0)
assertion(float(f(3)) if isinstance(f(3), int) else f(3), 6.0, 0)
"""

# A float is compared in every way that benchmarks know, numbers are counted, and results go through map and all.
COMPARISONS = """
import math
try:
    import numpy as np
except ImportError:
    np = None

r = f(3)
assert r == 6 or (np is not None and isinstance(r, (float, list)) and np.allclose(r, 6.0)), r
assert math.isclose(r, 6) and abs(r - 6) < 1e-6 and len([r]) == 1 and all([r == 6])
assert list(map(f, [3, -2])) == [6, -4] and sum(map(f, [3, -2])) == 2
assert all(y == 2 * x for x, y in zip([3, -2], map(f, [3, -2]), strict=True))
assert not any(f(x) != 2 * x for x in (3, 0, -2))
"""

# Tests that go on after an exception, as those do that expect one.
FORGIVING = """
failures = 0
for x, expected in ((3, 6), (-2, -4)):
    try:
        if f(x) != expected:
            failures += 1
    except BaseException:
        failures += 1
if failures:
    raise AssertionError(failures)
"""

# A trusted setup has numbers of its own.
SETUP = "TOLERANCE = 0\nCASES = [(0, 0), (3, 6), (-2, -4)]\n"
WITH_SETUP = "for x, expected in CASES:\n    assert abs(f(x) - expected) <= TOLERANCE, x\n"

CASES = [("3", "6"), ("x = -2", "-4")]
LINES = [("3\n", "6\n"), ("-2\n", "-4\n")]


def _judged(program: str, tests: dict[str, Any], **limits: Any) -> Verdict:
    return judge_program(program, {"style": "asserts", "entry_point": "f", **tests}, **limits)


def _printed(program: str, **limits: Any) -> Verdict:
    return run_stdin(f"{program}\nprint(f(int(input())))\n", LINES, **limits)


def _of(tests: str) -> Callable[..., Verdict]:
    return lambda program, **limits: run_tests(program, tests, **limits)


SHAPES: dict[str, Callable[..., Verdict]] = {
    "asserts": _of(ASSERTS),
    "asserts with entry point": partial(_judged, tests={"test": ASSERTS}),
    "check(candidate)": partial(_judged, tests={"test": CHECK}),
    "check(candidate) with a prompt": partial(
        _judged, tests={"test": CHECK, "setup": "import math\ndef f(x):\n    'Twice.'\n"}
    ),
    "check called by the tests": _of(f"{CHECK}\ncheck(f)\n"),
    "unittest.main()": _of(f"{UNITTEST}\nif __name__ == '__main__':\n    unittest.main()\n"),
    "unittest.main(exit=False)": _of(f"{UNITTEST}\nunittest.main(exit=False)\n"),
    "unittest without main": _of(UNITTEST),
    "pytest": _of(PYTEST),
    "EvalPlus": _of(EVALPLUS),
    "comparisons": _of(COMPARISONS),
    "forgiving": _of(FORGIVING),
    "asserts with a setup": partial(_judged, tests={"test": WITH_SETUP, "setup": SETUP}),
    "cases": lambda program, **limits: run_functional(program, "f", CASES, **limits),
    "standard input": _printed,
}
