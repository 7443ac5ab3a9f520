"""Wrong programs that want to be judged right: each fails, by tests of every shape."""

import pytest

from llmdistill.verify.code import run_tests
from llmdistill.verify.sandbox import Sandbox
from tests.verify.attack_runner import forge
from tests.verify.forgery_programs import FORGERY, RAISED
from tests.verify.forgery_shapes import SHAPES


@pytest.fixture(scope="module")
def pool():
    with Sandbox(1) as made:
        yield made


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shape_tells_right_from_wrong(shape, pool):
    assert SHAPES[shape]("def f(x): return 2 * x", sandbox=pool).passed
    for wrong in ("def f(x): return 7", "def f(x): return x", "def f(x): pass", "def g(x): return 2 * x"):
        assert not SHAPES[shape](wrong, sandbox=pool).passed, wrong


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_no_forgery_passes(shape, pool, scene):
    verdicts = {name: forge(name, shape, pool, scene) for name in FORGERY}
    assert len(verdicts) == len(FORGERY)


# One forgery each for the faults that were found, so that a quick run meets them.
FOUND = [
    "counts for the tests",
    "sets what the setup set",
    "own names",
    "every name there is",
    "raises StopIteration",
    "raises hostile metaclass",
    "answers nonsense",
]


@pytest.mark.parametrize("name", FOUND)
def test_forgeries_that_passed_once(name, pool, scene):
    for shape in SHAPES:
        forge(name, shape, pool, scene)


@pytest.mark.parametrize("name", RAISED)
def test_an_exception_is_no_end_of_an_iteration(name, pool):
    """``all(map(f, xs))`` takes StopIteration of f for the end of xs; next() with a default takes it for nothing."""
    program = f"def f(x):\n    {RAISED[name]}\n"
    for tests in ("assert all(map(f, [1, 2]))", "assert list(map(f, [1])) == []", "assert next(map(f, [1]), True)",
                  "assert [x for x in map(f, [1])] == []", "for x in map(f, [1]): assert False",
                  "assert sum(filter(f, [1, 2])) == 0", "assert dict(zip([1], map(f, [1]))) == {}",
                  "assert sorted([2, 1], key=f) == [2, 1]", "assert not list(iter(lambda: f(1), 5))"):  # fmt: skip
        verdict = run_tests(program, tests, sandbox=pool)
        assert not verdict.passed, (tests, verdict)


def test_iterators_of_the_program_still_end(pool):
    """next() on an object of the program's raises StopIteration as ever, and tests may expect it."""
    program = (
        "class Count:\n    def __init__(self, n): self.n = n\n    def __iter__(self): return self\n"
        "    def __next__(self):\n        if not self.n: raise StopIteration\n"
        "        self.n -= 1\n        return self.n\n"
        "def count(n):\n    yield from range(n)\n"
    )
    tests = (
        "assert list(Count(3)) == [2, 1, 0] and list(count(3)) == [0, 1, 2]\n"
        "it = Count(0)\ntry:\n    next(it)\nexcept StopIteration:\n    pass\nelse:\n    assert False\n"
        "assert next(count(0), 'none') == 'none'\n"
    )
    verdict = run_tests(program, tests, sandbox=pool)
    assert verdict.passed, verdict


def test_an_assertion_in_a_callback_counts_whatever_the_program_makes_of_it(pool):
    tests = "def at_most_three(x):\n    assert x <= 3, x\n    return x\nassert f(at_most_three) is None\n"
    swallows = "def f(g):\n    try:\n        g(4)\n    except Exception:\n        pass\n"
    assert run_tests("def f(g): g(3)", tests, sandbox=pool).passed
    assert run_tests(swallows, tests, sandbox=pool).kind == "wrong"


def test_membership_is_not_asked_of_objects_that_the_tests_do_not_know(pool):
    """An answer's own ``__contains__`` would hear the expected item and say yes; a class under test is asked."""
    liar = "class A:\n    def __contains__(self, x): return True\n    def __iter__(self): return iter([])\n"
    assert not run_tests(f"{liar}def f(x): return A()", "assert 6 in f(3)", sandbox=pool).passed
    assert run_tests("def f(x): return (n for n in (5, 6))", "assert 6 in f(3)", sandbox=pool).passed
    bag = "class Bag:\n    def __init__(self, *xs): self.xs = xs\n    def __contains__(self, x): return x in self.xs\n"
    assert run_tests(bag, "assert 6 in Bag(5, 6) and 7 not in Bag(6)", sandbox=pool).passed


def test_the_tests_own_names_are_theirs(pool):
    """Functions, classes and imports of the tests, also those within try and if, are never the program's."""
    tests = "try:\n    import math\nexcept ImportError:\n    pass\nif True:\n    def twice(x): return 2 * x\n"
    tests += "assert f(3) == twice(3) and math.isclose(f(3), 6)\n"
    assert run_tests("def f(x): return 2 * x", tests, sandbox=pool).passed
    forged = "def f(x): return 7\ndef twice(x): return 7\nclass math:\n    isclose = staticmethod(lambda *a: True)\n"
    assert not run_tests(forged, tests, sandbox=pool).passed


SAYS_YES = """
class Yes:
    def difference(self, other):
        self.heard = other
        return set()
    def __iter__(self): return iter(self.heard)
    def symmetric_difference(self, other): return set()
    issubset = issuperset = isdisjoint = startswith = endswith = lambda self, *a: True
    def count(self, x): return 1
    def index(self, x): return 0
def f(x): return Yes()
"""
SET_TEST = (
    "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertSetEqual(f(3), {6, 7})\n"
)
SEARCHING = [
    SET_TEST,
    "assert f(3).difference({6, 7}) == set()",
    "assert f(3).symmetric_difference({6, 7}) == set()",
    "assert f(3).issubset({6, 7}) and f(3).issuperset({6, 7}) and not f(3).isdisjoint({6})",
]
TEXTS = ["assert f(3).startswith('si') and f(3).endswith('x')", "assert f(3).count('i') == 1 and f(3).index('s') == 0"]


LIARS = {
    "an object": SAYS_YES,
    "a class of the function's name": SAYS_YES.replace(
        "def f(x): return Yes()", "class f(Yes):\n    def __init__(s, x): 0"
    ),
    "itself": SAYS_YES.replace("def f(x): return Yes()", "class It(Yes):\n    def __call__(s, x): return s\nf = It()"),
    "a class of a method's name": SAYS_YES
    + "class issubset(Yes): pass\nstartswith = count = difference = symmetric_difference = issubset\n"
    "def f(x): return count()",
}


@pytest.mark.parametrize("liar", LIARS)
@pytest.mark.parametrize("tests", SEARCHING + TEXTS)
def test_methods_that_hear_what_is_expected_are_not_asked_of_objects_that_the_tests_do_not_know(tests, liar, pool):
    right = "def f(x): return {6, 7}" if tests in SEARCHING else "def f(x): return 'six'"
    assert run_tests(right, tests, sandbox=pool).passed
    verdict = run_tests(LIARS[liar], tests, sandbox=pool)
    assert verdict.kind == "wrong", verdict


def test_a_class_of_the_function_s_name_does_not_say_what_is_in_it(pool):
    """Nor Solution, where a method returns its own object."""
    liar = "class f:\n    def __init__(self, x): pass\n    def __contains__(self, x): return True\n"
    assert not run_tests(f"{liar}    def __iter__(self): return iter([])\n", "assert 6 in f(3)", sandbox=pool).passed
    own = "class Solution:\n    def g(self, x): return self\n    def __contains__(self, x): return True\n"
    assert not run_tests(own, "assert 6 in Solution().g(3)", sandbox=pool).passed


def test_methods_of_classes_and_objects_that_the_tests_name_are_asked(pool):
    program = (
        "class Bag:\n    def __init__(self, xs): self.xs = xs\n    def count(self, x): return self.xs.count(x)\n"
        "    def issubset(self, other): return set(self.xs) <= set(other)\nempty = Bag([])\n"
    )
    tests = "assert Bag([6, 6]).count(6) == 2 and Bag([6]).issubset({6, 7}) and empty.count(6) == 0"
    verdict = run_tests(program, tests, sandbox=pool)
    assert verdict.passed, verdict


def test_what_a_program_counts_for_the_tests_to_read_is_still_carried_over(pool):
    """A global of the program's that the tests read, and never assign, is as the last call left it."""
    program = "calls = 0\ndef f(x):\n    global calls\n    calls += 1\n    return 2 * x\n"
    verdict = run_tests(program, "assert f(3) == 6 and calls == 1\nf(0)\nassert calls == 2", sandbox=pool)
    assert verdict.passed, verdict


def test_a_type_is_a_function_too(pool):
    assert run_tests("to_text = str", "assert to_text(3) == '3'", sandbox=pool).passed
