"""Several optimizer steps on the texts of a round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill import OPDConfig, RolloutConfig, UserError
from llmdistill.training.made import Made
from tests import tiny
from tests.trainer.kept import Kept


def trainer(folder: Path, **settings: Any) -> Kept:
    defaults = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "no"}
    rollouts = RolloutConfig(max_new_tokens=6, samples_per_prompt=2)
    rows = settings.pop("rows", 10)
    return Kept(
        tiny.llama(1),
        OPDConfig(output_dir=str(folder), logging_steps=1, rollouts=rollouts, **{**defaults, **settings}),
        tiny.llama(2),
        train_dataset=tiny.rows(rows, completion=False),
        processing_class=tiny.tokenizer(),
        preflight=False,
    )


def ids(made: Made) -> list[list[int]]:
    return made.texts["main"].rollout.input_ids.tolist()


def rows(made: Made) -> list[int]:
    return [p.row for p in made.examples]


@pytest.mark.parametrize("estimator", ["full", "sampled"])
def test_a_round_is_trained_on_so_many_times_and_its_age_counted(tmp_path: Path, estimator: str) -> None:
    run = trainer(tmp_path, num_iterations=3, estimator=estimator)
    run.train()
    rounds = [ids(made) for made in run.kept]
    assert rounds[0] == rounds[1] == rounds[2] != rounds[3] == rounds[4] == rounds[5]
    assert [line["rollout/staleness"] for line in run.state.log_history if "loss" in line] == [0, 1, 2, 0, 1, 2]


def test_every_row_has_its_turn(tmp_path: Path) -> None:
    """10 rows by 4 have 3 rounds an epoch, the third of 2 rows; transformers counts an epoch for every 3 steps."""
    run = trainer(tmp_path, num_iterations=2, max_steps=9, gradient_accumulation_steps=2)
    run.train()
    seen = [rows(made) for made in run.kept]
    assert [len(r) for r in seen] == [4, 4, 4, 4, 2, 2, 4, 4, 4]
    assert sorted(seen[0] + seen[2] + seen[4]) == list(range(10))
    assert run.state.global_step == 9


@pytest.mark.parametrize("step", [1, 4])
def test_a_resumed_run_goes_on_within_a_round(tmp_path: Path, step: int) -> None:
    settings = {"num_iterations": 3, "estimator": "sampled", "rows": 6}
    whole = trainer(tmp_path / "a", **settings, save_strategy="steps", save_steps=1, save_total_limit=None)
    whole.train()
    resumed = trainer(tmp_path / "b", **settings)
    resumed.train(str(tmp_path / "a" / f"checkpoint-{step}"))
    assert [ids(made) for made in resumed.kept] == [ids(made) for made in whole.kept[step:]]
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("size", "steps"), [(4, 1), (2, 2), (1, 4)])
def test_clipped_steps_do_not_depend_on_the_micro_batches(tmp_path: Path, size: int, steps: int) -> None:
    """Also where a later step of the round clips: a learning rate at which ratios leave 1 +- 0.2."""

    def weights(folder: Path, **settings: Any) -> list[torch.Tensor]:
        run = trainer(folder, num_iterations=3, max_steps=3, estimator="sampled", rows=4, **settings)
        run.train()
        return [p.detach() for p in run.model.parameters()]

    one = weights(tmp_path / "one", per_device_train_batch_size=4)
    split = weights(tmp_path / "split", per_device_train_batch_size=size, gradient_accumulation_steps=steps)
    free = weights(tmp_path / "free", per_device_train_batch_size=4, importance_cap=1e6)
    for a, b in zip(one, split, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
    assert max((a - b).abs().max() for a, b in zip(one, free, strict=True)) > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_iterations": 0}, "objective.num_iterations is 0; it must be >= 1"),
        ({"num_iterations": 2, "estimator": "sampled", "importance_cap": 0}, "objective.importance_cap is 0"),
        ({"clip": 0.2}, "objective.clip is 0.2, and objective.estimator full weighs no sampled tokens"),
        ({"clip": 0.2, "importance_cap": 5, "estimator": "sampled"}, "both bound the same ratio"),
        ({"dual_clip": 2, "estimator": "sampled"}, "objective.dual_clip is 2, and nothing is clipped"),
        ({"clip": 1, "estimator": "sampled"}, "objective.clip is 1; it must be >= 0 and < 1"),
        ({"num_iterations": 2, "mixture_every": 3}, "objective.mixture_every is 3"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OPDConfig(output_dir=str(tmp_path), **settings)
