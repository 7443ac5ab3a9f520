"""Hours of grading survive a kill, a row whose tests cannot be run, a full disk and a damaged file."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

import llmdistill.evals.grading as grading
from llmdistill.errors import UserError
from llmdistill.evals.command import table
from llmdistill.evals.records import Appender, EvalFolder, Problem, Sample
from llmdistill.evals.runner import Evaluation, regrade
from llmdistill.verify.asked import Asked

QUIET = Console(quiet=True)
SUITE = {
    "suite": "made", "model": "m", "weights": "w", "engine": "hf", "dtype": "float32", "thinking": None, "seed": 0,
    "limit": 0, "data": "d", "sampling": {}, "versions": {}, "n": 2, "pass_at": [1], "maj_at": [2],
    "template": {"name": "plain", "version": 1, "hash": "h", "prefill": ""},
}  # fmt: skip


def folder_of(path: Path, problems: Sequence[Problem]) -> EvalFolder:
    """An evaluation that is drawn and not graded; every first sample is right."""
    folder = EvalFolder(path)
    folder.write_json(folder.config_file, {**SUITE, "problems": len(problems)})
    folder.write_problems(problems)
    writer = folder.appender(0)
    for p in problems:
        texts = ["```python\ndef f():\n    return 1\n```"] * 2 if p.kind == "code" else [f"\\boxed{{{p.gold}}}", "none"]
        writer.add(*(Sample(p.id, i, text, 3, "stop", i) for i, text in enumerate(texts)))
    writer.close()
    return folder


def sums(count: int) -> list[Problem]:
    return [Problem(f"p{i}", f"{i} + {i}", "math", str(2 * i)) for i in range(count)]


def judged(monkeypatch: pytest.MonkeyPatch, stop_after: int = 10**9) -> list[str]:
    """The texts that are judged from now on; the process "dies" behind so many."""
    seen: list[str] = []
    judge_all = grading.AnswerJudge.judge_all

    def watched(self: grading.AnswerJudge, asked: Sequence[Asked]) -> object:
        for each in asked:
            if len(seen) >= stop_after:
                raise KeyboardInterrupt
            seen.append(each.prediction)
        return judge_all(self, asked)

    monkeypatch.setattr(grading.AnswerJudge, "judge_all", watched)
    return seen


def test_a_grading_that_was_interrupted_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = regrade(folder_of(tmp_path / "whole", sums(6)).path, workers=1, console=QUIET)
    folder = folder_of(tmp_path / "cut", sums(6))
    with monkeypatch.context() as patch:
        judged(patch, stop_after=7)  # in the middle of the fourth problem
        with pytest.raises(KeyboardInterrupt):
            regrade(folder.path, workers=1, console=QUIET)
    assert not folder.results_file.exists()
    seen = judged(monkeypatch)
    again = regrade(folder.path, workers=1, console=QUIET)
    assert len(seen) == 6  # of the twelve: three problems were whole
    assert again.results == whole.results
    assert list(folder.grades()) == list(EvalFolder(whole.folder).grades())
    assert not (folder.path / "grading.jsonl").exists()


def test_a_line_cut_off_by_the_kill_is_graded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path, sums(3))
    with monkeypatch.context() as patch:
        judged(patch, stop_after=4)
        with pytest.raises(KeyboardInterrupt):
            regrade(folder.path, workers=1, console=QUIET)
    kept = folder.path / "grading.jsonl"
    kept.write_bytes(kept.read_bytes()[:-5])
    seen = judged(monkeypatch)
    assert regrade(folder.path, workers=1, console=QUIET).score == 0.5
    assert len(seen) == 4  # the second problem's and the third's


@pytest.mark.parametrize("change", ["text", "gold", "judge"])
def test_grades_of_anything_else_do_not_count(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path, sums(2))
    with monkeypatch.context() as patch:
        judged(patch, stop_after=2)
        with pytest.raises(KeyboardInterrupt):
            regrade(folder.path, workers=1, console=QUIET)
    if change == "text":
        rows = [json.loads(line) for line in (tmp_path / "samples" / "rank-0.jsonl").read_text().splitlines()]
        rows[0]["text"] = "other"
        (tmp_path / "samples" / "rank-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif change == "gold":
        folder.write_problems([Problem("p0", "0 + 0", "math", "5"), sums(2)[1]])
    else:
        monkeypatch.setattr("llmdistill.evals.grades.judges_code", lambda: "another release")
    seen = judged(monkeypatch)
    regrade(folder.path, workers=1, console=QUIET)
    assert len(seen) == 4


def test_one_row_whose_tests_cannot_be_run_costs_no_other_grade(tmp_path: Path) -> None:
    """Its problem is named; once it is mended, only its samples are graded."""
    good = {"style": "asserts", "test": "assert f() == 1"}
    bad = Problem("bad", "f", "code", tests={"style": "prose"})
    problems = [Problem(f"c{i}", "f", "code", tests=good) for i in range(2)]
    folder = folder_of(tmp_path, [bad, *problems])
    with pytest.raises(UserError, match="problem 'bad': tests.style is 'prose'"):
        regrade(folder.path, workers=1, allow_unsafe_exec=True, console=QUIET)
    rows = [json.loads(line) for line in (tmp_path / "grading.jsonl").read_text().splitlines()[1:]]
    assert sorted(row["grade"]["problem"] for row in rows) == ["c0", "c0", "c1", "c1"]
    folder.write_problems([Problem("bad", "f", "code", tests=good), *problems])
    assert regrade(folder.path, workers=1, allow_unsafe_exec=True, console=QUIET).score == 1.0


def test_a_full_disk_while_drawing_is_a_message(tmp_path: Path) -> None:
    writer = Appender(tmp_path / "rank-0.jsonl")
    writer.file.close()
    writer.file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(UserError, match="cannot be written: No space left .*before is whole. Fix: make room"):
        writer.add(Sample("a", 0, "text", 1, "stop", 0))


@pytest.mark.parametrize("name", ["results.json", "config.json"])
def test_a_damaged_file_is_a_message(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, sums(1))
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=f"{name} is damaged: .* Fix: "):
        folder.read_results() if name == "results.json" else folder.read_config()


def test_a_group_that_looks_like_markup_is_shown_as_it_is(tmp_path: Path) -> None:
    entry = {"problems": 1, "avg": 0.5, "low": 0.0, "high": 1.0}
    folder = folder_of(tmp_path, sums(1))
    results = regrade(folder.path, workers=1, console=QUIET).results
    results["groups"] = {"[/b]": {"[bold]": entry}}
    out = io.StringIO()
    Console(file=out, width=120).print(table(Evaluation(tmp_path, results)))
    assert "[/b] [bold] (1)" in out.getvalue()


def test_a_record_of_another_form_is_left_out(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, sums(2))
    (tmp_path / "grades.jsonl").write_text('{"problem": "p0"}\n[1]\n')
    with pytest.warns(UserWarning, match="holds a line that is no Grade"):
        assert list(folder.grades()) == []
