"""``resume_from_checkpoint`` resumes, and a checkpoint without an optimizer is resumed from where that is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmdistill import OPDConfig, OPDTrainer, RolloutConfig, UserError
from llmdistill.opd import main
from tests import tiny


def trainer(folder: Path, **settings: Any) -> OPDTrainer:
    args = OPDConfig(
        **{
            **{"output_dir": str(folder), "per_device_train_batch_size": 2, "learning_rate": 1e-2, "max_steps": 3},
            **{"sequences": "dataset", "save_strategy": "steps", "save_steps": 1, "save_total_limit": 9, **settings},
        }
    )
    return OPDTrainer(tiny.llama(1), args, tiny.llama(2), train_dataset=tiny.rows(8), processing_class=tiny.tokenizer())


@pytest.mark.slow
def test_from_python(tmp_path: Path) -> None:
    """The weights of a run that was never interrupted, whether the last checkpoint is asked for or one by name."""
    whole = trainer(tmp_path)
    whole.train()
    newest = {name: w.clone() for name, w in whole.model.state_dict().items()}
    named = trainer(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    named.train()
    assert named._initial_global_step == 2
    assert all(torch.equal(w, newest[name]) for name, w in named.model.state_dict().items())
    last = trainer(tmp_path, resume_from_checkpoint=True, max_steps=4)
    last.train()
    assert last._initial_global_step == 3 and last.state.global_step == 4


def test_a_checkpoint_without_an_optimizer(tmp_path: Path) -> None:
    trainer(tmp_path, save_only_model=True, max_steps=2).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(UserError, match="checkpoint-2 has no optimizer .* Fix: --restart_optimizer true"):
        trainer(tmp_path, save_only_model=True).train(checkpoint)
    again = trainer(tmp_path, restart_optimizer=True)
    with pytest.warns(UserWarning, match="it and the learning rate's schedule begin anew"):
        again.train(checkpoint)
    assert again.state.global_step == 3


def test_the_metric_that_no_evaluation_has_is_named(tmp_path: Path) -> None:
    evaluated: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "no",
        "rollouts": RolloutConfig(max_new_tokens=4),
    }
    args = OPDConfig(
        output_dir=str(tmp_path), max_steps=1, metric_for_best_model="dataset/reverse_kl", **evaluated
    )  # the teacher lives, so its text and the student's are measured
    rows = tiny.rows(4)
    t = OPDTrainer(
        tiny.llama(1), args, tiny.llama(2), train_dataset=rows, eval_dataset=rows, processing_class=tiny.tokenizer()
    )
    with pytest.raises(UserError, match="is 'dataset/reverse_kl', and the evaluation has 'eval_student/tokens'"):
        t.train()


@pytest.mark.slow
def test_from_the_front_door(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    saving = [*command, "--save_strategy", "steps", "--save_steps", "1", "--max_steps", "3", "--learning_rate", "1e-2"]
    main(saving)
    weights = load_file(run / "student" / "model.safetensors")
    capsys.readouterr()
    main([*saving, "--resume_from_checkpoint", str(run / "checkpoint-2")])
    assert f"resuming from {run / 'checkpoint-2'}" in capsys.readouterr().err.replace("\n", "")
    assert (run / "aside-1" / "checkpoint-3").is_dir() and (run / "checkpoint-3").is_dir()
    again = load_file(run / "student" / "model.safetensors")
    assert all(torch.equal(again[name], w) for name, w in weights.items())
    assert "resume" not in (run / "config.yaml").read_text()
    main([*saving, "--max_steps", "4", "--resume_from_checkpoint", "true"])
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == [1, 2, 3, 4]
    elsewhere = ["--output_dir", str(tmp_path / "other"), "--resume_from_checkpoint"]
    with pytest.raises(UserError, match="which is not in .*other, where this run is"):
        main([*saving, *elsewhere, str(run / "checkpoint-3")])
    with pytest.raises(UserError, match="no complete checkpoint is there"):
        main([*saving, "--resume_from_checkpoint", str(run / "checkpoint-7")])
