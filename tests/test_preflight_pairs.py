"""What can be wrong with a run on pairs is said before its first step: from Python and by the door, once."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill import redi
from llmdistill.errors import UserError
from llmdistill.preflight import PAIR_CHECKS, Finding, examine, machine, name_of, preflight
from llmdistill.preflight.machine import GIB
from llmdistill.training import trainer as trainer_module
from tests.redi_runs import make_place, words
from tests.trainer.pair_cases import pair_rows, trainer

NAMES = [name_of(check) for check in PAIR_CHECKS]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has examined nothing."""
    monkeypatch.setattr(trainer_module, "_EXAMINED", set())


def found(run: Any, name: str, level: str = "fail") -> str:
    findings: list[Finding] = examine(run, skip=[n for n in NAMES if n != name])
    return "\n".join(str(f) for f in findings if f.check == name and f.level == level)


def test_a_sound_run_passes_every_check_and_is_left_as_it_was(tmp_path: Path) -> None:
    t = trainer(tmp_path, rows=pair_rows(22)[:16], heldout=pair_rows(22)[16:])
    t.model.train()
    weights, state = [p.clone() for p in t.model.parameters()], torch.get_rng_state()
    findings = preflight(t)
    assert {f.check for f in findings if f.level == "ok"} == set(NAMES)
    assert torch.equal(torch.get_rng_state(), state) and t.model.training
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(weights, t.model.parameters(), strict=True))


def test_heldout_prompts_that_are_trained_on(tmp_path: Path) -> None:
    t = trainer(tmp_path, rows=pair_rows(16), heldout=pair_rows(22)[14:])
    assert "2 of 8 held-out prompts are also trained on (first: row 0)" in found(t, "pairs")
    with pytest.raises(UserError, match="preflight, pairs: 2 of 8 held-out prompts"):
        t.train()
    assert t.state.global_step == 0


def test_a_tokenizer_that_is_wider_than_the_student(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    t.encode.tokenizer.add_tokens([f"new{i}" for i in range(200)])
    assert "the last ids have no logit" in found(t, "width")


def test_an_end_that_stops_nothing(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    t.eos_ids = (7,)
    assert "would end with a token that stops nothing" in found(t, "eos-pad")


def test_thoughts_opened_by_the_template_and_by_the_pair(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    assert t.train_dataset is not None
    side = tuple(t.encode.tokenizer("<think>a")["input_ids"])
    for i in (3, 5):
        p = t.train_dataset[i]
        t.train_dataset[i] = replace(p, chosen=side, prompt=replace(p.prompt, text=p.prompt.text + "<think>\n"))
    assert "2 chosen sides begin with <think> (first: row 3)" in found(t, "pairs")
    assert "rejected" not in found(t, "pairs")


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    with torch.no_grad():
        next(t.model.parameters())[:] = float("nan")
    assert "are no numbers" in found(t, "likelihood")


def test_tokens_that_mean_something_else_to_the_student(tmp_path: Path) -> None:
    """A sharp student whose ids are another tokenizer's does worse than guessing, log 1/V."""
    t = trainer(tmp_path)
    head = t.model.get_output_embeddings().weight
    with torch.no_grad():
        sharp = head * 200
        head.zero_()  # which is guessing
        assert "-5.58 nats" in found(t, "likelihood", "ok") and found(t, "likelihood", "notice") == ""
        head.copy_(sharp)
    assert "trained with another tokenizer" in found(t, "likelihood", "notice")


def test_what_cannot_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 weights, gradients and two moments: 16 bytes a weight."""
    t = trainer(tmp_path)
    needed = 16 * sum(p.numel() for p in t.model.parameters())
    monkeypatch.setattr(machine, "device_memory", lambda device: needed - 1)
    assert f"need {needed / GIB:.2f} GiB without a single activation" in found(t, "memory")
    monkeypatch.setattr(machine, "device_memory", lambda device: needed)
    assert found(t, "memory") == "" and "little is left for activations" in found(t, "memory", "notice")
    monkeypatch.setattr(machine, "device_memory", lambda device: 2 * needed)
    assert found(t, "memory", "notice") == ""


def test_the_memory_of_this_process_is_some(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = machine.device_memory(torch.device("cpu"))
    assert 2**28 < alone < 2**46
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert machine.device_memory(torch.device("cpu")) == alone // 4


def test_from_python_once_and_not_where_it_is_not_wanted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def said(preflight: bool | None) -> int:
        t = trainer(tmp_path, max_steps=1)
        t.wants_preflight = preflight
        caplog.clear()
        with caplog.at_level(logging.INFO, trainer_module.logger.name):
            t.train()
        return sum("preflight: width" in m for m in caplog.messages)

    assert [said(x) for x in (False, None, None, True)] == [0, 1, 0, 1]


def test_the_door_refuses_before_stage_1_and_before_it_moves_an_earlier_run(tmp_path: Path) -> None:
    place, run = make_place(tmp_path), tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("an: earlier run\n")
    (place / "heldout.jsonl").write_text((place / "pairs.jsonl").read_text())
    with pytest.raises(UserError, match="held-out prompts are also trained on"):
        redi.main(words(place, run))
    assert [p.name for p in run.iterdir()] == ["config.yaml"]
    quick = {"stage1_steps": 1, "max_steps": 1, "skip-check": "pairs"}
    assert redi.main(words(place, run, **quick)) == 0
    assert json.loads((run / "summary.json").read_text())["steps"] == 1


def test_two_stages_keep_checkpoints_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t = trainer(tmp_path, save_strategy="steps", save_total_limit=2)
    one = 12 * sum(p.numel() for p in t.model.parameters())  # float32 weights and two moments
    usage = machine.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage._replace(free=4 * one))
    assert found(t, "disk") == ""
    t.stages = 2  # type: ignore[attr-defined]
    assert "5 checkpoints" in found(t, "disk")
