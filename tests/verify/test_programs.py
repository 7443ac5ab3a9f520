"""extract_program: which of a completion's texts is the program."""

import time

import pytest

from llmdistill.verify import sandbox
from llmdistill.verify.code import find_program
from llmdistill.verify.programs import extract_program
from llmdistill.verify.sandbox import Limits, Sandbox

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


DOCSTRINGS = [
    '```python\ndef f(x):\n    """Twice.\n\n    ```\n    f(2)\n    ```\n    """\n    return 2 * x\n```',
    '```python\ndef f(x):\n    """\n```python\nf(2)\n```\n    """\n    return 2 * x\n```\nIt doubles.',
    "```python\nT = '''\n```\n~~~\n```js\n'''\n\ndef f(x):\n    return 2 * x\n```\n```text\n4\n```",
    '```\ndef f(x):\n    r"""\n    ```\n    \\""" # no end\n    """\n    return 2 * x\n```',
]


@pytest.mark.parametrize("text", DOCSTRINGS)
def test_fences_within_strings_close_nothing(text):
    assert runs(extract_program(text, entry_point="f"))["f"](2) == 4


def test_stray_quotes_hide_no_fence():
    """A draft whose docstring is never closed, and prose with quotes: later blocks are found all the same."""
    text = (
        '```python\ndef f(x):\n    """Twice\n```\nI\'d rather:\n```python\ndef f(x):\n    return 2 * x\n```\nIt\'s so.'
    )
    assert runs(extract_program(text, entry_point="f"))["f"](2) == 4


GLUED = [
    "```python\ndef f(x):\n    return 2 * x```",
    "```python\ndef f(x):\n    return 2 * x```\nDone. Use it:\n```python\nprint(f(2))\n```",
    "```python\ndef f(x):\n    return 2 * x  ````",
    "Here it is: ```python\ndef f(x):\n    return 2 * x\n```",
    "```python def f(x):\n    return 2 * x\n```",
    "```python\ndef f(x):\n    return 2 * x\n``` That is all.",
    "~~~python\ndef f(x):\n    return 2 * x~~~",
    "<|channel|>final<|message|>```python\ndef f(x):\n    return 2 * x\n```<|return|>",
    "python\ndef f(x):\n    return 2 * x\n```\nThis doubles.",
    "python\ndef f(x):\n    return 2 * x\n```\nExample:\n```python\nprint(f(2))\n```",
    "def f(x):\n    return 2 * x```\nDone.",
    "[PYTHON]\ndef f(x):\n    return 2 * x\n[/PYTHON]",
    "[BEGIN]\ndef f(x):\n    return 2 * x\n[DONE]\n",
    "[BEGIN]\ndef f(x):\n    return 2 * x\n[END]",
    "[PYTHON] def f(x):\n    return 2 * x\n[/PYTHON]",
    "```pythondef f(x):\n    return 2 * x\n```",
    "```python\ndef f(x):\n\u00a0\u00a0\u00a0\u00a0return 2 * x\n```",
    "```python\n>>> def f(x):\n...     return 2 * x\n...\n>>> f(2)\n4\n```",
    "Sure.\n<answer>\ndef f(x):\n    return 2 * x\n</answer>\nBye.",
    "\ufeffdef f(x):\n    return 2 * x\n<|endoftext|>",
    "def f(x):\n    return 2 * x<|im_end|>\n",
]


@pytest.mark.parametrize("text", GLUED)
def test_marks_in_other_places(text):
    assert runs(extract_program(text, entry_point="f"))["f"](2) == 4


def test_marks_in_strings_and_comments_are_code():
    code = "def f(x):\n    # a fence is ```\n    return ['```', \"```\", '''```'''][x]\n"
    program = extract_program(f"```python\n{code}```\nDone.", entry_point="f")
    assert program == code


EXAMPLES = [
    "Example run:\n```python\n>>> print(1)\n1\n```",
    "Output:\n```python\n1\n```",
    "Output:\n```python\n1 2\n3 4\n```",
    "Use it:\n```python\nmain()\n```",
    "Use it:\n```python\nprint(solve([1]))\n```",
    "Run:\n```bash\npython a.py\n```",
    "```\n1\n```",
    "",
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_program_and_not_the_example_after_it(example):
    code = "def solve(xs):\n    return len(xs)\n\ndef main():\n    print(solve(input()))\n\nmain()\n"
    assert extract_program(f"```python\n{code}```\n{example}") == code


def test_an_improved_version_after_a_program_is_the_program():
    """It binds what it uses: no example of the first."""
    second = "def main():\n    print(2)\n\nmain()\n"
    text = f"```python\ndef main():\n    print(1)\nmain()\n```\nBetter:\n```python\n{second}```"
    assert extract_program(text) == second


TWICE = 'def f(x):\n    """Twice x."""\n'
CONTINUED = [
    " return 2 * x\n",
    "   return 2 * x",
    "  y = 2 * x\n  return y\n",
    "\ty = 2 * x\n\treturn y\n",
    "      y = 2 * x\n      return y\n",
    " y = 2 * x\n    return y\n",
    "y = 2 * x\n    if y:\n        return y\n    return 0\n",
    '    s = """\nabc\n"""\n    return 2 * x\n',
    "    y = (2 *\nx\n)\n    return y\n",
    "    y = [\n2,\n]\n    return y[0] * x\n",
    "    return 2 * \\\nx\n",
    "    y = 2\n# now the rest\n    return y * x\n\nprint(f(",
    "    return g(x)\n\n\ndef g(x):\n    return 2 * x\n\n\nprint(f(3))\n",
    "    return g(x)\n\nimport math\ndef g(x):\n    return 2 * x\n\ndef f(x):\n    return 0\n",
    "  y = '''\n  kept\n'''\n  return 2 * x if y == '\\n  kept\\n' else 0\n",
]


@pytest.mark.parametrize("body", CONTINUED)
def test_bodies_at_any_indentation_and_lines_at_the_margin(body):
    assert runs(extract_program(body, entry_point="f", prompt=TWICE))["f"](2) == 4


def test_numbers_of_any_length_are_no_error():
    text = f"```python\nx = {'7' * 6000}\ndef f(): return 1\n```"
    assert f"{'7' * 6000}" in extract_program(text, entry_point="f")


HOSTILE = {
    "fence of blanks": "```" + " " * 16_000 + "`",
    "starts": "".join(f"def f{i}(:\n" for i in range(900)),
    "nested": "".join(" " * i + "if x:\n" for i in range(99)) + "y = (\n",
    "imports": "import a\n" * 300 + "x = (\n" * 300,
    "open strings": "```python\n'''\n```\n" * 3000,
    "open strings 2": "```\n'''\n" * 5000,
    "fences in a string": '```python\n"""\n' + "```\n" * 20_000,
    "glued": "```python\nx = 1```\n" * 5000,
    "marks": "`" * 500_000,
    "marks 2": "```" * 5000,
    "quotes": "'" * 100_001,
    "ends": "<|a|>" * 100_000,
    "tags": "[PYTHON]\n" * 20_000,
    "brackets": "(" * 100_000,
    "braces": "{" * 5000,
    "operators": "x = " + "-" * 200_000,
    "definitions": "def f(): pass\n" * 5000,
    "halves": "def f():\n    return (\n" * 20_000,
    "before a fence": "x = 1\n" * 20_000 + "```\n",
    "blanks": "def" + " " * 100_000 + "(" + "\n" * 100_000,
    "NUL": "\x00",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_end(name):
    """Linear rules and a budget for parsing: seconds at most, where a parser for every line would take hours."""
    for prompt, entry_point in ((PROMPT, "f"), (TWICE, "f"), (None, None)):
        start = time.process_time()
        extract_program(HOSTILE[name], entry_point=entry_point, prompt=prompt)
        assert time.process_time() - start < 10  # of processor time; the slowest takes two


def test_a_text_that_costs_too_much_holds_no_program(monkeypatch):
    """In a confined process: what it allocates or how long it takes is not the trainer's trouble."""
    with Sandbox(1) as pool:
        assert find_program("```python\nprint(1)\n```", sandbox=pool) == "print(1)\n"
        monkeypatch.setattr(sandbox, "_EXTRACTION", Limits(time_s=10.0, memory_mb=1))
        assert find_program("```python\n" + "x = [1, 2, 3]\n" * 50_000 + "```", sandbox=pool) is None
        monkeypatch.setattr(sandbox, "_EXTRACTION", Limits(time_s=0.01, memory_mb=512))
        assert find_program("def f(): pass\n" * 60_000, sandbox=pool) is None
        monkeypatch.undo()
        assert find_program("def f(): pass", entry_point="f", sandbox=pool) == "def f(): pass\n"
