"""The student's weights, named and valued as its saved checkpoint would have them."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from llmdistill.errors import UserError
from llmdistill.models.weights import named_weights
from tests.tiny import llama


def lora(model, seed=0, **kw):
    """An adapter whose B matrices are not zero, so that merging changes the weights."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **kw}
    adapted = get_peft_model(model, LoraConfig(**options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
    return adapted


def moe():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    experts = dict(intermediate_size=32, moe_intermediate_size=16, num_experts=4, vocab_size=50)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts))


@pytest.mark.parametrize("make", [lambda: llama(0), lambda: llama(0, tied=False), moe], ids=["tied", "untied", "moe"])
def test_names_and_values_are_those_of_a_saved_checkpoint(tmp_path, make):
    """MoE: transformers fuses experts in memory and splits them on disk; engines expect them as on disk."""
    model = make()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    ours = dict(named_weights(model))
    if model.config.tie_word_embeddings:
        assert torch.equal(ours.pop("lm_head.weight"), stored["model.embed_tokens.weight"])
    assert set(ours) == set(stored)
    assert all(torch.equal(ours[name], stored[name]) for name in stored)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "target_modules": "all-linear"},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=["lora", "dora", "all-linear", "embedding", "modules_to_save"],
)
def test_adapters_are_merged_beside_the_model(options):
    adapted = lora(llama(0, tied=False), **options)
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    ours = dict(named_weights(adapted))
    merged = copy.deepcopy(adapted).merge_and_unload()
    reference = dict(merged.named_parameters())
    assert set(ours) == set(reference)
    for name, value in reference.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-6)  # the order of additions may differ
    assert all(torch.equal(before[name], value) for name, value in adapted.state_dict().items())
    assert any(not torch.equal(ours[n], v) for n, v in llama(0, tied=False).named_parameters())


def test_disabled_adapters_are_left_out():
    adapted = lora(llama(0))
    with adapted.disable_adapter():
        ours = dict(named_weights(adapted))
    assert all(torch.equal(ours[n], v) for n, v in llama(0).named_parameters())


def test_trainable_only_holds_what_training_can_change():
    model = llama(0)
    model.get_input_embeddings().weight.requires_grad_(False)
    everything, changed = dict(named_weights(model)), dict(named_weights(model, trainable_only=True))
    assert set(everything) - set(changed) == {"model.embed_tokens.weight", "lm_head.weight"}
    names = {name.rsplit(".", 2)[1] for name, _ in named_weights(lora(llama(0)), trainable_only=True)}
    assert names == {"q_proj", "down_proj"}


def test_adapters_on_tied_embeddings_are_refused():
    with pytest.raises(UserError, match="tie_word_embeddings"):
        list(named_weights(lora(llama(0), target_modules=["embed_tokens"])))


def test_wrappers_leave_no_trace_in_the_names():
    assert {n for n, _ in named_weights(torch.compile(llama(0)))} == {n for n, _ in named_weights(llama(0))}


ZERO3 = """
import torch, deepspeed
from tests.tiny import llama
from tests.test_weights import lora
from llmdistill.models.weights import named_weights
deepspeed.init_distributed(dist_backend="gloo")
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3,
          "stage3_param_persistence_threshold": 0}, "optimizer": {"type": "Adam", "params": {"torch_adam": True}},
          "zero_allow_untested_optimizer": True}
for make in (lambda: llama(0), lambda: lora(llama(0))):
    reference = {n: t.clone() for n, t in named_weights(make())}
    engine, *_ = deepspeed.initialize(model=make(), config=config)
    inside = next(engine.module.parameters())
    assert inside.numel() == 0, "the weights are not partitioned"
    ours = dict(named_weights(engine))
    assert set(ours) == set(reference), set(ours) ^ set(reference)
    assert all(torch.equal(ours[n], reference[n]) for n in ours)
    assert next(engine.module.parameters()).numel() == 0, "the weights were not partitioned again"
print("same weights")
"""


@pytest.mark.slow
def test_zero3_weights_are_gathered():
    pytest.importorskip("deepspeed")
    environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": "29713", "DS_ACCELERATOR": "cpu"}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", ZERO3], capture_output=True, text=True, env=environment, timeout=300)
    assert "same weights" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
