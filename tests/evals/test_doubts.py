"""What is a mistake in a suite as a rule draws a warning, and suites without one draw none."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from llmdistill.evals.suite import DATA_ENV, bundled_suites, load_problems, load_suite
from tests.evals import made

DATA = Path(os.environ.get(DATA_ENV) or Path(__file__).resolve().parents[3] / "shared" / "data")


def warned(folder: Path, rows: list[dict[str, Any]] | None = None, **changes: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        load_problems(load_suite(made.suite(folder, rows, **changes)))
    return [str(one.message) for one in found]


def choice(i: int, answer: object, **more: object) -> dict[str, Any]:
    return {"id": f"c{i}", "question": f"Which one is {i}?\nA) 0\nB) 1", "answer": answer, "size": "x", **more}


def test_a_suite_without_mistakes_draws_no_warning(tmp_path: Path) -> None:
    assert warned(tmp_path, columns={"id": "id", "answer": "answer"}) == []
    rows = [choice(0, "A"), choice(1, "(b)", choices=["0", "1"])]
    assert warned(tmp_path, rows, kind="choice") == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"columns": {"anwser": "answer"}}, "'anwser', which the reader rows does not read; did you mean 'answer'?"),
        ({"columns": {"id": "uid"}}, "columns.id is 'uid', and no row has such a field (they have id, question,"),
        ({"groups": ["sizes"]}, "groups has 'sizes', and no row has anything in 'sizes' (they have id, question,"),
        ({"columns": {"size": "levle"}}, "groups has 'size', and no row has anything in 'levle'"),
    ],
)
def test_a_misspelt_column(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    (warning,) = warned(tmp_path, **changes)
    assert warning.startswith("suite 'sums': ") and said in warning


def test_choices_with_a_number_for_an_answer(tmp_path: Path) -> None:
    (warning,) = warned(tmp_path, [choice(0, "A"), choice(1, 1)], kind="choice")
    assert "the answer of 1 of 2 problems is no letter ('c1': '1')" in warning


def test_options_that_no_question_shows(tmp_path: Path) -> None:
    (warning,) = warned(tmp_path, [choice(0, "A", choices=["red", "blue"]), choice(1, "B")], kind="choice")
    assert "1 of 2 rows have options in a field of their own" in warning


def test_one_question_under_two_ids(tmp_path: Path) -> None:
    rows = [made.sum_row(0), made.sum_row(1), made.sum_row(0) | {"id": "again", "question": "0 +\n0 ="}]
    (warning,) = warned(tmp_path, rows)
    assert "1 of 3 problems ask what another one asks ('again' as 'sum/0')" in warning


def test_bundled_suites_have_no_misspelt_columns_and_no_wrong_choices() -> None:
    if not (DATA / "benchmarks").is_dir():
        pytest.skip("the benchmarks are not on this machine")
    said = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for suite in map(load_suite, bundled_suites()):
            folders = (suite.folder, DATA, DATA / "benchmarks")
            if any((folder / f"{suite.file}{end}").is_file() for folder in folders for end in ("", ".gz")):
                load_problems(suite, DATA)
                said.append(suite.name)
    assert said
    assert [str(one.message) for one in found if "ask what another" not in str(one.message)] == []
