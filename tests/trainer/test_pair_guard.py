"""The guard over both sides' log-probs, and resuming, of which it is a part."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill.errors import UserError
from llmdistill.training.guard import Guard
from tests import tiny
from tests.trainer.pair_cases import pair_rows, trainer


def test_the_guard_compares_the_last_steps_with_the_first() -> None:
    guard = Guard(drop=0.5, window=2, rejected_drop=1.0)
    fired = [guard.observe(c, c - 1, step) for step, c in enumerate([-1.0, -1.2, -1.7, -1.5, -2.5], start=1)]
    # means of two: -1 alone; -1.1, -1.45 (0.45 below), -1.6 (0.6 below: fires), -2 (fired; rejected not beyond 1)
    assert fired == [[], [], [], ["chosen"], []]
    assert guard.fired_at == 4 and (guard.fall, guard.rejected_fall) == pytest.approx((1.0, 1.0))
    assert guard.numbers() == pytest.approx(
        {"chosen_start": -1.0, "chosen_now": -2.0, "rejected_start": -2.0, "rejected_now": -3.0}
    )
    assert not any(Guard(0.1, 1).observe(-2 + 0.1 * step, -3, step) for step in range(20))  # nothing but a rise


@pytest.mark.parametrize("window", [1, 10, 1000])
def test_a_collapse_within_the_first_window_is_seen_and_in_runs_no_longer_than_it(window: int) -> None:
    """The first step is the baseline: a mean over the first window would hold the collapse itself."""
    at_once = Guard(0.5, window)
    fired = [step for step in range(61) if at_once.observe(-0.3 if step == 0 else -4.0, -1.0, step)]
    assert fired == [1] and at_once.fall == pytest.approx(3.7 if window < 61 else 3.7 * 60 / 61)
    short = Guard(0.5, window)
    steps = [bool(short.observe(-0.3 - 7.7 * step / 9, -1.0, step)) for step in range(10)]
    assert any(steps) and short.fall > 0.5


def test_the_rejected_side_that_runs_away_alone_is_seen_and_its_normal_fall_is_not(caplog: Any) -> None:
    guard = Guard()
    fired = [step for step in range(60) if guard.observe(-0.3, -1.0 - step, step)]
    assert fired == [5]  # the mean of steps 0 to 4 is -3, 2 below the first; that of 0 to 5 is 2.5 below
    guard.warn("rejected", stops=False)
    said = caplog.records[-1].getMessage()
    assert "the rejected side's mean log-prob" in said and "objective.guard_rejected_drop is 2" in said
    assert "the chosen side's is -0.300 and began at -0.300" in said and "runs away" in said and "Fix:" in said
    assert guard.observe(-9.0, -60.0, 60) == ["chosen"]  # each side speaks once, and for itself
    assert guard.fired == {"rejected": 5, "chosen": 60} and guard.fired_at == 5
    # The shipped recipe's run (recipes/redi.yaml): -0.26 to -0.32 in 20 steps, the batches' means off by 0.1.
    generator, calm = torch.Generator().manual_seed(0), Guard(0.5, 5)
    for step in range(20):
        noise = (0.1 * torch.randn(2, generator=generator)).tolist()
        assert not calm.observe(-0.14 + noise[0], -0.26 - 0.06 * step / 19 + noise[1], step)


def test_a_state_of_before_is_read_and_one_of_something_else_refused() -> None:
    guard = Guard(0.5, 2)
    guard.load_state_dict({"first": [[-1.0, -2.0], [-3.0, -4.0]], "last": [[-1.2, -2.2]] * 3, "fired_at": None})
    assert guard.start == [-1.0, -2.0] and len(guard.last) == 2 and guard.fall == pytest.approx(0.2)
    guard.load_state_dict({"first": [[-1.0, -2.0]], "last": [[-4.0, -2.2]], "fired_at": 7})
    assert guard.fired == {"chosen": 7} and guard.observe(-4.0, -2.0, 8) == []
    again = Guard(0.5, 2)
    again.load_state_dict(guard.state_dict())
    assert again == guard
    again.load_state_dict(None)
    assert again == Guard(0.5, 2)
    for wrong in ({"first": [[-1.0, -2.0]], "last": []}, {"start": [1.0], "last": [], "fired": {}}, {"last": [[1.0]]}):
        with pytest.raises(UserError, match="the guard's state in the checkpoint.*Fix:"):
            again.load_state_dict(wrong)


# "54321" is chosen once and rejected three times: at alpha 1 nothing keeps its log-prob from falling.
FALLING = [{"prompt": "2+2=", "chosen": c, "rejected": r} for c, r in (("54321", "x"), *[("4", "54321")] * 3)]
COLLAPSE: dict[str, Any] = {
    **{"method": "symmetric", "learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_steps": 8},
    **{"rows": FALLING, "guard_window": 1, "guard_drop": 0.12},  # 0.10 after five steps, 0.14 after six
    "guard_rejected_drop": 0,  # 2.12 after seven
}


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes students that know the chosen sides: from random weights both sides of any loss rise at first."""
    student, folder = tiny.llama(1), tmp_path_factory.mktemp("fine_tuned")
    trainer(folder, student, rows=FALLING, alpha=0.0, learning_rate=1e-2, max_steps=20).train()
    return lambda: copy.deepcopy(student)


def test_the_guard_warns_once_with_the_numbers_and_training_goes_on(
    tmp_path: Path, fine_tuned: Any, caplog: Any
) -> None:
    with caplog.at_level(logging.WARNING, "llmdistill"):
        t = trainer(tmp_path, fine_tuned(), **COLLAPSE)
        t.train()
    said = [r.getMessage() for r in caplog.records if "unlearns" in r.getMessage()]
    assert len(said) == 1 and t.state.global_step == 8
    logged = {line["step"]: line for line in t.state.log_history if "loss" in line}
    fired = logged[t.guard.fired_at]
    for number in (fired["redi/chosen_logp"], logged[1]["redi/chosen_logp"]):
        assert f"{number:.3f}" in said[0]
    assert f"{fired['redi/rejected_logp']:.3f} and began at {logged[1]['redi/rejected_logp']:.3f}" in said[0]
    assert f"step {t.guard.fired_at}:" in said[0] and "objective.guard_drop is 0.12" in said[0]
    assert fired["redi/chosen_fall"] > 0.12 >= logged[t.guard.fired_at - 1]["redi/chosen_fall"]
    began, now = (logged[step]["redi/rejected_logp"] for step in (1, t.guard.fired_at))
    assert fired["redi/rejected_fall"] == pytest.approx(began - now, rel=1e-5)


def test_the_rejected_side_warns_and_stops_a_run_too(tmp_path: Path, fine_tuned: Any, caplog: Any) -> None:
    settings = {**COLLAPSE, "guard_drop": 0.0, "guard_rejected_drop": 1.0, "guard_stop": True}
    with caplog.at_level(logging.WARNING, "llmdistill"):
        t = trainer(tmp_path, fine_tuned(), **settings)
        t.train()
    assert t.guard.fired == {"rejected": t.state.global_step} and t.state.global_step < 8
    assert [r.getMessage() for r in caplog.records if "Training stops here" in r.getMessage()]


def test_the_guard_does_not_speak_where_nothing_falls_or_nobody_asks(
    tmp_path: Path, fine_tuned: Any, caplog: Any
) -> None:
    with caplog.at_level(logging.WARNING, "llmdistill"):
        calm = trainer(tmp_path, fine_tuned(), **{**COLLAPSE, "alpha": 0.1, "method": "redi"})
        calm.train()
        off = trainer(tmp_path / "off", fine_tuned(), **{**COLLAPSE, "guard_drop": 0.0})
        off.train()
    assert not caplog.records and calm.guard.fired_at is None and off.guard.fired_at is None
    assert calm.guard.fall < 0 and off.guard.fall > 0.12


def test_a_stopped_run_stops_cleanly_and_stays_stopped_when_resumed(tmp_path: Path, fine_tuned: Any) -> None:
    settings = {**COLLAPSE, "guard_stop": True, "save_strategy": "steps", "save_steps": 100}
    t = trainer(tmp_path, fine_tuned(), **settings)
    t.train()
    stopped_at = t.guard.fired_at
    assert stopped_at is not None and 1 < stopped_at < 8 and t.state.global_step == stopped_at
    checkpoint = t.run_folder.newest_checkpoint()
    assert checkpoint == tmp_path / "run" / f"checkpoint-{stopped_at}"
    weights = {n: p.clone() for n, p in t.model.named_parameters()}
    again = trainer(tmp_path, fine_tuned(), **settings)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.state.global_step == stopped_at and again.guard.state_dict() == t.guard.state_dict()
    assert all(torch.equal(p, weights[n]) for n, p in again.model.named_parameters())
    onwards = trainer(tmp_path, fine_tuned(), **{**settings, "guard_stop": False})
    onwards.train(resume_from_checkpoint=str(checkpoint))
    assert onwards.state.global_step == 8


def test_a_resumed_run_is_bitwise_the_undisturbed_one_guard_included(tmp_path: Path) -> None:
    """Interrupted in the middle of an epoch (16 pairs, 4 a step), before the guard's window is full and after."""
    settings = {**COLLAPSE, "rows": pair_rows(16), "guard_window": 3, "save_strategy": "steps", "save_steps": 2}
    settings["save_total_limit"] = None
    whole = trainer(tmp_path, **settings)
    whole.train()
    pick = ("step", "loss", "grad_norm", "redi/chosen_logp", "redi/chosen_fall")
    expected = [[line[k] for k in pick] for line in whole.state.log_history if "loss" in line]
    for step in (6, 2):
        resumed = trainer(tmp_path, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert resumed.guard.state_dict() == whole.guard.state_dict()
        assert [[line[k] for k in pick] for line in resumed.state.log_history if "loss" in line] == expected
        for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a, b)
