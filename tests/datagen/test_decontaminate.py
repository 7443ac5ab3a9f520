"""Rows with benchmark problems go, with a report of which; the rest stays as it was."""

import json

import pytest

from llmdistill.datagen.decontamination import decontaminate
from llmdistill.datagen.tables import read_rows, write_rows
from llmdistill.errors import UserError

QUESTION = (
    "A farmer has seventeen sheep and all but nine run away in the night, so how many sheep are left on the farm?"
)
OTHER = (
    "Two trains start from towns that are four hundred miles apart and drive towards each other at fifty miles an hour."
)


def problems(file, *questions):
    write_rows(file, [{"id": f"p{i}", "question": q} for i, q in enumerate(questions)])
    return str(file)


def test_rows_that_hold_a_problem_go_and_are_told(tmp_path):
    first, second = problems(tmp_path / "first.jsonl", QUESTION), problems(tmp_path / "second.jsonl", OTHER, QUESTION)
    rows = [
        {"id": "a", "prompt": "What is 2 + 2?", "completion": "It is 4."},
        {"id": "b", "prompt": [{"role": "user", "content": "Solve: " + QUESTION.upper()}], "completion": "Nine."},
        {"id": "c", "prompt": "Tell me of trains.", "completion": "Here is one: " + OTHER, "meta": "{}"},
        {"id": "d", "prompt": "harmless", "completion": "harmless", "meta": QUESTION},
    ]
    write_rows(tmp_path / "in.jsonl", rows)
    out = tmp_path / "out.jsonl"
    manifest = decontaminate(tmp_path / "in.jsonl", out, suites=[first, second])
    assert list(read_rows(out)) == [rows[0], rows[3]]
    assert manifest.lost == {"holds a problem of first, second": 1, "holds a problem of second": 1}
    assert {n: (s["problems"], s["found"]) for n, s in manifest.details["suites"].items()} == {
        "first": (1, 1),
        "second": (2, 2),
    }
    told = [json.loads(line) for line in (tmp_path / "out.jsonl.contaminated.jsonl").read_text().splitlines()]
    assert [(t["id"], t["problems"]) for t in told] == [("b", ["first/p0", "second/p1"]), ("c", ["second/p0"])]


def test_other_problems_under_the_same_name_are_looked_for_again(tmp_path):
    write_rows(tmp_path / "in.jsonl", [{"prompt": OTHER, "completion": "x"}])
    out, suite = tmp_path / "out.jsonl", problems(tmp_path / "suite.jsonl", QUESTION)
    assert decontaminate(tmp_path / "in.jsonl", out, suites=[suite]).counts["written"] == 1
    problems(tmp_path / "suite.jsonl", QUESTION, OTHER)
    assert decontaminate(tmp_path / "in.jsonl", out, suites=[suite]).counts["written"] == 0
    with pytest.raises(UserError, match="was made with n 13, now it is 8"):
        decontaminate(tmp_path / "in.jsonl", out, suites=[suite], n=8)


def test_every_suite_that_can_be_had(tmp_path, monkeypatch):
    data = tmp_path / "data"
    (data / "benchmarks").mkdir(parents=True)
    row = {"id": "t/0", "problem": QUESTION, "answer": "9", "subject": "s", "level": "1", "unique_id": "u"}
    (data / "benchmarks" / "math500.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setenv("LLMDISTILL_DATA", str(data))
    write_rows(tmp_path / "in.jsonl", [{"prompt": QUESTION, "completion": "9"}, {"prompt": "a", "completion": "b"}])
    manifest = decontaminate(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert manifest.counts["written"] == 1 and manifest.details["suites"]["math500"]["found"] == 1
    assert "gsm8k" in manifest.details["suites_missing"]
    assert not set(manifest.details["suites"]) & set(manifest.details["suites_missing"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"suites": ["no_such"]}, "suite 'no_such' is neither a file nor one of"),
        ({"suites": []}, "no suite was named"),
        ({"least": 2.0}, "least is 2.0"),
        ({"n": 1}, "n 1"),
    ],
)
def test_bad_input(tmp_path, settings, message):
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(UserError, match=message):
        decontaminate(tmp_path / "in.jsonl", tmp_path / "out.jsonl", **settings)
