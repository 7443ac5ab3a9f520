"""The image, sound and text classes that transformers can build, in some hundred thousand random weights.

``wrapped(name)`` makes the class that a checkpoint of this config type has: a decoder, with sizes of
:mod:`.architectures`, and towers of one layer that text never reaches.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForMultimodalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.students.architectures import _IDS, VOCAB, small_config

WRAPPED = (
    *(
        "gemma3",
        "gemma4",
        "gemma4_unified",
        "glm4v",
        "glm4v_moe",
        "idefics3",
        "internvl",
        "kimi_k25",
        "lfm2_vl",
        "llama4",
    ),
    *(
        "llava",
        "llava_next",
        "llava_onevision",
        "minimax_m3_vl",
        "mistral3",
        "mllama",
        "paligemma",
        "qwen2_5_omni_thinker",
    ),
    *(
        "qwen2_5_vl",
        "qwen2_audio",
        "qwen2_vl",
        "qwen3_5",
        "qwen3_vl",
        "qwen3_vl_moe",
        "smolvlm",
        "voxtral",
        "aya_vision",
    ),
)
_WIDTHS = ("hidden_size", "embed_dim", "d_model", "intermediate_size", "encoder_ffn_dim", "projection_dim")
_TEXT_WIDTHS = ("out_hidden_size", "vision_output_dim", "projector_input_dim", "projector_output_dim")
_TOWER: dict[str, int] = {
    **dict.fromkeys(_WIDTHS, 32),
    **dict.fromkeys(_TEXT_WIDTHS, 64),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "encoder_layers", "num_global_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads", "encoder_attention_heads"), 2),
    **{"head_dim": 16, "image_size": 32, "patch_size": 16, "num_position_embeddings": 16, "spatial_merge_size": 1},
    **{"max_position_embeddings": 64},
}


def _rotary(*sections: int, part: float = 1.0) -> dict[str, Any]:
    """Positions in time, height and width."""
    kind = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": part}
    return {"rope_parameters": {**kind, "mrope_section": list(sections)}}


_TEXT: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "glm4v"), _rotary(2, 3, 3)),
    "glm4v_moe": _rotary(1, 1, 2, part=0.5),
    # A layer that looks at images, which there are none of, beside one that does not.
    "mllama": {"cross_attention_layers": [1]},
}
_TOP: dict[str, dict[str, Any]] = {"gemma3": {"mm_tokens_per_image": 4}}


def wrapped(name: str, seed: int = 0) -> Any:
    """A seeded random float32 model of a class of several modalities in evaluation mode."""
    made = CONFIG_MAPPING[name]
    default = made()
    text, parts = default.get_text_config(), dict[str, Any]()
    for key in made.sub_configs:
        part = getattr(default, key, None)
        if part is text:
            parts[key] = {**small_config(text.model_type).to_dict(), **_TEXT.get(name, {})}
        elif part is not None:
            sizes = {k: v for k, v in _TOWER.items() if isinstance(getattr(part, k, None), int)}
            parts[key] = {**part.to_dict(), **sizes}
    # Every id that stands for an image or a sound is one that no text here has.
    ids = {k: VOCAB - 1 for k, v in vars(default).items() if k.endswith(("token_id", "token_index")) and v is not None}
    config = made(**{**ids, **_IDS, **_TOP.get(name, {}), **parts})
    torch.manual_seed(seed)
    return AutoModelForMultimodalLM.from_config(config).float().eval()
