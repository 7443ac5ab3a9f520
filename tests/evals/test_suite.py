"""Suites and their data: what is read, and what is said of what cannot be."""

from __future__ import annotations

import gzip
import json
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

from llmdistill.errors import UserError
from llmdistill.evals.readers import READERS, Row
from llmdistill.evals.suite import DATA_ENV, bundled_suites, data_hash, load_problems, load_suite, subsample
from llmdistill.evals.templates import TEMPLATES, Template, find_template
from tests import tiny
from tests.evals import made

DATA = Path(os.environ.get(DATA_ENV) or Path(__file__).resolve().parents[3] / "shared" / "data")


def test_a_suite_of_ones_own(tmp_path: Path) -> None:
    suite = load_suite(made.suite(tmp_path))
    problems = load_problems(suite)
    assert [p.id for p in problems] == [f"sum/{i}" for i in range(6)]
    assert problems[3].question == "3 + 3 =" and problems[3].gold == "6" and problems[3].groups == {"size": "odd"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "poem"}, "kind is 'poem'; it must be one of math, choice, code"),
        ({"sampling": {"temprature": 1}}, "unknown key sampling.temprature"),
        ({"tempalte": "plain"}, "unknown key tempalte"),
        ({"template": "nice"}, "template is 'nice'; it must be one of boxed"),
        ({"template": {"user": "no place for it"}}, "{question} exactly once"),
        ({"template": {"user": "{question}", "sytem": "x"}}, "unknown key 'sytem'"),
        ({"pass_at": [0]}, "pass_at is [0]; it must be a list of whole numbers from 1"),
        ({"reader": "csv"}, "reader is 'csv'; it must be one of rows"),
        ({"data": {}}, "data is missing"),
        ({"data": {"file": "gone.jsonl"}}, "gone.jsonl' is not in"),
    ],
)
def test_mistakes_in_a_suite_are_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    file = made.suite(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        load_problems(load_suite(file), tmp_path / "empty")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"id": "x", "question": "1+1"}', "sums.jsonl line 2: field 'answer' is missing"),
        ('{"id": "x", "question": " ", "answer": "2"}', "line 2: field 'question' is ' '"),
        ('{"id": "x", "question": ["a", "b"], "answer": "2"}', "line 2: field 'question' is ['a', 'b']"),
        ('{"id": "x", "question"', "line 2 is not JSON"),
        ("[1]", "line 2 is list, not an object"),
        ('{"id": "sum/0", "question": "0 + 0 =", "answer": "0"}', "two problems with the id 'sum/0'"),
    ],
)
def test_mistakes_in_the_data_are_named_by_line_and_field(tmp_path: Path, line: str, said: str) -> None:
    file = made.suite(tmp_path)
    (tmp_path / "sums.jsonl").write_text(json.dumps(made.sum_row(0)) + "\n" + line + "\n")
    with pytest.raises(UserError) as caught:
        load_problems(load_suite(file))
    assert said in str(caught.value)


def test_no_suite_and_no_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a file nor one of aime24"):
        load_suite("maths")
    with pytest.raises(UserError, match="has no problems"):
        load_problems(load_suite(made.suite(tmp_path, rows=[])))


def test_the_data_folder_goes_before_the_hub_and_may_be_packed(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "benchmarks"
    folder.mkdir(parents=True)
    with gzip.open(folder / "gsm8k_test.jsonl.gz", "wt") as file:
        file.write(json.dumps({"id": "a", "problem": "1+1?", "answer": "2"}) + "\n")
    assert [p.id for p in load_problems(load_suite("gsm8k"), tmp_path / "data")] == ["a"]
    with pytest.raises(UserError, match="'math500.jsonl' is not in the data folder"):
        load_problems(load_suite("math500"), tmp_path / "data")


def test_the_hash_speaks_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    here, there = (
        load_problems(load_suite(made.suite(tmp_path))),
        load_problems(load_suite(made.suite(tmp_path / "other"))),
    )
    assert data_hash(here) == data_hash(there)
    changed = made.suite(tmp_path, rows=[made.sum_row(0) | {"answer": "1"}, *[made.sum_row(i) for i in range(1, 6)]])
    assert data_hash(load_problems(load_suite(changed))) != data_hash(here)


def test_a_subsample_is_a_draw_in_order(tmp_path: Path) -> None:
    problems = load_problems(load_suite(made.suite(tmp_path, rows=[made.sum_row(i) for i in range(200)])))
    some = subsample(problems, 50, seed=1)
    assert len(some) == 50 and [p.id for p in some] != [p.id for p in problems[:50]]
    assert [problems.index(p) for p in some] == sorted(problems.index(p) for p in some)
    assert some == subsample(problems, 50, seed=1) != subsample(problems, 50, seed=2)
    assert subsample(problems, 0) == subsample(problems, 500) == problems


def test_gsm8k_as_published() -> None:
    row = Row({"question": "How many?", "answer": "2+3=5\n#### 1,005"}, "x row 0", 0)
    assert READERS["gsm8k"](row, "math", {}, ()).gold == "1005"
    with pytest.raises(UserError, match="no '####'"):
        READERS["gsm8k"](Row({"question": "How many?", "answer": "5"}, "x row 0", 0), "math", {}, ())


def test_every_suite_is_in_the_wheel() -> None:
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {f"eval/{name}.yaml": f"llmdistill/evals/suites/{name}.yaml" for name in bundled_suites()}


def test_every_bundled_suite_is_well_formed() -> None:
    suites = {name: load_suite(file) for name, file in bundled_suites().items()}
    wanted = {
        *(
            "math500",
            "aime24",
            "aime25",
            "amc23",
            "gsm8k",
            "minerva_math",
            "olympiadbench",
            "humaneval",
            "humanevalplus",
        ),
        *("mbpp", "mbppplus", "livecodebench"),
    }
    assert wanted <= set(suites)
    assert all(suite.name == name for name, suite in suites.items())


@pytest.mark.skipif(not (DATA / "benchmarks").is_dir(), reason="the benchmarks' files are not here")
@pytest.mark.parametrize(
    ("name", "count"),
    [
        *(("math500", 500), ("aime24", 30), ("aime25", 30), ("amc23", 40), ("gsm8k", 1319), ("minerva_math", 272)),
        *(("olympiadbench", 675), ("humaneval", 164), ("humanevalplus", 164), ("mbpp", 427), ("mbppplus", 378)),
        ("livecodebench", 279),
    ],
)
def test_the_real_files_have_the_published_sizes(name: str, count: int) -> None:
    problems = load_problems(load_suite(name), DATA)
    assert len(problems) == count
    assert all(p.tests and p.tests["style"] for p in problems if p.kind == "code")
    assert all(p.gold for p in problems if p.kind == "math")


# ------------------------------------------------------------------ templates


def test_a_template_is_rendered_once_and_braces_stay() -> None:
    template = find_template("boxed")
    text, ids = template.render("what is {x}?", tiny.tokenizer())
    assert (
        text == "<user>what is {x}?\nPlease reason step by step, and put your final answer within \\boxed{}.<assistant>"
    )
    assert tiny.tokenizer().decode(ids) == text


def test_the_hash_of_a_template_covers_every_word() -> None:
    plain = Template("t", 1, "{question}")
    others = [
        Template("t", 1, "{question} "),
        Template("t", 2, "{question}"),
        Template("t", 1, "{question}", stop=("x",)),
    ]
    assert len({t.hash for t in (plain, *others, *TEMPLATES.values())}) == 4 + len(TEMPLATES)


def test_thinking_reaches_the_chat_template() -> None:
    tokenizer = tiny.tokenizer("{% if enable_thinking is defined %}{{ enable_thinking }}{% else %}none{% endif %}")
    template = find_template("plain")
    assert [template.render("q", tokenizer, thinking=value)[0] for value in (None, True, False)] == [
        "none",
        "True",
        "False",
    ]


def test_a_model_without_chat_template_is_told_what_to_do() -> None:
    with pytest.raises(UserError, match="--template question-answer"):
        find_template("boxed").render("q", tiny.tokenizer(None))
    text, _ = find_template("question-answer").render("q", tiny.tokenizer(None))
    assert text == "Question: q\nAnswer:"
