"""extract_program: which of a completion's texts is the program."""

import pytest

from llmdistill.verify.programs import extract_program

PROMPT = '''import math


def poly(xs: list, x: float):
    """Evaluates a polynomial."""
    return sum(c * math.pow(x, i) for i, c in enumerate(xs))


def find_zero(xs: list):
    """ find_zero returns x such that poly(xs, x) = 0. """
'''


def runs(program: str | None) -> dict:
    assert program is not None
    names: dict = {}
    exec(program, names)
    return names


def test_the_last_complete_block_that_defines_the_entry_point():
    """Drafts come first, usage examples and outputs last, and a block that was cut off is none."""
    text = (
        "```python\ndef f(): return 'draft'\n```\nBetter:\n```python\ndef f(): return 'final'\n```\n"
        "Use it:\n```python\nprint(f())\n```\nOutput:\n```\nfinal\n```\nOr\n```python\ndef f(): return 'cut"
    )
    assert runs(extract_program(text, entry_point="f"))["f"]() == "final"


def test_thoughts_hold_no_program():
    thoughts = "<think>\n```python\ndef f(): return 1\n```\n"
    assert extract_program(thoughts, entry_point="f") is None
    answer = extract_program(thoughts + "</think>x</think>```python\ndef f(): return 2\n```", entry_point="f")
    assert runs(answer)["f"]() == 2
    # A template that opens the thoughts in the prompt leaves only the closing tag to the completion.
    assert runs(extract_program("hm</think>\ndef f(): return 3", entry_point="f"))["f"]() == 3


def test_without_entry_point_the_last_python_block():
    text = "```python\nprint(1)\n```\nthen\n```python\nprint(2)\n```\nprints\n```\n2\n```"
    assert extract_program(text) == "print(2)\n"
    assert extract_program("The answer is 42.") is None
    assert extract_program("Sure") is None
    assert extract_program("") is None
    assert extract_program("n = int(input())\nprint(n)") == "n = int(input())\nprint(n)\n"


@pytest.mark.parametrize("fence", ["```", "````", "~~~"])
@pytest.mark.parametrize("language", ["python", "py", "Python3", ""])
def test_kinds_of_fences(fence, language):
    text = f"Here:\n\n  {fence}{language}\n  def f(x):\n      return x\n  {fence}\nDone."
    assert runs(extract_program(text, entry_point="f"))["f"](3) == 3


def test_a_longer_fence_may_hold_a_shorter_one():
    text = '````python\ndef f():\n    """\n```\nx\n```\n    """\n    return 5\n````'
    assert runs(extract_program(text, entry_point="f"))["f"]() == 5


def test_blocks_in_other_languages_are_not_programs():
    text = "```python\ndef f(): return 1\n```\nRun it:\n```bash\npython f.py\n```"
    assert extract_program(text, entry_point="f") == "def f(): return 1\n"
    assert extract_program(text) == "def f(): return 1\n"


def test_opening_fence_in_the_prompt():
    assert runs(extract_program("def f():\n    return 7\n```\nThis works.", entry_point="f"))["f"]() == 7


def test_cut_off_block_keeps_what_parses():
    text = "```python\ndef f():\n    return 7\n\ndef g():\n    x = (1,"
    assert runs(extract_program(text, entry_point="f"))["f"]() == 7


def test_bare_code_with_prose_around():
    text = "Here is my solution:\n\nimport math\n\ndef f(x):\n    return math.floor(x)\n\nIt runs in O(1) time."
    assert runs(extract_program(text, entry_point="f"))["f"](2.5) == 2


BODY = "    return -xs[0] / xs[1]\n"


@pytest.mark.parametrize(
    "completion",
    [
        BODY,
        BODY + "\n\ndef other():\n    pass\n\nprint(find_zero([1, 2]))",
        BODY + "\n# Test\nassert False\n",
        BODY + "```\nThat is it.",
        "return -xs[0] / xs[1]\n",
        "    a, b = xs\n    return -a / b",
        "a, b = xs\n    return -a / b",
        "```python\ndef find_zero(xs):\n    return -xs[0] / xs[1]\n```",
        "```python\n" + PROMPT + BODY + "```",
        "```python\n    return -xs[0] / xs[1]\n```",
        PROMPT + BODY,
        "def find_zero(xs):\n    return -xs[0] / xs[1] if poly(xs, 0) else 0.0",
    ],
)
def test_completion_of_a_function(completion):
    """However the function is completed, it runs, and the prompt's import and helper are there once at least."""
    names = runs(extract_program(completion, entry_point="find_zero", prompt=PROMPT))
    assert names["find_zero"]([-3.0, 1.0]) == 3.0
    assert names["poly"]([1, 2], 2) == 5


def test_the_prompt_is_not_doubled():
    program = extract_program("```python\n" + PROMPT + BODY + "```", entry_point="find_zero", prompt=PROMPT)
    assert program.count("def find_zero") == 1
    assert program.count("find_zero returns x") == 1


def test_future_imports_stay_first():
    text = "```python\nfrom __future__ import annotations\ndef find_zero(xs: No) -> Such: return 1\n```"
    assert runs(extract_program(text, entry_point="find_zero", prompt=PROMPT))["find_zero"]([]) == 1


def test_a_question_as_prompt_changes_nothing():
    prompt = "Please solve:\n```python\nclass Solution:\n    def two(self) -> int:\n```"
    text = "```python\nclass Solution:\n    def two(self):\n        return 2\n```"
    program = extract_program(text, entry_point="Solution().two", prompt=prompt)
    assert runs(program)["Solution"]().two() == 2


def test_a_block_without_the_entry_point_is_still_handed_on():
    """The verdict then says what is missing, instead of "no program"."""
    assert extract_program("```python\ndef g(): pass\n```", entry_point="f") == "def g(): pass\n"


def test_hostile_texts_end():
    for text in ("```" * 5000, "(" * 100_000, "def f(:\n" * 2000, "\x00", "`" * 99999 + "\n", "def f(): pass\n" * 5000):
        extract_program(text, entry_point="f", prompt=PROMPT)
