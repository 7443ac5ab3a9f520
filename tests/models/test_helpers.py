"""Modules trained beside the student: their rate, where they are saved and where they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmdistill.methods import config_class
from llmdistill.models.helpers import NAME
from llmdistill.models.weights import named_weights
from tests import tiny
from tests.composition.test_student_judge import StopAt, lora
from tests.methods import rounds

MI: dict[str, Any] = {"distance": "mi_alpha", "projector_learning_rate": 0.02, "learning_rate": 1e-3, "max_steps": 4}


def make(folder: Path, adapted: bool = False, **more: Any) -> Any:
    trainer = {"peft_config": lora() if adapted else None}
    return rounds.make(folder, "layers", rows=tiny.rows(16), trainer=trainer, **{**MI, **more})


@pytest.mark.parametrize("adapted", [False, True])
def test_they_have_groups_of_their_own_in_the_optimizer(tmp_path: Path, adapted: bool) -> None:
    """Every trained parameter is in one group, decayed or not as transformers would have it."""
    t = make(tmp_path, adapted, weight_decay=0.1)
    t.train()
    mine = {id(p) for p in t.helpers.parameters()}
    groups = t.optimizer.param_groups
    placed = [id(p) for group in groups for p in group["params"]]
    assert sorted(placed) == sorted(id(p) for p in t.model.parameters() if p.requires_grad)
    for group in groups:
        own = [id(p) in mine for p in group["params"]]
        assert all(own) or not any(own)
        if own:
            assert group["initial_lr"] == (0.02 if own[0] else 1e-3)
    decays = {group["weight_decay"] for group in groups if group["params"] and id(group["params"][0]) in mine}
    assert decays == {0.1, 0.0}  # matrices, and the baseline's bias


@pytest.mark.parametrize("adapted", [False, True])
def test_they_are_trained_and_absent_from_the_student(tmp_path: Path, adapted: bool) -> None:
    t = make(tmp_path, adapted, save_strategy="steps", save_steps=4)
    before = {n: p.detach().clone() for n, p in t.helpers.named_parameters()}
    t.train()
    assert all(not torch.equal(p, before[n]) for n, p in t.helpers.named_parameters())
    assert any(NAME in name for name, _ in t.model.named_parameters())
    bare = {name for name, _ in named_weights(tiny.llama(1))}
    assert {name for name, _ in named_weights(t.model)} == bare
    checkpoint = tmp_path / "run" / "checkpoint-4"
    saved = load_file(checkpoint / ("adapter_model.safetensors" if adapted else "model.safetensors"))
    assert saved and not any(NAME in name or "pair_" in name for name in saved)
    kept = load_file(checkpoint / "helpers.safetensors")
    assert kept.keys() == before.keys()
    assert all(torch.equal(kept[n], p) for n, p in t.helpers.named_parameters())
    t.save_model(str(tmp_path / "student"))
    files = sorted(file.name for file in (tmp_path / "student").iterdir())
    assert "helpers.safetensors" not in files
    if not adapted:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
        assert all(torch.equal(p, t.model.get_parameter(n)) for n, p in loaded.named_parameters())


@pytest.mark.parametrize("adapted", [False, True])
def test_stopped_and_resumed_equals_undisturbed(tmp_path: Path, adapted: bool) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = make(tmp_path / "whole", adapted)
    whole.train()
    first = make(tmp_path / "torn", adapted, **saving)
    first.add_callback(StopAt(2))
    first.train()
    again = make(tmp_path / "torn", adapted, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "torn" / "run" / "checkpoint-2"))
    losses = [[x["loss"] for x in t.state.log_history if "loss" in x] for t in (whole, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_their_start_depends_on_the_seed_alone(tmp_path: Path) -> None:
    def start(folder: str, seed: int) -> dict[str, Any]:
        torch.manual_seed(len(folder))
        t = make(tmp_path / folder, seed=seed)
        return {n: p.detach().clone() for n, p in t.helpers.named_parameters()}

    a, b, c = start("a", 1), start("bb", 1), start("c", 2)
    assert all(torch.equal(a[n], b[n]) for n in a) and not all(torch.equal(a[n], c[n]) for n in a)


def test_the_saved_student_of_a_recipe_is_bare(command: list[str], tmp_path: Path) -> None:
    from llmdistill.opd import main

    assert main([*command, "--method", "layers", "--distance", "mse"]) == 0
    saved = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert saved and not any("pair_" in name for name in saved)
    assert config_class("layers").__name__ == "layersConfig"
