"""A student's adapter as the files that engines add to the model below it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from llmdistill.models.weights import gathered, whole


def peft_model(model: Any) -> Any:
    """The peft model inside what DDP, DeepSpeed and torch.compile put around it; None where there is none."""
    while isinstance(model, nn.parallel.DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine":
        model = model.module
    model = getattr(model, "_orig_mod", model)
    return model if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else None


def adapter_rank(model: Any) -> int:
    """The highest of the active adapter."""
    config = _config(peft_model(model))
    return max([config.r, *(getattr(config, "rank_pattern", None) or {}).values()])


@torch.no_grad()
def write_adapter(model: Any, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors. Every process calls it, for shards are put together; each
    writes to a folder of its own."""
    from peft import get_peft_model_state_dict

    peft = peft_model(model)
    tensors = {}
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            with gathered([parameter]):
                tensors[name] = whole(parameter).clone()
    kept = get_peft_model_state_dict(peft, tensors, adapter_name=peft.active_adapter, save_embedding_layers=False)
    save_file({name: t.contiguous().cpu() for name, t in kept.items()}, folder / "adapter_model.safetensors")
    config = copy.copy(_config(peft))
    config.inference_mode = True
    config.save_pretrained(folder)


def _config(peft: Any) -> Any:
    return peft.peft_config[peft.active_adapter]
