"""The decoders that transformers can build, in some ten thousand random weights: the proof tries all, CI some.

``small(name)`` makes ``AutoModelForCausalLM`` from the config class of that name in ``CONFIG_MAPPING``, with the sizes
below under whatever name the class has for them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 264  # tests.tiny's tokenizer has 260 ids
_HIDDEN = ("hidden_size", "d_model", "n_embd", "dim", "n_embed", "model_dim", "embed_dim", "lru_width")
_INNER = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "intermediate_dim")
_SIZES: dict[str, int] = {
    **dict.fromkeys((*_HIDDEN, *_INNER, "attention_hidden_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("mamba_d_head", "mamba_d_state", "state_size", "mamba_head_dim", "ssm_state_size"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("sliding_window", "attention_window_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "moe_layer_start_index"), 1),
    **{"num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2, "rotary_dim": 16, "mamba_d_ssm": 128},
}
_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
_LATENT = {"num_key_value_heads": 4}  # multi-head latent attention has as many keys as heads
# Layers of both kinds, where the default of a short model has one only.
_MIXED = {"layer_types": ["linear_attention", "full_attention"]}
OF_THEIR_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "axk1"), _LATENT),
    **dict.fromkeys(("minicpm3", "longcat_flash", "youtu", "axk2"), _LATENT),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _MIXED),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), {"head_dim": 16}),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "zamba2": {"layer_types": ["mamba", "hybrid"], "num_mem_blocks": 1},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2, "n_routed_experts": 4},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"], "num_key_value_heads": 4},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "full_attention"]},
    "cohere_compass_text": {"layer_types": ["full_attention", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "ernie4_5_moe": {"moe_k": 2},
}


def small_config(name: str, **settings: Any) -> Any:
    """A config of this type with small sizes, and with ``settings``."""
    made = CONFIG_MAPPING[name]
    known = {f.name for cls in made.__mro__ if dataclasses.is_dataclass(cls) for f in dataclasses.fields(cls)}
    known |= {key for cls in made.__mro__ for key in vars(cls).get("__annotations__", {})}
    default = made()
    sizes = {key: size for key, size in _SIZES.items() if key in known and isinstance(_get(default, key), int)}
    return made(**{**sizes, **_IDS, **OF_THEIR_OWN.get(name, {}), **settings})


def small(name: str, seed: int = 0, **settings: Any) -> Any:
    """A seeded random float32 model of this architecture in evaluation mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(small_config(name, **settings)).float().eval()


def _get(config: Any, key: str) -> Any:
    try:
        return getattr(config, key, None)
    except Exception:  # some configs have one value a layer, and refuse to name one
        return None
