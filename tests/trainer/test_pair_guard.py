"""The guard over log p(chosen), and resuming, of which it is a part."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill.guard import Guard
from tests import tiny
from tests.trainer.pair_cases import pair_rows, trainer


def test_the_guard_compares_the_first_steps_with_the_last() -> None:
    guard = Guard(drop=0.5, window=2)
    fired = [guard.observe(c, c - 1, step) for step, c in enumerate([-1.0, -1.2, -1.3, -1.7, -1.6, -2.5], start=1)]
    # means of two: start -1.1; -1.25, -1.5 (0.4 below), -1.65 (0.55 below: fires), -2.05 (fired already)
    assert fired == [False, False, False, False, True, False]
    assert guard.fired_at == 5
    assert guard.numbers() == pytest.approx(
        {"chosen_start": -1.1, "chosen_now": -2.05, "rejected_start": -2.1, "rejected_now": -3.05}
    )
    risen = Guard(drop=0.1, window=1)
    assert not any(
        risen.observe(-2 + 0.1 * step, -9.0 * step, step) for step in range(20)
    )  # only the chosen side counts


# "54321" is chosen once and rejected three times: at alpha 1 nothing keeps its log-prob from falling.
FALLING = [{"prompt": "2+2=", "chosen": c, "rejected": r} for c, r in (("54321", "x"), *[("4", "54321")] * 3)]
COLLAPSE: dict[str, Any] = {
    **{"method": "symmetric", "learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_steps": 8},
    **{"rows": FALLING, "guard_window": 1, "guard_drop": 0.12},  # 0.10 after five steps, 0.14 after six
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
