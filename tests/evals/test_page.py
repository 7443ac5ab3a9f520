"""The evaluation's page: hostile text stays text, numbers are those of results.json, samples can be read and found.

What the scripts do is tried in a headless Chromium, where there is one (``$CHROMIUM``, or on the path); hostile and
large runs in ``test_page_size``.
"""

from __future__ import annotations

import base64
import gzip
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmdistill.evals.page import render, write_page
from llmdistill.evals.page.packing import SHORTEST_TEXT, clip, pack, verdict
from llmdistill.evals.records import EvalFolder, Grade, Problem, Sample
from llmdistill.evals.summary import summarise
from tests.evals.chromium import Chromium
from tests.report.test_page import HOSTILE, Page

TRICKS = HOSTILE + "</script><!-- <svg onload=alert(1)> $\\href{javascript:alert(1)}{x}$ \ue000 0\ue001 \ue0027\ue003"
SOLUTION = r"""<think>
Hm, $7 and $9 are prices, so $x = 16$.
</think>
### Sum

1. **First**, \(\frac{1}{2} \le x\).
2. Then \[ x^{2} = 4 \]

```python
print("$a$")
```

So $\nosuchcommand{1}$ and \boxed{\frac{3}{4}}
"""
# (verdict kind, passed, finish): right, wrong, truncated without answer
OUTCOMES = (("right", True, "stop"), ("wrong", False, "stop"), ("no_answer", False, "length"))


def folder_of(path: Path, problems: list[Problem], text: str, outcomes: list[tuple[Any, ...]]) -> EvalFolder:
    """An evaluation whose i-th problem has the i-th (last) outcome for all of its samples, three kinds if "mixed"."""
    run = EvalFolder(path)
    run.write_problems(problems)
    writer, grades, samples = run.appender(0), [], []
    for p, problem in enumerate(problems):
        for i in range(3):
            kind, passed, finish = outcomes[p] if p < len(outcomes) else OUTCOMES[i]
            sample = Sample(problem.id, i, f"{text}\nsample {i} of {problem.id}", 10 * (p + 1) + i, finish, 100 + i)
            writer.add(sample)
            samples.append(sample)
            extracted = None if kind == "no_answer" else "\\frac{3}{4}"
            cluster = None if kind == "no_answer" else i
            grades.append(Grade(problem.id, i, passed, kind, extracted, "boxed", f"why {text[:40]}", cluster))
    writer.close()
    run.write_grades(grades)
    run.write_json(run.config_file, {"suite": "quiz", "model": "tiny", "n": 3, "sampling": {"temperature": 0.6}})
    numbers = summarise(problems, samples, grades, n=3, k_pass=(1, 2, 3), k_maj=(3,), k_g_pass=(2,))
    run.write_json(run.results_file, {"suite": "quiz", "model": "tiny", **numbers})
    return run


@pytest.fixture
def run(tmp_path: Path) -> EvalFolder:
    """Problem a is all right, b all wrong, c truncated, d mixed."""
    problems = [
        Problem(f"quiz/{key}", rf"What is $x_{{{key}}}$?", "math", r"\frac{3}{4}", None, {"level": level})
        for key, level in zip("abcd", ("1", "2", "10", "10"), strict=True)
    ]
    return folder_of(tmp_path / "quiz", problems, SOLUTION, list(OUTCOMES))


def of(records: dict[tuple[str, int], Any]) -> Callable[[str], list[Any]]:
    """Those of a problem."""
    return lambda problem: [record for (name, _), record in records.items() if name == problem]


def unpacked(raw: str, key: str) -> Any:
    block = re.search(rf'id="{key}">([^<]*)</script>', raw)
    assert block
    return json.loads(gzip.decompress(base64.b64decode(block[1])))


def leaves(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for child in value.values():
            yield from leaves(child)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def test_every_score_is_on_the_page_unrounded(run: EvalFolder) -> None:
    target = write_page(run.path)
    assert target == run.path / "report.html" and not list(run.path.glob("*.tmp"))
    page, results = Page(target.read_text("utf-8")), run.read_results()
    shown = {float(str(d["value"])) for d in page.all("data")}
    results["pass"].pop("1")  # the headline
    parts = ("avg", "pass", "maj", "distinct", "g_pass", "groups", "verdicts", "stages", "health")
    for part in parts:
        assert set(leaves(results[part])) <= shown, part
    lengths = {k: v for k, v in results["lengths"].items() if k in ("right", "wrong", "truncated")}
    assert set(leaves(lengths)) <= shown  # lists (the histograms' counts) are no leaves
    assert {results["calibration"]["ece"], results["calibration"]["brier"], results["seed_sd"]} <= shown
    assert "sampling temperature 0.6" in page.text
    assert f"{100 * results['avg']['value']:.1f} %" in page.text and "avg@ 3" in page.text


def test_samples_are_on_the_page_whole(run: EvalFolder) -> None:
    raw = render(run)
    index = unpacked(raw, "index")
    assert [row["verdicts"] for row in index] == ["rrr", "www", "TTT", "rwT"]
    assert [row["tokens"] for row in index] == [11, 21, 31, 41]  # means of 10 (p + 1) + i
    texts = {(s.problem, s.index): s.text for s in run.samples()}
    for place, row in enumerate(index):
        block = unpacked(raw, f"data-{place}")
        assert {(row["id"], s["index"]): s["text"] for s in block["samples"]} == {
            key: text for key, text in texts.items() if key[0] == row["id"]
        }


@pytest.fixture
def hostile(tmp_path: Path) -> EvalFolder:
    text = TRICKS.replace("\x00", "").encode("utf-8", "replace").decode()
    problems = [
        Problem(f"{text}{i}", text, kind, text, {"t": text} if kind == "code" else None, {text: f"{text}{i % 2}"})
        for i, kind in enumerate(("math", "code", "choice"))
    ]
    run = folder_of(tmp_path / "hostile", problems, text, [])
    run.write_grades([Grade(g.problem, g.index, False, text, text, text, text, 0) for g in run.grades()])
    results = run.read_results() | {"suite": text, "model": text, "verdicts": {text: 4}, "stages": {text: 2}}
    results["pass"][text] = {"value": 0.5, "low": 0.1, "high": text}
    run.write_json(run.results_file, results)
    run.write_json(run.config_file, {"suite": text, text: text, "sampling": {text: text}, "deep": {"a": [text]}})
    return run


def test_hostile_text_is_inert_everywhere(hostile: EvalFolder) -> None:
    raw = render(hostile)
    page = Page(raw)
    kinds = [s.get("type") for s in page.all("script")]
    assert kinds == [None if i == len(kinds) - 1 else "application/octet-stream" for i in range(len(kinds))]
    assert not page.all("img") and "<script>alert" not in raw and "<svg onload" not in raw
    assert not [k for _, attributes in page.elements for k in attributes if k.startswith("on")]
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'") and "unsafe-inline'; script-src 'sha256-" in policy


def test_the_scripts_make_no_markup_of_text_and_load_nothing(run: EvalFolder) -> None:
    raw = render(run)
    for forbidden in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "new Function",
        "import(",
        "url(",
        "<script>",  # within a script it would make its end another one
    ):
        assert raw.count(forbidden) == (forbidden == "<script>"), forbidden
    # "fetch(){" is a method of Temml's reader of macros
    loads = r"(?<![\w.$])(?:eval|fetch|XMLHttpRequest|WebSocket|EventSource|importScripts)\((?!\)\{)"
    assert not re.search(loads, raw)
    for tag, attributes in Page(raw).elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, name)


def test_ids_are_unique_and_everything_is_labelled(run: EvalFolder) -> None:
    page = Page(render(run))
    ids = [a["id"] for _, a in page.elements if a.get("id")]
    assert len(ids) == len(set(ids))
    assert len(page.all("table")) == len(page.all("caption")) > 5
    for svg in page.all("svg"):
        assert svg.get("aria-hidden") or set(str(svg["aria-labelledby"]).split()) <= set(ids)
    assert "right: mean 18, median 12, p90 32; wrong:" in page.text  # of 10, 11, 12 and 40 tokens
    assert page.text.index("1 1 100.0") < page.text.index("2 1 0.0") < page.text.index("10 2 16.7")  # by number


@pytest.mark.parametrize("part", ["avg", "pass", "maj", "groups", "lengths", "health", "calibration", "verdicts", "n"])
@pytest.mark.parametrize("damage", ["gone", "none", "odd"])
def test_any_part_of_the_results_may_be_missing_or_odd(run: EvalFolder, part: str, damage: str) -> None:
    results = run.read_results()
    if damage == "gone":
        del results[part]
    else:
        results[part] = None if damage == "none" else {"a": {"b": [None, "c"]}}
    run.write_json(run.results_file, results)
    Page(render(run))


def test_an_unfinished_run_says_what_is_missing(run: EvalFolder) -> None:
    run.results_file.unlink()
    run.write_grades(list(run.grades())[:10])
    (run.path / "samples" / "rank-0.jsonl").write_text(
        "".join((run.path / "samples" / "rank-0.jsonl").read_text().splitlines(keepends=True)[:11])
    )
    raw = render(run)
    text = Page(raw).text
    assert "results.json is not there" in text and "11 of 12 samples are there" in text
    assert "1 samples are not graded" in text and "Not scored yet" in text
    assert unpacked(raw, "index")[3]["verdicts"] == "ru-"


def test_an_empty_folder_gives_a_page(tmp_path: Path) -> None:
    assert "Not scored yet" in Page(render(EvalFolder(tmp_path))).text


def test_long_samples_keep_head_and_tail_within_the_limit() -> None:
    rng = random.Random(0)
    problems = [Problem(f"p{i}", "q", "math", "1") for i in range(20)]
    # Letters at random barely compress (4.7 bits each): the worst that a page must hold.
    noise = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz\n", k=400_000))
    samples = {
        (p.id, i): Sample(p.id, i, noise[100_000 * i : 100_000 * (i + 1)] if i else "short", 9, "stop", 0)
        for p in problems
        for i in range(4)
    }
    limit = 500_000
    packed = pack(problems, of(samples), of({}), 4, limit)
    assert len(packed.index) + sum(map(len, packed.blocks)) <= limit
    assert packed.clipped == 60 and packed.absent == 0 and packed.longest > 4000
    first = json.loads(gzip.decompress(base64.b64decode(packed.blocks[0])))["samples"]
    assert first[0]["text"] == "short"
    head, left, tail = first[1]["text"]
    text = samples["p0", 1].text
    assert text.startswith(head) and text.endswith(tail) and len(head) + left + len(tail) == len(text)
    tight = pack(problems, of(samples), of({}), 4, 18_000)
    assert tight.longest == SHORTEST_TEXT and tight.absent == 40  # two samples of each problem still fit
    assert len(tight.index) + sum(map(len, tight.blocks)) <= 18_000


def test_clipping_ends_at_lines_and_verdicts_have_their_letter() -> None:
    assert clip("short", 100) == "short"
    head, left, tail = clip("line\n" * 100, 90)
    assert head == "line\n" * 12 and tail == "line\n" * 5 and left == 415  # 60 and 30 characters, at whole lines
    letters = {}
    for kind, passed, finish in (*OUTCOMES, ("right", True, "length"), ("wrong", False, "length")):
        letters[kind, finish] = verdict(Sample("p", 0, "", 1, finish, 0), Grade("p", 0, passed, kind, None, "", ""))
    assert list(letters.values()) == ["r", "w", "T", "R", "t"]
    stopped = Sample("p", 0, "", 1, "stop", 0)
    assert verdict(stopped, Grade("p", 0, False, "no_program", None, "", "")) == "n"
    assert verdict(stopped, Grade("p", 0, False, "timeout", None, "", "")) == "e" and verdict(stopped, None) == "u"


def listed(browser: Chromium) -> list[str]:
    return list(browser.value("[...document.querySelectorAll('#problem-list .id')].map((x) => x.textContent)"))


def choose(browser: Chromium, field: str, value: str) -> None:
    event = "input" if field == "search" else "change"
    setting = f"field.value = {json.dumps(value)}; field.dispatchEvent(new Event('{event}', {{bubbles: true}}))"
    browser.value(f"(() => {{ const field = document.getElementById('{field}'); {setting} }})()")


def test_filters_orders_and_search_of_the_samples(run: EvalFolder, browser: Chromium) -> None:
    browser.open(write_page(run.path))
    browser.wait("document.querySelectorAll('#problem-list a').length === 4")
    a, b, c, d = (f"quiz/{key}" for key in "abcd")
    for show, rows in {"right": [a], "wrong": [b, c], "mixed": [d], "truncated": [c, d], "": [a, b, c, d]}.items():
        choose(browser, "show", show)
        assert listed(browser) == rows, show
    choose(browser, "order", "hard")
    assert listed(browser) == [b, c, d, a]  # solve rates 0, 0, 1/3, 1
    choose(browser, "group", '["level","10"]')
    assert listed(browser) == [c, d]
    choose(browser, "group", "")
    choose(browser, "search", "Sample 2 of quiz/B")  # only in a sample, in other capitals
    browser.wait("document.getElementById('count').textContent === '1 of 4 problems'")
    assert listed(browser) == [b] and browser.requests() == browser.complaints() == []


def test_a_problem_opens_with_its_formulas(run: EvalFolder, browser: Chromium) -> None:
    browser.open(write_page(run.path), "#problem=quiz%2Fd")
    browser.wait("document.querySelector('#problem-detail .written math')")
    detail = "document.querySelector('#problem-detail {}').{}"
    assert browser.value(detail.format("h3", "textContent")) == "quiz/d"
    assert browser.value(detail.format(".question math", "textContent")) == "xd"
    assert browser.value(detail.format(".gold mfrac", "textContent")) == "34"
    assert browser.value(detail.format(".written .display msup", "textContent")) == "x2"
    assert browser.value(detail.format(".written p math mrow[style*=border] mfrac", "textContent")) == "34"
    assert browser.value(detail.format(".written code.source", "textContent")) == r"$\nosuchcommand{1}$"
    assert browser.value(detail.format(".written pre code", "textContent")) == 'print("$a$")'
    assert browser.value(detail.format(".written strong", "textContent")) == "First"
    assert not browser.value(detail.format(".think", "open"))
    browser.value(detail.format(".think", "open = true"))
    browser.wait(detail.format(".think math", "textContent") + " === 'x=16'")  # and the prices are no formula
    assert "$7 and $9 are prices" in browser.value(detail.format(".think", "textContent"))
    assert browser.value("document.querySelectorAll('.sample').length") == 3
    browser.press("r")
    assert browser.value(detail.format(".written pre.raw", "textContent")).startswith("<think>\nHm, $7")
    browser.press("k")
    browser.wait("document.querySelector('#problem-detail h3').textContent === 'quiz/c'")
    assert browser.value("location.hash") == "#problem=quiz%2Fc"
    assert browser.requests() == browser.complaints() == []


def test_injections_do_not_run(hostile: EvalFolder, browser: Chromium) -> None:
    browser.open(write_page(hostile.path))
    browser.wait("document.querySelectorAll('#problem-list a').length === 3")
    browser.wait("document.querySelector('#problem-detail .written')")
    browser.press("o")
    browser.wait("document.querySelectorAll('#problem-detail .written').length === 3")
    assert browser.value("document.querySelectorAll('img, #problem-detail script, [href^=javascript]').length") == 0
    assert "<script>alert(1)</script>" in browser.value("document.querySelector('.written').textContent")
    dialogs = [e for e in browser.events if e.get("method") == "Page.javascriptDialogOpening"]
    assert dialogs == browser.requests() == browser.complaints() == []


# LaTeX, and the text of its MathML with the tags of its elements that matter.
FORMULAS = {
    r"\frac12": ("12", "mfrac"),
    r"10^{-3}": ("10−3", "msup"),
    r"x_1^2": ("x12", "msubsup"),
    r"\sqrt[3]{x}": ("x3", "mroot"),
    r"{n \choose k}": ("(nk)", "mfrac"),
    r"1 \over 2": ("12", "mfrac"),
    r"\sum_{i=1}^n i": ("∑i=1ni", "msubsup"),
    r"\mathbb{R}^n": ("ℝn", "msup"),
    r"f'(x)": ("f′(x)", "msup"),
    r"\text{if $x$ is } 1{,}000": ("if\u00a0x\u00a0is\u00a01,000", "mtext"),
    r"\left.\frac{a}{b}\right|_0": ("ab|0", "msub"),
    r"a \not= b, \{1, 2\}": ("a=\u0338b,{1,2}", "mo"),
    r"\begin{cases} 1 & x \\ 2 & y \end{cases}": ("{1x2y", "mtable"),
    r"\begin{array}{c|c} 1 & 2 \\ \hline 3 & 4 \end{array}": ("1234", "mtable"),
    r"a &= b \\ &= c": ("a=b=c", "mtable"),
    r"\overline{AB} \cong \widehat{C}": ("AB≅Cˆ", "mover"),
    r"5 \pmod{7}": ("5(mod7)", "mrow"),
    r"\operatorname{lcm}(2, 3) = 6\%": ("lcm\u2061(2,3)=6%", "mi"),
}
PROSE = ("$5 and $6", "US$5/$6 each", "It costs $5.", "$20 per day and 30$ more", "($5) or (6)", r"\$5 and \$6")
FAILURES = (r"\frac{1}", r"{x", r"x}", r"\left( x", r"\begin{align} x", r"\nope", "{" * 100 + "}" * 99, "x" * 4001)


def test_formulas_become_mathml_and_money_does_not(run: EvalFolder, browser: Chromium) -> None:
    answers = [*(f"${tex}$" for tex in FORMULAS), *PROSE, *(rf"\[{tex}\]" for tex in FAILURES)]
    problems = [Problem(f"f/{i}", "q", "math", "1") for i in range(len(answers))]
    made = folder_of(run.path / "formulas", problems, "x", [])
    (made.path / "samples" / "rank-0.jsonl").unlink()
    writer = made.appender(0)
    for problem, text in zip(problems, answers, strict=True):
        writer.add(Sample(problem.id, 0, text, 1, "stop", 0))
    writer.close()
    browser.open(write_page(made.path))
    browser.wait("document.querySelectorAll('#problem-list a').length > 0")
    for i, text in enumerate(answers):
        if i:  # the first one is open
            browser.press("j")
        browser.wait(f"document.querySelector('#problem-detail h3')?.textContent === 'f/{i}'")
        box = "document.querySelector('#problem-detail .written')"
        if i < len(FORMULAS):
            words, tag = FORMULAS[text[1:-1]]
            assert browser.value(f"{box}.querySelector('math')?.textContent") == words, text
            assert browser.value(f"{box}.querySelectorAll('math {tag}').length") > 0, text
        else:
            assert browser.value(f"{box}.querySelectorAll('math').length") == 0, text
            assert browser.value(f"{box}.textContent.trim()") == text.replace(r"\$", "$"), text
