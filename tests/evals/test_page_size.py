"""The evaluation's page under what models write when nobody stops them, and with as many problems as there are.

Everything here is bounded in time: a reader who opens a sample waits for seconds at most, whatever is in it.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

from llmdistill.evals.page import write_page
from llmdistill.evals.page.packing import pack
from llmdistill.evals.records import EvalFolder, Grade, Problem, Sample
from tests.evals.chromium import Chromium
from tests.evals.test_page import of

LIMIT = 10.0  # seconds until a sample is laid out; the slowest of these took 4 on a machine with eight other jobs
ELEMENTS = 30_000  # of one sample's text

# Each is more than the page carries of one sample (60,000 characters), so that what is shown is as long as can be.
SIZE = 70_000
HOSTILE = {
    "scripts": "<script>alert(1)</script><img src=x onerror=alert(1)><svg onload=alert(1)>" * (SIZE // 70),
    "links": "[x](javascript:alert(1)) <javascript:alert(1)> ![x](https://example.org/x.png) " * (SIZE // 80),
    "references": "[x]: javascript:alert(1)\n[x]\n" * (SIZE // 30),
    "a table": "| a | b | c | d |\n|---|---|---|---|\n" + "| $x$ | **b** | <b> | d |\n" * (SIZE // 25),
    "a wide table": ("| a " * (SIZE // 12) + "|\n") + ("|---" * (SIZE // 12) + "|\n") + ("| b " * (SIZE // 12) + "|\n"),
    "a line of 1 MB": "a" * 1_000_000,
    "words of 1 MB": "a b " * 250_000,
    "a heading of spaces": "# a" + " " * 16_000 + "#" + " " * 16_000 + "b",  # half an hour by a cubic rule
    "headings": ("#" + " " * 40 + "#\n") * (SIZE // 42),
    "dollars": "$" * SIZE,
    "braced dollars": "${$ " * (SIZE // 4),
    "dollars and words": "$a b " * (SIZE // 5),
    "open formulas": "\\[ x " * (SIZE // 5),
    "open environments": "\\begin{align} x " * (SIZE // 16),
    "open boxes": "\\boxed{x " * (SIZE // 9),
    "nested boxes": "\\boxed{" * 500 + "x" + "}" * 500,
    "many formulas": "$x_1^2$ " * (SIZE // 8),
    "macros": "$\\def\\a{\\a\\a}\\a$ $\\newcommand{\\b}[1]{#1#1}\\b{\\b{\\b{\\b{\\b{\\b{x}}}}}}$ " * (SIZE // 80),
    "a huge rule": "$\\rule{9999em}{9999em}$ $\\hspace{-9999em}x$ $\\raisebox{9999em}{x}$ " * 100,
    "trusted commands": "$\\href{javascript:alert(1)}{x}$ $\\htmlStyle{position:fixed}{x}$ $\\includegraphics{x}$ "
    * 100,
    "backslashes": "\\" * SIZE,
    "ticks": "`" * SIZE,
    "ticks and words": "`a ``b " * (SIZE // 7),
    "fences": "```a\n" * (SIZE // 5),
    "stars": "*" * SIZE,
    "stars and words": "*a **b " * (SIZE // 7),
    "underscores": "_a __b " * (SIZE // 7),
    "brackets": "[" * SIZE,
    "pairs of brackets": "[a](" * (SIZE // 4),
    "quotes": ">" * SIZE,
    "lists": "".join(" " * (i % 200) + "- a\n" for i in range(SIZE // 100)),
    "rules": "- " * (SIZE // 2),
    "entities": "&lt;script&gt; &#60;img&#62; &" * (SIZE // 30),
    "thoughts": "<think>" * (SIZE // 7),
    "ended thoughts": "<think>a</think>" * (SIZE // 16),
    "drawings": "[asy]" * (SIZE // 5),
    "line breaks": "\n" * SIZE,
    "spaces at line ends": ("a" + " " * 300 + "\n") * (SIZE // 302),
    "marks of the page itself": "\ue0000\ue001 \ue00212\ue003 " * (SIZE // 10),
    "combining characters": "a" + "\u0301" * SIZE,
    "nested roots": "$" + "\\sqrt{" * 400 + "x" + "}" * 400 + "$ $" + "\\sqrt" * 400 + "x$",
    "deep brackets": "\\[" + "\\left(" * 300 + "x" + "\\right)" * 300 + "\\]",
    "tables of formulas": "$\\begin{array}{c}" + "\\begin{array}{c}" * 60 + "x" + "\\end{array}" * 61 + "$",
    "directions": "\u202eabc\u2066 " * (SIZE // 6),
}


def run_of(folder: Path, problems: list[Problem], texts: dict[str, list[str]], kind: str = "wrong") -> EvalFolder:
    """Every problem with its samples, all graded alike but the last problem's, which are not graded."""
    run = EvalFolder(folder)
    run.write_problems(problems)
    writer = run.appender(0)
    seed = 2**62 + 1  # no number of JavaScript's
    for problem in problems:
        writer.add(*(Sample(problem.id, i, text, 9, "stop", seed + i) for i, text in enumerate(texts[problem.id])))
    writer.close()
    graded = [p for p in problems[:-1] for _ in texts[p.id]]
    counts: dict[str, int] = {}
    grades = []
    for p in graded:
        i = counts[p.id] = counts.get(p.id, -1) + 1
        grades.append(Grade(p.id, i, kind == "right", kind, "7", "boxed", "why"))
    run.write_grades(grades)
    run.write_json(run.config_file, {"suite": "sizes", "model": "m", "n": len(texts[problems[0].id])})
    return run


@pytest.mark.slow
def test_hostile_completions_are_inert_and_quick(tmp_path: Path, browser: Chromium) -> None:
    problems = [Problem(name, "q", "math", "1") for name in (*HOSTILE, "not graded")]
    page = write_page(run_of(tmp_path, problems, {**{k: [v] for k, v in HOSTILE.items()}, "not graded": ["x"]}).path)
    browser.open(page)
    browser.wait("document.querySelector('#problem-detail .written')")
    slow: dict[str, float] = {}
    for i, name in enumerate(HOSTILE):
        began = time.monotonic()
        if i:
            browser.press("j")
        shown = f"document.querySelector('#problem-detail h3')?.textContent === {json.dumps(name)}"
        browser.wait(f"{shown} && document.querySelector('#problem-detail .written')", LIMIT)
        # Folded thinking is made when it is opened.
        browser.press("o")
        browser.value("document.body.getBoundingClientRect().height")  # laid out
        browser.wait("document.querySelector('#problem-detail details.sample')", LIMIT)
        slow[name] = time.monotonic() - began
        assert browser.value("document.querySelectorAll('#problem-detail *').length") < ELEMENTS, name
        bad = "#problem-detail :is(script, img, svg, iframe, object, style, link, [src], [onload], [onerror])"
        assert browser.value(f"document.querySelectorAll('{bad}').length") == 0, name
        links = "[...document.querySelectorAll('#problem-detail [href]')].filter((a) => a.className !== 'back').length"
        assert browser.value(links) == 0, name
    assert max(slow.values()) < LIMIT, sorted(slow.items(), key=lambda x: -x[1])[:5]
    dialogs = [e for e in browser.events if e.get("method") == "Page.javascriptDialogOpening"]
    assert dialogs == browser.requests() == browser.complaints() == []


def test_a_formula_stays_in_its_place(tmp_path: Path, browser: Chromium) -> None:
    """What a model writes cannot draw over the verdicts."""
    problems = [Problem(name, "q", "math", "1") for name in ("a huge rule", "b")]
    run = run_of(tmp_path, problems, {"a huge rule": [HOSTILE["a huge rule"]], "b": ["x"]})
    browser.open(write_page(run.path))
    browser.wait("document.querySelector('#problem-detail .written math')")
    largest = (
        "Math.max(...[...document.querySelectorAll('.written math *')].map((m) => m.getBoundingClientRect().height))"
    )
    assert browser.value(largest) < 20 * 20  # maxSize, in em of 20 pixels at most


@pytest.mark.slow
def test_a_page_of_many_problems_has_few_elements_and_searches_quickly(tmp_path: Path, browser: Chromium) -> None:
    count = 2500
    problems = [
        Problem(f"p/{i}", f"What is ${i}+x$?", "math", str(i), None, {"level": str(i % 5)}) for i in range(count)
    ]
    words = {
        p.id: [f"sample {k} of {p.id}: {hashlib.md5(p.id.encode()).hexdigest()}" for k in range(4)] for p in problems
    }
    page = write_page(run_of(tmp_path, problems, words).path)
    began = time.monotonic()
    browser.open(page)
    browser.wait("document.querySelectorAll('#problem-list a').length > 0")
    opened = time.monotonic() - began
    assert browser.value("document.querySelectorAll('#problem-list a').length") < 40
    assert browser.value("document.querySelectorAll('#problem-list *, #problem-detail *').length") < 1500
    browser.value("document.getElementById('problem-list').scrollTop = 1e9")
    browser.wait(f"[...document.querySelectorAll('#problem-list .id')].at(-1).textContent === 'p/{count - 1}'")
    assert browser.value("document.querySelectorAll('#problem-list a').length") < 40
    assert browser.value(
        "document.querySelector('#problem-list li:nth-last-child(2)').getAttribute('aria-setsize')"
    ) == str(count)
    wanted = hashlib.md5(b"p/2210").hexdigest()
    setting = f"field.value = '{wanted}'; field.dispatchEvent(new Event('input', {{bubbles: true}}))"
    began = time.monotonic()
    browser.value(f"(() => {{ const field = document.getElementById('search'); {setting} }})()")
    browser.wait(f"document.getElementById('count').textContent === '1 of {count:,} problems'", 20)
    assert browser.value("[...document.querySelectorAll('#problem-list .id')].map((x) => x.textContent)") == ["p/2210"]
    assert opened < 8 and time.monotonic() - began < 15  # 0.4 and 1.5 s on an idle machine
    assert browser.requests() == browser.complaints() == []


def test_programs_keep_their_indentation(tmp_path: Path, browser: Chromium) -> None:
    program = 'def f(x: int) -> int:\n    """Adds.\n    >>> f(1)\n    2\n    """\n    # one more\n'
    statement = "Read n.\n\n  * not code\n    3 lines\n1. `a_b_c`\n\n```python\nif x:\n    y()\n```\nEnd"
    problems = [Problem("program", program, "code"), Problem("statement", statement, "code"), Problem("z", "q", "code")]
    body = "    return x + 1  # $x$\n"
    run = run_of(
        tmp_path, problems, {"program": [body], "statement": ["1. First\n   ```c\n   f();\n   ```\n2. x"], "z": ["x"]}
    )
    browser.open(write_page(run.path))
    browser.wait("document.querySelector('#problem-detail .written pre')")
    assert browser.value("document.querySelector('.question pre.code').textContent") == program
    assert browser.value("document.querySelector('.written pre.code').textContent") == body
    browser.press("j")
    browser.wait("document.querySelector('#problem-detail h3').textContent === 'statement'")
    lines = browser.value("document.querySelector('.question').innerText").replace("\u00a0", " ").split("\n")
    assert "    3 lines" in lines and "if x:" in lines and "    y()" in lines
    assert browser.value("document.querySelectorAll('.written ol > li').length") == 2


def test_the_reader_finds_what_there_is(tmp_path: Path, browser: Chromium) -> None:
    """First problem open, a legend, seeds whole, `o` opens everything, what is not graded is no answer."""
    problems = [Problem(name, "q", "math", "1") for name in ("a", "b")]
    run = run_of(tmp_path, problems, {"a": ["<think>t</think>x"] * 3, "b": ["\\boxed{1}"] * 3})
    browser.open(write_page(run.path))
    browser.wait("document.querySelector('#problem-detail h3')")
    assert browser.value("document.querySelector('#problem-detail h3').textContent") == "a"
    assert browser.value("scrollY") == 0 and browser.value("location.hash") == ""
    assert browser.value("document.getElementById('legend').textContent") == "wrongnot graded"
    assert f"seed {2**62 + 1}" in browser.value("document.querySelector('.sample .facts').textContent")
    opened = "[...document.querySelectorAll('.sample, .written .think')].map((d) => d.open)"
    browser.press("o")
    assert browser.value(opened) == [True] * 6
    browser.press("o")
    assert browser.value("[...document.querySelectorAll('.sample')].map((d) => d.open)") == [False] * 3
    browser.press("j")
    browser.wait("document.querySelector('#problem-detail h3').textContent === 'b'")
    assert browser.value("document.querySelector('#problem-detail .facts').textContent") == "not graded"
    assert browser.value("document.querySelector('.sample .badge').textContent") == "not graded"
    assert browser.value("document.querySelector('.sample .answer').textContent") == ""


@pytest.mark.parametrize("file", ["temml.min.js", "markdown-it.min.js", "LICENSES.txt"])
def test_what_others_wrote_is_as_published(file: str) -> None:
    """``python eval/vendor.py --check`` compares with the packages; here: nothing was changed since."""
    import llmdistill.evals.page as package

    folder = Path(str(package.__file__)).parent / "vendor"
    hashes: dict[str, Any] = json.loads((folder / "hashes.json").read_text())
    assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == hashes[file]
    assert {p.name for p in folder.iterdir()} == {"temml.min.js", "markdown-it.min.js", "LICENSES.txt", "hashes.json"}


def test_packing_is_by_problem() -> None:
    """The index is small beside the texts, whatever their number."""
    problems = [Problem(f"p{i}", "q" * 500, "math", "1") for i in range(300)]
    samples = {(p.id, i): Sample(p.id, i, "word " * 400, 1, "stop", 1) for p in problems for i in range(4)}
    packed = pack(problems, of(samples), of({}), 4)
    assert len(packed.blocks) == 300 and len(packed.index) < 40_000
