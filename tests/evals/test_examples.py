"""Few-shot prompts: how examples are written, that results name them, and what of them is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmdistill.errors import UserError
from llmdistill.evals import Evaluation, evaluate
from llmdistill.evals.command import table
from llmdistill.evals.config import EvalConfig
from llmdistill.evals.engines.make import open_source
from llmdistill.evals.jobs import Job, prepare
from llmdistill.evals.suite import load_suite
from llmdistill.evals.templates import TEMPLATES, Example, Template, find_template
from tests import tiny
from tests.evals import made

SOLVED = [{"question": "10 + 10 =", "answer": "20"}, {"question": "11 + 11 =", "answer": "22"}]


def examples(folder: Path, rows: list[dict[str, Any]]) -> Path:
    file = folder / "solved.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base model: no chat template."""
    return str(made.model(tmp_path_factory.mktemp("base"), template=None))


def job_of(folder: Path, model: str, suite: Path, **settings: Any) -> Job:
    config = EvalConfig(model=model, engine="hf", output_dir=str(folder / "out"), **settings)
    return prepare(load_suite(suite), config, open_source(config))


def test_a_base_model_reads_examples_and_the_question_as_one_text(tmp_path: Path, base: str) -> None:
    file = examples(tmp_path, SOLVED)
    job = job_of(tmp_path, base, made.suite(tmp_path, template="question-answer"), few_shot=str(file))
    asked = next(a for a in job.asked if a.problem == "sum/3")
    assert asked.text == (
        "Question: 10 + 10 =\nAnswer: 20\n\nQuestion: 11 + 11 =\nAnswer: 22\n\nQuestion: 3 + 3 =\nAnswer:"
    )
    assert tiny.tokenizer(None).decode(asked.ids) == asked.text


def test_a_suite_may_name_them(tmp_path: Path, base: str) -> None:
    examples(tmp_path, SOLVED[:1])
    suite = made.suite(tmp_path, template="question-answer", few_shot="solved.jsonl")
    assert job_of(tmp_path, base, suite).asked[0].text.startswith("Question: 10 + 10 =\nAnswer: 20\n\nQuestion: 0")


def test_a_chat_has_a_turn_for_each() -> None:
    template = Template("t", 1, "{question}!", system="S", prefill="So", examples=(Example("1?", "one"),))
    assert template.messages("2?") == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "1?!"},
        {"role": "assistant", "content": "So one"},
        {"role": "user", "content": "2?!"},
    ]
    text, _ = template.render("2?", tiny.tokenizer())
    assert [text.index(part) for part in ("1?!", "So one", "2?!")] == sorted(
        text.index(part) for part in ("1?!", "So one", "2?!")
    )
    assert text.endswith("So")


def test_an_answer_follows_as_the_template_leaves_it() -> None:
    """No second space, and none before an indented body."""
    template = Template("t", 1, "Q: {question}\nA: ", chat=False, stop=("Q:",), examples=(Example("q", "a\n"),))
    assert template.render("r", tiny.tokenizer(None))[0] == "Q: q\nA: a\n\nQ: r\nA: "
    code = Template("c", 1, "{question}", chat=False, stop=("\ndef",), examples=(Example("def f():", "\n    1"),))
    assert code.render("def g():", tiny.tokenizer(None))[0] == "def f():\n    1\n\ndef g():"


def test_results_name_them_and_others_are_another_evaluation(tmp_path: Path, base: str) -> None:
    suite, file = made.suite(tmp_path, template="question-answer"), examples(tmp_path, SOLVED)
    options = {"engine": "hf", "output_dir": str(tmp_path / "out"), "console": Console(file=io.StringIO()), "limit": 2}
    done = evaluate(suite, base, few_shot=str(file), **options)
    assert isinstance(done, Evaluation)
    few_shot = done.results["few_shot"]
    assert few_shot["examples"] == 2 and len(few_shot["hash"]) == 12
    assert f", 2 examples ({few_shot['hash']})" in str(table(done).caption)
    assert f"2 examples {few_shot['hash']}" in (done.folder / "report.html").read_text()
    moved = file.rename(tmp_path / "moved.jsonl")
    assert evaluate(suite, base, few_shot=str(moved), **options).results == done.results  # type: ignore[union-attr]
    moved.write_text(moved.read_text().replace("20", "twenty"))
    with pytest.raises(UserError, match="another evaluation: few_shot.hash is"):
        evaluate(suite, base, few_shot=str(moved), **options)
    with pytest.raises(UserError, match="another evaluation: few_shot"):
        evaluate(suite, base, **options)


def test_templates_without_examples_have_the_hashes_they_had() -> None:
    """Of version 1 as published; a score names them."""
    assert (TEMPLATES["boxed"].hash, TEMPLATES["question-answer"].hash) == ("da5387ea03f3", "d93312481455")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (None, "there is no such file"),
        ([], "which holds no example"),
        ([{"question": "1 + 9 ="}], "solved.jsonl line 1: field 'answer' is missing"),
        ([*SOLVED, {"question": "2  + 2 =", "answer": "4"}], "example 3 of solved.jsonl is the problem 'sum/2'"),
    ],
)
def test_files_that_are_no_examples_are_refused(
    tmp_path: Path, base: str, rows: list[dict[str, Any]] | None, said: str
) -> None:
    file = tmp_path / "solved.jsonl" if rows is None else examples(tmp_path, rows)
    with pytest.raises(UserError) as caught:
        job_of(tmp_path, base, made.suite(tmp_path, template="question-answer"), few_shot=str(file))
    assert said in str(caught.value)


def test_a_plain_template_that_never_stops_is_refused(tmp_path: Path, base: str) -> None:
    suite = made.suite(tmp_path, template={"user": "{question}", "chat": False})
    with pytest.raises(UserError, match="stop is empty and there are few_shot examples"):
        job_of(tmp_path, base, suite, few_shot=str(examples(tmp_path, SOLVED)))
    with pytest.raises(UserError, match="unknown key 'examples'"):
        find_template({"user": "{question}", "examples": []})
    with pytest.raises(UserError, match="few_shot is 3; it must be the name of a file"):
        load_suite(made.suite(tmp_path, few_shot=3))
