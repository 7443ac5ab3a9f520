"""Weights are written as they come, a file's share at a time, and read back as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmdistill.compat.models import as_stored
from llmdistill.errors import UserError
from llmdistill.models import weight_files
from llmdistill.models.saving import save_student
from llmdistill.models.weight_files import saved_weights, write_weights
from llmdistill.models.weights import named_weights
from tests import tiny
from tests.alive import FILE_BYTES, counted
from tests.students.architectures import small


@pytest.mark.parametrize("tied", (True, False))
def test_an_adapted_student_is_merged_a_layer_at_a_time(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    lora: Any = dict(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    student = get_peft_model(tiny.llama(0, layers=6, tied=tied), LoraConfig(**lora))
    with counted() as alive:
        save_student(student, tmp_path, tiny.tokenizer())
    own = sum(p.nbytes for p in student.get_base_model().get_input_embeddings().parameters()) * (1 if tied else 2)
    assert 2 * (alive.most - own) < alive.all - own  # embedding and head are the model's own memory
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(files) > 4 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert {name: file for file in files for name in load_file(tmp_path / file)} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for _, t in saved_weights(student))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    merged = student.merge_and_unload().state_dict()
    assert loaded.keys() == merged.keys() and ("lm_head.weight" in index["weight_map"]) == (not tied)
    assert all(torch.equal(loaded[name], value) for name, value in merged.items())


def test_a_folder_has_one_student(tmp_path: Path) -> None:
    """Written in parts over a single file, and again in a single file: nothing of the other is left."""
    for seed, in_parts in enumerate((False, True, False)):
        student = tiny.llama(seed)
        if in_parts:
            with counted():
                save_student(student, tmp_path, tiny.tokenizer())
        else:
            save_student(student, tmp_path, tiny.tokenizer())
        assert (tmp_path / "model.safetensors").exists() == (not in_parts)
        assert (tmp_path / "model.safetensors.index.json").exists() == in_parts
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert all(torch.equal(p, student.get_parameter(n)) for n, p in loaded.named_parameters())
        assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize("name", ("qwen3_moe", "mixtral", "gemma3_text"))
def test_layers_laid_out_anew_one_by_one_are_those_of_the_whole(name: str) -> None:
    from transformers.core_model_loading import revert_weight_conversion

    model = small(name)
    whole = revert_weight_conversion(model, dict(named_weights(model, stored=False)))
    ours = dict(as_stored(model, named_weights(model, stored=False)))
    assert ours.keys() == whole.keys()
    assert all(torch.equal(value, whole[key]) for key, value in ours.items())


def test_a_disk_that_is_full_is_said_when_all_weights_have_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other processes wait for this one at every weight."""
    seen = []

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    def noted(model: Any, **how: Any) -> Any:
        for name, tensor in named_weights(model, **how):
            seen.append(name)
            yield name, tensor

    monkeypatch.setattr(weight_files, "save_file", full)
    monkeypatch.setattr(weight_files, "named_weights", noted)
    monkeypatch.setattr(weight_files, "FILE_BYTES", FILE_BYTES)
    model = tiny.llama(0)
    with pytest.raises(UserError, match="No space left on device.* Fix: make room"):
        write_weights(model, tmp_path)
    assert len(seen) == len(list(named_weights(model)))
