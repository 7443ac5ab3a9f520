"""Scoring the student while it is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from llmdistill.errors import UserError
from llmdistill.evals.callback import EvalCallback
from llmdistill.opd import main
from tests.evals import made


def numbers(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["eval/sums/avg@1"]) for row in rows if "eval/sums/avg@1" in row]


def test_a_recipe_names_suites(command: list[str], tmp_path: Path) -> None:
    """Before the first step, at every nth, after the last; and again where a resumed run has not been."""
    suite = made.suite(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"evals": {"suites": [str(suite)], "every_steps": 2, "problems": 4, "longest": 6}}))
    words = ["--config", str(recipe), *command, "--max_steps", "5", "--save_strategy", "steps", "--save_steps", "3"]
    assert main(words) == 0
    run = tmp_path / "run"
    assert [step for step, _ in numbers(run)] == [0, 2, 4, 5]
    assert all(0 <= value <= 1 for _, value in numbers(run))
    folder = run / "evals" / "step-000004" / "sums"
    assert json.loads((folder / "results.json").read_text())["problems"] == 4 and (folder / "report.html").is_file()
    before = numbers(run)
    shutil.rmtree(run / "checkpoint-5")  # killed behind the checkpoint of step 3
    assert main([*words, "--resume"]) == 0
    assert numbers(run) == before


def test_training_is_what_it_was(make_trainer, tmp_path: Path) -> None:
    """Evaluating draws no random number that training would have drawn, and leaves the model training."""
    ends = []
    for evaluated in (False, True):
        torch.manual_seed(0)
        trainer = make_trainer(save_strategy="no", learning_rate=1e-2)
        if evaluated:
            callback = EvalCallback(
                trainer, [str(made.suite(tmp_path))], every_steps=1, problems=3, samples=2, longest=5
            )
            trainer.add_callback(callback)
        trainer.train()
        assert trainer.model.training
        ends.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_a_suite_that_cannot_be_stops_before_training(make_trainer, tmp_path: Path) -> None:
    trainer = make_trainer(save_strategy="no")
    with pytest.raises(UserError, match="neither a file nor one of"):
        EvalCallback(trainer, ["gsm9k"])
    with pytest.raises(UserError, match="is not in"):
        EvalCallback(trainer, [str(made.suite(tmp_path, data={"file": "gone.jsonl"}))])
