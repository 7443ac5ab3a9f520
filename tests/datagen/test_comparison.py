"""Teachers side by side: numbers computed by hand, and what cannot be compared."""

import math

import pytest

from llmdistill.datagen.comparison import compare_teachers
from llmdistill.datagen.tables import write_rows
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
