"""Suites and their data: what is read, and what is said of what cannot be."""

from __future__ import annotations

import gzip
import json
import os
import random
import tomllib
from pathlib import Path
from typing import Any

import pytest

from llmdistill.errors import UserError
from llmdistill.evals.readers import READERS, Row, called
from llmdistill.evals.suite import DATA_ENV, bundled_suites, data_hash, load_problems, load_suite, rows_of, subsample
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
        ({"suite": "../up"}, "suite is '../up'; it must be one word"),
        ({"suite": "/etc/x"}, "suite is '/etc/x'"),
        ({"sampling": {"n": 0}}, "sampling.n is 0; it must be a whole number from 1"),
        ({"sampling": {"n": "four"}}, "sampling.n is 'four'"),
        ({"sampling": {"temperature": -1}}, "sampling.temperature is -1"),
        ({"sampling": {"top_p": 0}}, "sampling.top_p is 0; it must be in (0, 1]"),
        ({"template": 5}, "template is 5; it must be a name or a mapping"),
        ({"template": {"user": "{question}", "stop": [""]}}, "stop is ['']"),
        ({"template": {"user": "{question}", "prefill": 3}}, "template.prefill is 3; it must be str"),
        ({"groups": "size"}, "groups is 'size'; it must be a list"),
        ({"columns": ["a"]}, "columns is ['a']; it must be a mapping"),
        ({"data": {"hub": {"split": "test"}}}, "data.hub.path is None"),
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
    draws = [{p.id for p in subsample(problems, limit, seed=3)} for limit in range(1, 200)]
    assert all(len(small) + 1 == len(large) and small < large for small, large in zip(draws, draws[1:], strict=False))
    sparse = random.Random(3).sample(range(200), 6)  # draws of a small share are those of earlier versions
    assert subsample(problems, 6, seed=3) == [problems[i] for i in sorted(sparse)]


def test_numbers_are_answers_as_they_stand(tmp_path: Path) -> None:
    given = [1234567.0, 123456789.5, 3.14159265, 7, -0.5]
    rows = [{"id": str(i), "question": "?", "answer": value} for i, value in enumerate(given)]
    golds = [p.gold for p in load_problems(load_suite(made.suite(tmp_path, rows=rows)))]
    assert golds == ["1234567", "123456789.5", "3.14159265", "7", "-0.5"]
    (tmp_path / "sums.jsonl").write_text('\ufeff{"question": "?", "answer": NaN}\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 1: field 'answer' is nan"):
        load_problems(load_suite(tmp_path / "sums.yaml"))
    (tmp_path / "sums.jsonl").write_bytes('{"question": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match="line 1 is not JSON"):
        load_problems(load_suite(tmp_path / "sums.yaml"))


def test_mbpp_of_the_hub_knows_its_function() -> None:
    """There the rows name no entry point: it is what the tests call and the solution defines."""
    code = "def helper(x):\n    return x\ndef double(x):\n    return helper(2 * x)"
    row = {"task_id": 11, "text": "Double it.", "code": code, "test_list": ["assert double(2) == 4"]}
    problem = READERS["mbpp"](Row(row, "x row 0", 0), "code", {}, ())
    assert problem.id == "11" and problem.tests is not None and problem.tests["entry_point"] == "double"
    assert called("def f(:", "f(1)") is None and called("def f(): pass", "g(1)") is None


@pytest.mark.skipif(not (DATA / "benchmarks").is_dir(), reason="the benchmarks' files are not here")
@pytest.mark.parametrize("name", ["mbpp", "mbppplus"])
def test_derived_functions_are_those_of_the_files(name: str) -> None:
    rows = list(rows_of(DATA / "benchmarks" / ("mbpp_sanitized.jsonl" if name == "mbpp" else "mbppplus.jsonl.gz")))
    derived = [
        called(row.values["canonical_solution"], "\n".join(row.values.get("test_list") or row.values["base_test_list"]))
        for row in rows
    ]
    differ = [r.values["id"] for r, d in zip(rows, derived, strict=True) if d != r.values["entry_point"]]
    assert len(differ) <= 0.02 * len(rows), differ


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


def test_a_plain_prompt_ends_with_its_prefill() -> None:
    template = Template("t", 1, "Q: {question}\nA:", chat=False, prefill=" So")
    assert template.render("1+1?", tiny.tokenizer())[0] == "Q: 1+1?\nA: So"


def test_one_stop_word_is_a_word() -> None:
    assert find_template({"user": "{question}", "stop": "END"}).stop == ("END",)


def test_thinking_that_a_template_does_not_know_is_refused() -> None:
    with pytest.raises(UserError, match="takes no enable_thinking"):
        find_template("plain").render("q", tiny.tokenizer(), thinking=True)


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
