"""The stages that TRL trains: what ``sft`` alone honours, benchmarks, and a loss or weights that are no numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill import redi
from llmdistill.errors import UserError
from tests.evals import made
from tests.redi_runs import logged, make_place, read, student, student_logps, words
from tests.trainer.pair_cases import by_hand, encoded, pair_rows

AT_STEP_2 = r"nan at step 2, on the prompts of rows \d+, \d+, \d+, \d+; the weights .* since the update of step 1"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("redi"))


# ---------------------------------------------------------------- what method sft honours, and benchmarks


def test_sft_alone_is_measured_on_positives_and_evaluated_in_training(place: Path, tmp_path: Path) -> None:
    """Held-out rows without a rejected side are enough, and train.eval_strategy is honoured."""
    rows = [{k: v for k, v in row.items() if k != "rejected"} for row in pair_rows(22)[16:]]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run, heldout = tmp_path / "run", {"data.heldout": tmp_path / "heldout.jsonl"}
    redi.main(words(place, run, method="sft", eval_strategy="steps", eval_steps=2, **heldout))
    assert [x["step"] for x in logged(run) if "eval_loss" in x] == [2, 4]
    pairs = encoded(pair_rows(22)[16:])
    after = read(run, "after.json")
    assert after["pairs"]["chosen_logp"] == pytest.approx(student_logps(run / "student", pairs)[0], rel=1e-5)
    assert "margin" not in after["pairs"] and list(after["sequences"]["pairs"]) == ["chosen_logp"]
    lengths = torch.tensor([len(p.chosen) for p in pairs])
    with torch.no_grad():
        means, _ = by_hand(student(run / "student"), pairs)
    last = [x["eval_loss"] for x in logged(run) if "eval_loss" in x][-1]
    assert last == pytest.approx(-((means * lengths).sum() / lengths.sum()).item(), rel=1e-4)
    with pytest.raises(UserError, match="data.heldout has no column 'rejected'"):  # the others measure margins
        redi.main(words(place, tmp_path / "other", **heldout))


@pytest.mark.parametrize("method", ["sft", "redi", "dpo"])
def test_suites_are_scored_by_the_last_stage_whichever_it_is(place: Path, tmp_path: Path, method: str) -> None:
    run, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    evals = {"suites": [str(made.suite(tmp_path))], "problems": 2, "longest": 3, "samples": 1}
    recipe.write_text(json.dumps({"evals": evals}))
    redi.main(["--config", str(recipe), *words(place, run, method=method, stage1_steps=2)])
    steps = [x["step"] for x in logged(run) if "eval/sums/avg@1" in x]
    assert steps == [0, 2 if method == "sft" else 4]
    assert method == "sft" or not [x for x in logged(run / "stage1") if "eval/sums/avg@1" in x]


@pytest.mark.parametrize("method", ["sft", "redi", "dpo"])
def test_a_wrong_suite_is_refused_before_anything_is_trained(place: Path, tmp_path: Path, method: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"evals": {"suites": [str(made.suite(tmp_path, data={"file": "gone.jsonl"}))]}}))
    with pytest.raises(UserError, match="gone.jsonl"):
        redi.main(["--config", str(recipe), *words(place, tmp_path / "run", method=method)])
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- divergence


@pytest.mark.parametrize("save_steps,said", [(1, "since the update of step 1; they were not saved"), (2, AT_STEP_2)])
def test_a_diverged_stage_1_says_where_and_saves_nothing_of_it(
    place: Path, tmp_path: Path, save_steps: int, said: str
) -> None:
    """The first update makes weights of 3e38; nothing is logged before step 10."""
    run, settings = tmp_path / "run", {"stage1_learning_rate": 3e38, "stage1_steps": 12, "logging_steps": 10}
    with pytest.raises(UserError, match=f"{said}.*none was saved yet.*objective.stage1_learning_rate.*start again"):
        redi.main(words(place, run, **settings, save_steps=save_steps))
    assert not list((run / "stage1").glob("checkpoint-*"))


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_loss_of_trl_that_is_no_number_names_step_rows_and_the_last_good_checkpoint(
    place: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 5 alone is bad, whenever it comes up; the message comes at that step, not at the next line of the log."""
    from llmdistill.pipeline import redi_trl

    (base,) = redi_trl._FineTuning.__bases__[1:] if method == "sft" else redi_trl._DirectPreference.__bases__[1:]
    ids = encoded(pair_rows(16))[5].prompt.ids
    right, seen = base.compute_loss, list[int]()

    def wrong(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        assert "rows" not in inputs  # TRL hands what it does not know to the model
        seen.append(self.state.global_step)
        loss = right(self, model, inputs, *args, **kwargs)
        bad = len(seen) > 4 and any(row[: len(ids)].tolist() == ids for row in inputs["input_ids"])
        return loss * torch.nan if bad else loss

    monkeypatch.setattr(base, "compute_loss", wrong)
    run = tmp_path / "run"
    settings = {"method": method, "logging_steps": 100, "save_steps": 1}
    if method == "sft":
        settings |= {"stage1_steps": 40, "stage1_batch_size": 1}
    else:
        settings |= {"stage1_steps": 0, "stage1_epochs": 0, "max_steps": 40, "per_device_train_batch_size": 1}
    with pytest.raises(UserError) as error:
        redi.main(words(place, run, **settings))
    step = seen[-1]
    assert f"the loss is nan at step {step + 1}, on the prompts of rows 5; training cannot" in str(error.value)
    assert f"goes on from {run / f'checkpoint-{step}'}" in str(error.value)
    rate = "objective.stage1_learning_rate" if method == "sft" else "train.learning_rate"
    assert f"lower {rate}" in str(error.value)
