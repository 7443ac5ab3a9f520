"""The rows of recipes/sums, that its teacher reads what the start was trained to read, and the tables of its runs."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from llmdistill.evals.suite import load_problems, load_suite
from llmdistill.methods.redi_config import REDIConfig
from llmdistill.opd import OPDConfig
from llmdistill.recipe.command_line import parse
from llmdistill.texts.prompts import PromptEncoder
from llmdistill.verify.math import verify_answer
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
FOLDER, PROOF = ROOT / "recipes" / "sums", ROOT / "eval" / "proof"


def loaded(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"sums_{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make() -> Any:
    return loaded(FOLDER / "make.py")


def test_every_row_is_worked_rightly_and_its_answer_is_what_the_suites_judge_reads(make: Any) -> None:
    stop, rows = load_suite(FOLDER / "suite.yaml").template.stop[0], make.make_rows()
    guesses = {True: list[bool](), False: list[bool]()}
    for row in [*rows["start"], *rows["repairs"]]:
        problem, told, _ = re.split(r"(\n\n|$)", row["prompt"], maxsplit=1)
        total = sum(map(int, problem.removeprefix("Add ").split(" + ")))
        whole = row["prompt"].removeprefix(problem) + row["chosen"]
        assert whole.endswith(f" = {total}. So {total}.")
        for step in re.findall(r"(\d+) \+ (\d+) = (\d+)", whole):
            assert int(step[0]) + int(step[1]) == int(step[2])
        if row["chosen"].startswith("\nGuess"):
            assert verify_answer(row["chosen"].split(stop)[0], str(total))
            guesses[bool(told)].append(f"Guess {total}." in row["chosen"])
    assert all(guesses[True])  # with the working before it a guess of the row's own is right
    share = sum(guesses[False]) / len(guesses[False])  # of 458: .2, sd .019; 4 sd to either side
    assert len(guesses[False]) == 458 and 0.12 < share < 0.28


def test_no_held_out_sum_is_trained_on(make: Any) -> None:
    rows = make.make_rows()
    asked = {
        name: {row.get("question", row.get("prompt", "")).split("\n\n")[0].removeprefix("Add ") for row in rows[name]}
        for name in rows
    }
    assert len(asked["heldout"]) == make.SIZES["heldout"]
    assert not asked["heldout"] & (asked["start"] | asked["train"] | asked["read"] | asked["repairs"])
    assert asked["read"] == asked["repairs"] <= asked["train"] and not asked["start"] & asked["train"]


def test_the_teacher_reads_the_prompt_that_the_start_learned(make: Any) -> None:
    """Else it would be as good as the student, and nothing would say so."""
    recipe = parse(OPDConfig, ["--config", str(FOLDER / "opd.yaml")])
    encoder, rows = PromptEncoder(tiny.tokenizer(), recipe.data), make.make_rows()
    for row, shown in list(zip(rows["train"], rows["read"], strict=False))[:20]:
        prompt = encoder.encode_all([row])[0]
        assert tiny.tokenizer().decode(prompt.contexts[recipe.teachers[0].context]) == shown["prompt"]
    told = [row["prompt"] for row in rows["start"] if "\n\n" in row["prompt"]]
    form = re.compile(r"Add \d+( \+ \d+){2}\n\n\(\d+ \+ \d+ = \d+, \d+ \+ \d+ = \d+\)(\nGuess \d+\.)?")
    assert len(told) > 100 and all(form.fullmatch(text) for text in [*told, *(row["prompt"] for row in rows["read"])])


def test_the_three_recipes_and_the_suite_can_be_read(make: Any, tmp_path: Path) -> None:
    for name, config in (("start", REDIConfig), ("sft", REDIConfig), ("opd", OPDConfig)):
        head = (FOLDER / f"{name}.yaml").read_text().partition("\nstudent:")[0]
        assert f"--config recipes/sums/{name}.yaml" in head
        parse(config, ["--config", str(FOLDER / f"{name}.yaml")])
    rows = make.make_rows()["heldout"]
    lines = (json.dumps(row) + "\n" for row in rows)
    asked = {make.asked([int(term) for term in row["question"].split(" + ")]) for row in rows}
    (tmp_path / "heldout.jsonl").write_text("".join(lines))
    suite = load_suite(FOLDER / "suite.yaml")
    problems = load_problems(suite, tmp_path)
    assert suite.template.user.replace("{question}", problems[0].question) in asked
    assert len(problems) == make.SIZES["heldout"] and problems[0].gold == str(eval(problems[0].question))


def test_the_page_of_results_has_the_tables_of_the_runs() -> None:
    stored = json.loads((PROOF / "real_model.json").read_text())
    assert loaded(PROOF / "real_model_table.py").tables(stored) in (PROOF / "real_model.md").read_text()
    for run in stored["runs"].values():  # an accuracy is that of its problems
        assert sum(run["right"].values()) / len(run["right"]) == pytest.approx(run["accuracy"]["value"], abs=1e-4)
