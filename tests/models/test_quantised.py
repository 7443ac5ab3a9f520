"""QLoRA: an adapter on weights of 4 or 8 bits, where bitsandbytes is installed (it runs on a CPU too)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill import OPDConfig, OPDTrainer, RolloutConfig
from llmdistill.errors import UserError
from llmdistill.models.loading import load_configured
from llmdistill.models.saving import differs_from, logits_on_few_tokens, quantised, relative_distance
from llmdistill.recipe.config import StudentConfig
from llmdistill.recipe.lora import lora_config
from tests import tiny

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
needs_it = pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed")
BITS = {"load_in_4bit": 0.8, "load_in_8bit": 0.2}  # how far off rounding leaves random weights, at most


def saved(folder: Path) -> str:
    tiny.llama(1, hidden=64).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def config(folder: Path, **settings: Any) -> StudentConfig:
    return StudentConfig(model=str(folder), lora_r=4, saved_as="adapter", **settings)


@pytest.mark.skipif(INSTALLED, reason="it is installed")
@pytest.mark.parametrize("bits", BITS)
def test_where_it_is_not_installed_that_is_said_before_anything_is_loaded(bits: str) -> None:
    with pytest.raises(UserError, match="bitsandbytes, which quantises, is not installed. Fix: pip install"):
        config(Path("nowhere"), **{bits: True})


@needs_it
@pytest.mark.parametrize("bits", BITS)
def test_an_adapter_learns_on_quantised_weights_and_is_saved_alone(tmp_path: Path, bits: str) -> None:
    """The weights below stay as they were, to the bit, and the saved adapter upon them is the trained model."""
    given = config(Path(saved(tmp_path / "model")), **{bits: True})
    student, tokenizer = load_configured(given, "student")
    assert quantised(student)
    whole = tiny.llama(1, hidden=64)
    rounded = relative_distance(logits_on_few_tokens(student, student), logits_on_few_tokens(whole, whole))
    assert 0 < rounded < BITS[bits], "it is the model, rounded"
    args = OPDConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=2,
        rollouts=RolloutConfig(max_new_tokens=8),
    )
    t = OPDTrainer(
        student,
        args,
        tiny.llama(2),
        train_dataset=tiny.rows(16, completion=False),
        processing_class=tokenizer,
        peft_config=lora_config(given),
    )
    before = {n: p.detach().clone() for n, p in t.model.named_parameters() if not p.requires_grad}
    t.train()
    assert all(torch.equal(p, before[n]) for n, p in t.model.named_parameters() if n in before)
    moved = [p for n, p in t.model.named_parameters() if "lora_B" in n]
    assert moved and all(bool(p.any()) for p in moved)
    t.save_model(str(tmp_path / "student"))
    names = {file.name for file in (tmp_path / "student").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    assert differs_from(logits_on_few_tokens(t.model, t.model), tmp_path / "student", t.model) is None
    assert json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4


@needs_it
@pytest.mark.parametrize("engine", ["vllm", "remote"])
def test_engines_of_whole_weights_are_refused(tmp_path: Path, engine: str) -> None:
    student, tokenizer = load_configured(config(Path(saved(tmp_path / "model")), load_in_4bit=True), "student")
    url = {"url": "http://127.0.0.1:9"} if engine == "remote" else {}
    args = OPDConfig(output_dir=str(tmp_path / "run"), max_steps=1, rollouts=RolloutConfig(engine=engine, **url))
    with pytest.raises(UserError, match="is given whole weights, .* are quantised .*--rollouts.engine hf"):
        OPDTrainer(
            student,
            args,
            tiny.llama(2),
            train_dataset=tiny.rows(4, completion=False),
            processing_class=tokenizer,
            peft_config=lora_config(config(tmp_path / "model", load_in_4bit=True)),
        )


@needs_it
def test_an_adapter_as_the_model_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "base"))
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="is an adapter, which is not merged into quantised weights"):
        load_configured(config(tmp_path / "adapter", load_in_4bit=True), "student")
