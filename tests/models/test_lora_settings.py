"""LoRA in every form that people write it, through real peft on tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from transformers import MambaConfig, MambaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from llmdistill import OPDConfig, UserError
from llmdistill.models.adapters import adapted, fitted, refuse_changed_base
from llmdistill.models.weights import named_weights
from llmdistill.recipe.command_line import parse
from llmdistill.recipe.config import StudentConfig
from llmdistill.recipe.lora import lora_config
from tests import tiny


def moe() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 32}
    config = Qwen3MoeConfig(vocab_size=64, num_key_value_heads=1, pad_token_id=0, **sizes, **experts)
    return Qwen3MoeForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("given", "adapts"),
    [
        ("q_proj,v_proj", {"q_proj", "v_proj"}),
        ("q_proj, v_proj", {"q_proj", "v_proj"}),
        ("q_proj v_proj", {"q_proj", "v_proj"}),
        ('["q_proj", "v_proj"]', {"q_proj", "v_proj"}),
        ("[q_proj, v_proj]", {"q_proj", "v_proj"}),
        (r".*\.(q|v)_proj", {"q_proj", "v_proj"}),
        ("self_attn.q_proj", {"q_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_target_modules(given: str, adapts: set[str], tmp_path: Any) -> None:
    """The same on the command line, in a recipe (as text and as a list), and from Python."""
    recipe = tmp_path / "r.yaml"
    as_list = yaml.safe_load(given) if given.startswith("[") else given
    recipe.write_text(yaml.safe_dump({"student": {"lora_r": 2, "lora_target_modules": as_list or []}}))
    out = ["--output_dir", str(tmp_path)]
    from_line = parse(OPDConfig, ["--student.lora_r", "2", f"--student.lora_target_modules={given}", *out]).student
    from_file = parse(OPDConfig, ["--config", str(recipe), *out]).student
    from_python = StudentConfig(lora_r=2, lora_target_modules=as_list)
    assert from_line == from_file == from_python
    model: Any = adapted(tiny.llama(1), lora_config(from_line))
    assert {n.split(".")[-2] for n, _ in model.named_modules() if n.endswith(".lora_A")} == adapts


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora_target_modules": "foo"}, "has 'foo', which is nothing of it. Fix: of down_proj, gate"),
        ({"lora_target_modules": ["q_proj", "foo"]}, "has 'foo', which is nothing"),  # peft would be content
        ({"lora_target_modules": "q_proj|v_proj"}, r"Fix: '.*\.(q_proj|v_proj)', for a whole name"),
        ({"lora_modules_to_save": ["foo"]}, "student.lora_modules_to_save has 'foo', which is nothing"),
        ({"lora_target_parameters": ["foo"]}, "student.lora_target_parameters has 'foo', which is nothing"),
        ({"lora_target_modules": "(q_proj"}, "is '(q_proj', no regular expression: missing )"),
        (
            {"lora_target_modules": ["all-linear", "q_proj"]},
            "peft takes names, or one regular expression, or all-linear",
        ),
        ({"lora_target_modules": [3]}, "student.lora_target_modules is [3]; it must be names of modules"),
        ({"lora_modules_to_save": "all-linear"}, "it must be names, no pattern"),
        ({"lora_alpha": 0}, "student.lora_alpha is 0; it must be > 0"),
        ({"lora_dropout": 1.0}, "student.lora_dropout is 1.0"),
        ({"lora_r": -1}, "student.lora_r is -1"),
        ({"lora_r": 0, "use_dora": True}, "student.lora_r is 0, and lora_modules_to_save"),
        ({"lora_r": 0, "init_lora_weights": "pissa"}, "pissa is how an adapter starts"),
        ({"init_lora_weights": "loftq"}, "which peft prepares from data or other weights"),
        ({"init_lora_weights": "foo"}, "it must be one of true, false, gaussian"),
        ({"init_lora_weights": "olora", "saved_as": "adapter"}, "olora changes the weights below the adapter"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "are both true. Fix: one of them"),
        ({"load_in_4bit": True, "lora_r": 0}, "quantised weights are not trained but an adapter on them"),
        ({"load_in_8bit": True}, "Fix: --student.saved_as adapter"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(settings: dict[str, Any], said: str) -> None:
    """What matches nothing is found where the model is known: by ``fitted``, which TRL's trainers are given too."""
    with pytest.raises(UserError) as error:
        fitted(lora_config(StudentConfig(**{"lora_r": 2, **settings})), tiny.llama(1))
    assert said in str(error.value) and "\n" not in str(error.value)


FORMS: list[dict[str, Any]] = [
    {"use_dora": True},
    {"use_rslora": True, "lora_alpha": 8},
    {"init_lora_weights": False},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_2"},
    {"init_lora_weights": "olora"},
    {"lora_modules_to_save": ["input_layernorm", "norm"]},
    {"lora_target_modules": "q_proj", "lora_modules_to_save": "embed_tokens"},
]


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_what_is_trained_is_what_is_saved(settings: dict[str, Any]) -> None:
    """The adapter moved at random, as training would; the model of its merged weights says the same."""
    check_merged(tiny.llama(1, tied=False), tiny.llama(1, tied=False), settings)


def test_fused_experts() -> None:
    check_merged(moe(), moe(), {"lora_target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]})


def check_merged(base: Any, fresh: Any, settings: dict[str, Any]) -> None:
    ids = torch.arange(3, 19)[None]
    before = base(ids).logits
    model: Any = adapted(base, lora_config(StudentConfig(**{"lora_r": 4, **settings})))
    starts_there = settings.get("init_lora_weights") is not False
    assert torch.allclose(model(ids).logits, before, atol=1e-3) == starts_there
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    expected = model.eval()(ids).logits
    assert not torch.allclose(expected, before, atol=1e-2)
    fresh.load_state_dict(dict(named_weights(model, stored=False)))
    assert torch.allclose(fresh(ids).logits, expected, atol=1e-3)


def test_a_start_that_changes_the_base_is_no_reference() -> None:
    model: Any = adapted(tiny.llama(1), lora_config(StudentConfig(lora_r=4, init_lora_weights="pissa")))
    with pytest.raises(UserError, match="reference is the student without its adapter, and student.init_lora_weights"):
        refuse_changed_base(model, "reference")
    refuse_changed_base(adapted(tiny.llama(1), lora_config(StudentConfig(lora_r=4))), "reference")


def test_the_default_on_mamba_leaves_out_what_kernels_read() -> None:
    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, pad_token_id=0))
    model: Any = adapted(mamba, lora_config(StudentConfig(lora_r=2)))
    names = {n.split(".")[-2] for n, _ in model.named_modules() if n.endswith(".lora_A")}
    assert names and "out_proj" not in names
    with pytest.raises(UserError, match=r"peft cannot adapt MambaForCausalLM: .* Fix: "):
        config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, pad_token_id=0)
        adapted(MambaForCausalLM(config), lora_config(StudentConfig(lora_r=2, lora_target_modules="out_proj")))
