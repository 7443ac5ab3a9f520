"""Two evaluations of one suite: paired by id, refused when they are not of the same problems."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from llmdistill.cli import main
from llmdistill.errors import UserError
from llmdistill.evals.compare import compare, matched
from llmdistill.evals.records import EvalFolder, Grade, Problem


def write(path: Path, right: dict[str, list[int]], suite: str = "s", question: str = "q", **config: object) -> Path:
    folder = EvalFolder(path)
    folder.write_json(folder.config_file, {"suite": suite, **config})
    folder.write_problems([Problem(i, f"{question} {i}", "math", "1") for i in right])
    verdicts = [(i, k, bool(v)) for i, values in right.items() for k, v in enumerate(values)]
    folder.write_grades([Grade(i, k, v, "right" if v else "wrong", "1", "boxed", "") for i, k, v in verdicts])
    return path


def test_difference_lists_and_mcnemar(tmp_path: Path) -> None:
    ids = [f"p{i}" for i in range(10)]
    a = write(tmp_path / "a", {p: [i < 3] for i, p in enumerate(ids)}, model="x")
    b = write(tmp_path / "b", {p: [1 <= i < 9] for i, p in enumerate(reversed(ids))}, model="y")
    got = compare(a, b)
    # A solves p0..p2, B p1..p8: 1 against 6.
    assert (got.problems, got.avg_a, got.avg_b) == (10, 0.3, 0.8)
    assert got.difference == pytest.approx(0.5)
    assert got.low < 0.5 < got.high
    assert got.only_a == ["p0"]
    assert got.only_b == [f"p{i}" for i in range(3, 9)]
    assert got.mcnemar is not None
    assert (got.mcnemar.only_a, got.mcnemar.only_b, got.mcnemar.p_value) == (1, 6, 0.125)
    assert got.p_value == 0.125  # all sign patterns: the same test where differences are -1, 0, 1
    assert got.notes == []
    assert json.loads(json.dumps(got.to_dict()))["only_a"] == ["p0"]
    console = Console(record=True, width=100, file=StringIO())
    console.print(got.table())
    assert "+50.0" in console.export_text()


def test_partial_overlap_and_other_settings_are_noted(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"p": [1, 0], "q": [1, 1], "r": [0, 0]}, sampling={"temperature": 0.6})
    b = write(tmp_path / "b", {"q": [0, 1], "p": [1, 1]}, sampling={"temperature": 1.0})
    got = compare(a, b)
    assert got.scores == {"p": (0.5, 1.0), "q": (1.0, 0.5)}
    assert got.mcnemar is None
    assert got.only_a == got.only_b == []
    assert got.notes[0] == f"1 problems only in {a}, left out"
    assert got.notes[1] == "sampling.temperature differs: 0.6 and 1.0"


def test_what_differs_is_seen_however_long_it_is(tmp_path: Path) -> None:
    """The field itself, also where two long values begin alike; ids of two tokenizers are no other prompts."""
    template = {"name": "boxed", "system": "x" * 100, "user": "y" * 100}
    a = write(tmp_path / "a", {"p": [1]}, template={**template, "user": "y" * 100 + "!"}, prompts="1")
    b = write(tmp_path / "b", {"p": [1]}, template=template, prompts="2")
    (note,) = compare(a, b).notes
    assert note.startswith("template.user differs: ") and note.count("yyyy... (") == 2
    first, second = note.split("differs: ")[1].split(" and ")
    assert first != second


def test_scores_stand_beside_temperature_and_length(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, {"p": [1]}) for name in "ab"]
    results = {"sampling": {"temperature": 0.6}, "lengths": {"all": {"mean": 1234.4}}}
    EvalFolder(folders[1]).write_json(EvalFolder(folders[1]).results_file, results)
    got = compare(*folders)
    assert (got.drawn_a, got.drawn_b) == ("", "temperature 0.6, 1,234 tokens")
    console = Console(record=True, width=100, file=StringIO())
    console.print(got.table())
    assert "100.0  (temperature 0.6, 1,234 tokens)" in console.export_text()


def test_a_folder_of_several_suites_says_which(tmp_path: Path) -> None:
    for name in ("gsm8k", "math500"):
        write(tmp_path / "a" / name, {"p": [1]})
    with pytest.raises(UserError, match="holds the evaluations gsm8k, math500; one suite .* Fix: .*/a/gsm8k"):
        compare(tmp_path / "a", tmp_path / "a")


def test_folders_of_several_suites_are_compared_suite_by_suite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the suite's name and not the folder's; what only one side has is left out."""
    for side, names in (("a", ("gsm8k", "math500", "aime24")), ("b", ("math500", "gsm8k", "mbpp"))):
        for name in names:
            write(tmp_path / side / (name if side == "a" else f"{name}-again"), {"p": [1]}, suite=name)
    a, b = tmp_path / "a", tmp_path / "b"
    assert matched(a, b) == [(a / name, b / f"{name}-again") for name in ("gsm8k", "math500")]
    assert matched(a / "gsm8k", b) == [(a / "gsm8k", b / "gsm8k-again")]
    assert matched(a / "gsm8k", b / "mbpp-again") == [(a / "gsm8k", b / "mbpp-again")]  # refused by its own words
    assert main(["eval", "--compare", str(a), str(b)]) == 0
    assert capsys.readouterr().out.count("B - A") == 2
    with pytest.raises(UserError, match="no suite is in both"):
        matched(a / "aime24", b)
    with pytest.raises(UserError, match="/c has no grades.jsonl"):
        matched(a, tmp_path / "c")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"suite": "t"}, "is suite s, .* is t"),
        ({"question": "other text"}, "1 of 1 problems differ .* in text, gold or tests .p."),
        ({"right": {"z": [1]}}, "no graded problem in common"),
        ({"right": {}}, "has no grades.jsonl"),
    ],
)
def test_folders_that_cannot_be_compared_are_refused(tmp_path: Path, other: dict, message: str) -> None:
    a = write(tmp_path / "a", {"p": [1]})
    b = write(tmp_path / "b", **{"right": {"p": [1]}, **other})
    with pytest.raises(UserError, match=message):
        compare(a, b)
