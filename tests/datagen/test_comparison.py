"""Teachers side by side: numbers computed by hand, and what cannot be compared."""

import math

import pytest

from llmdistill.datagen.comparison import compare_teachers
from llmdistill.datagen.tables import read_rows, write_rows
from llmdistill.errors import UserError
from tests import tiny


def traces(tmp_path, rows):
    write_rows(tmp_path / "in.jsonl", rows)
    return tmp_path / "in.jsonl"


def row(teacher, prompt, passed=None, tokens=10, finish="stop", completion="four"):
    return dict(teacher=teacher, prompt=prompt, completion=completion, passed=passed, tokens=tokens, finish=finish)


def test_numbers_are_of_the_prompts_that_all_answered(tmp_path):
    rows = [
        row("big", "a", True, 100),
        row("big", "a", False, 300),
        row("big", "b", True, 200, "length"),
        row("big", "only big", False, 9),
        row("small", "a", False, 10),
        row("small", "b", True, 40),
        row("small", "b", None, 20),
    ]
    manifest = compare_teachers(traces(tmp_path, rows), tmp_path / "teachers.md")
    big, small = (manifest.details["teachers"][name] for name in ("big", "small"))
    assert manifest.details["prompts"] == 2 and (big["traces"], small["traces"]) == (3, 3)
    assert big["right"]["mean"] == 0.75 and small["right"]["mean"] == 0.5
    assert big["finished"] == 0.5 and small["finished"] == 1.0
    assert big["length"]["p50"] == 200 and small["length"]["p50"] == 20
    assert big["log_length"]["mean"] == pytest.approx((math.log(100) + math.log(300) + math.log(200)) / 3)
    assert manifest.details["differences"]["big - small"]["difference"] == 0.25
    page = (tmp_path / "teachers.md").read_text()
    assert "| big | 3 | 75.0% [" in page and "not measured" in page and "+25.0%" in page


def test_a_student_s_nats_per_byte(tmp_path):
    tiny.llama(1).save_pretrained(tmp_path / "student")
    tiny.tokenizer().save_pretrained(tmp_path / "student")
    rows = [row(t, p, completion=f"{t} says {p}") for t in ("one", "two") for p in ("a", "b", "c")]
    source = traces(tmp_path, rows)
    source.write_text("{broken\n" + source.read_text())
    settings = dict(student=str(tmp_path / "student"), dtype="float32", max_rejected=0.5)
    manifest = compare_teachers(source, tmp_path / "t.md", **settings)
    assert manifest.counts["rejected"] == 1  # though the rows are read twice
    from llmdistill.datagen.student import Student

    student = Student(str(tmp_path / "student"), "float32")
    mine = [r for r in rows if r["teacher"] == "two"]
    nats = -sum(sum(read.logprobs) for read in student.read(mine))
    size = sum(len(r["completion"]) for r in mine)
    assert manifest.details["teachers"]["two"]["nats_per_byte"]["mean"] == pytest.approx(nats / size, rel=1e-5)
    assert manifest.counts["read"] == 6


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("one", "a")], "the traces are of one; at least two teachers"),
        ([row("one", "a"), row("two", "b")], "no prompt was answered by all teachers"),
    ],
)
def test_nothing_to_compare(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        compare_teachers(traces(tmp_path, rows), tmp_path / "t.md")


def judged(completion, row):
    """A judge: about half of what a random model writes."""
    return sum(map(ord, completion)) % 2 == 0


@pytest.mark.slow
def test_a_trial_teaches_a_student_by_each_teacher_and_asks_it(tmp_path):
    """On the same prompts, of which none is asked; gone on with, nothing is trained twice."""
    tiny.llama(1).save_pretrained(tmp_path / "student")
    tiny.tokenizer().save_pretrained(tmp_path / "student")
    rows = [row(t, f"q{i}", i != 3, completion=f"{t} {i}") for t in ("one", "two/x") for i in range(16)]
    trial = {
        "prompts": 4,
        "heldout": 0.4,
        "judge": f"{__name__}:judged",
        "sampling": {"max_new_tokens": 4},
        "role": {"engine": "hf", "dtype": "float32"},
        "settings": {"objective.stage1_epochs": 1, "train.use_cpu": True, "train.report_to": "none"},
    }
    settings = dict(student=str(tmp_path / "student"), dtype="float32", trial=trial)
    found = compare_teachers(traces(tmp_path, rows), tmp_path / "t.md", **settings).details["trial"]
    assert list(found["right"]) == ["untrained", "one", "two/x"] and found["trained_on"] == 4
    assert list(found["differences"]) == ["one - two/x"]
    folder = tmp_path / "t.md.trial"
    files = [file for file in folder.glob("*.jsonl") if ".answers" not in file.name]
    taught = {file.name[:3]: [r["prompt"] for r in read_rows(file)] for file in files}
    assert taught["one"] == taught["two"] and len(taught["one"]) == 4 and "q3" not in taught["one"]
    assert not set(taught["one"]) & set(taught["ask"]) and len(taught["ask"]) == found["asked"]
    assert "| untrained |" in (tmp_path / "t.md").read_text()
    trained = {file: file.stat().st_mtime_ns for file in folder.glob("*/student/*.safetensors")}
    (tmp_path / "t.md.manifest.json").unlink()
    compare_teachers(tmp_path / "in.jsonl", tmp_path / "t.md", **settings)
    assert len(trained) == 2 and {file: file.stat().st_mtime_ns for file in trained} == trained


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trial": {}}, "a trial trains a student, and none is named"),
        ({"trial": {"propmts": 3}, "student": "s"}, "trial has no setting 'propmts'"),
        ({"trial": {"heldout": 1.0}, "student": "s"}, r"heldout 1.0.*Fix: heldout in \(0, 1\)"),
    ],
)
def test_what_a_trial_needs(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        compare_teachers(traces(tmp_path, [row("one", "a"), row("two", "a")]), tmp_path / "t.md", **settings)
