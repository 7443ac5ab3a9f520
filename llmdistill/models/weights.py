"""The student's weights as its checkpoint would hold them, whatever training has wrapped around the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from llmdistill.compat import fsdp, zero3
from llmdistill.compat.models import as_stored
from llmdistill.errors import UserError
from llmdistill.models.helpers import NAME as HELPERS


def named_weights(
    model: nn.Module, *, trainable_only: bool = False, stored: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the student's weights as its checkpoint would hold them, the tied output head included.

    Adapters are merged out of place: ``model`` is not touched. Weights that DeepSpeed (ZeRO-3) or FSDP2 shards are
    gathered one module at a time, so every rank has to run through the iterator. A tensor may be the model's own
    storage: copy what is to outlive the next step.

    Args:
        model: a transformers model, wrapped for training or not, with or without peft adapters.
        trainable_only: leave out what training cannot have changed.
        stored: under the names of a checkpoint; else under the model's own, which ``save_pretrained`` translates
            itself. Translated twice they would be names that nothing loads.

    Raises:
        UserError: an adapter on one of two tied matrices, which no checkpoint can hold.
    """
    fsdp.shard_again(model)
    model = base_model(model)
    refuse_adapted_ties(model)
    weights = _walk(model, "", trainable_only)
    return as_stored(model, weights) if stored else weights


def base_model(model: Any) -> Any:
    """The transformers model inside what DDP, DeepSpeed, torch.compile and peft put around it."""
    while isinstance(model, nn.parallel.DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine":
        model = model.module
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _walk(module: Any, prefix: str, trainable_only: bool) -> Iterator[tuple[str, Tensor]]:
    """Own parameters and persistent buffers of ``module``, then those of its children, adapters merged."""
    if hasattr(module, "token_adapter"):  # peft: an embedding of which some rows are trained
        rows = module.token_adapter
        with torch.no_grad(), gathered(list(module.parameters())), fsdp.whole_inside(module):
            yield f"{prefix}weight", whole(rows.get_merged_weights([] if rows.merged else rows.active_adapters))
        return
    if hasattr(module, "original_module") and hasattr(module, "modules_to_save"):  # peft: a copy that is trained
        copies = module.modules_to_save
        active = module.original_module if module.disable_adapters else copies[module.active_adapters[0]]
        yield from _walk(active, prefix, trainable_only)
        return
    if hasattr(module, "base_layer") and hasattr(module, "merge"):  # peft: a layer with adapters
        with gathered(list(module.parameters())), fsdp.whole_inside(module):
            merged = _merged(module)
        yield from ((prefix + name, tensor) for name, tensor in merged.items())
        base = module.get_base_layer()  # a router's has a buffer
        yield from () if trainable_only else _buffers(base, prefix)
        for name, child in base.named_children():
            yield from _walk(child, f"{prefix}{name}.", trainable_only)
        return
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.requires_grad or not trainable_only:
            with gathered([parameter]):
                yield plain_name(prefix + name), whole(parameter)
    yield from () if trainable_only else _buffers(module, prefix)
    for name, child in module.named_children():
        if name == HELPERS:  # trained beside the student, and no part of it
            continue
        yield from _walk(child, f"{prefix}{name}.", trainable_only)


def _buffers(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield plain_name(prefix + name), buffer


@torch.no_grad()
def _merged(layer: Any) -> dict[str, Tensor]:
    """Parameters of a layer with its active adapters merged in, computed beside the layer."""
    if hasattr(layer, "parameter_name"):
        return _merged_parameters(layer)
    base = layer.get_base_layer()
    tensors = {name: whole(p) for name, p in base.named_parameters(recurse=False)}
    if layer.merged or layer.disable_adapters:
        return tensors
    plain = hasattr(layer, "lora_A") and set(layer.active_adapters) <= set(layer.lora_A)
    if plain and not layer.lora_variant and not any(layer.lora_bias.values()):
        for adapter in layer.active_adapters:
            tensors["weight"] = tensors["weight"] + layer.get_delta_weight(adapter).to(tensors["weight"].dtype)
        return tensors
    twin = copy.deepcopy(layer)  # DoRA, embeddings and other adapters: peft's own merge, on a copy
    twin.merge(adapter_names=layer.active_adapters)
    return {name: p.detach() for name, p in twin.get_base_layer().named_parameters(recurse=False)}


def _merged_parameters(layer: Any) -> dict[str, Tensor]:
    """Of a module whose parameters are adapted one by one (fused experts, routers): peft nests a layer for each."""
    base = layer.get_base_layer()
    tensors = {name: whole(p) for name, p in base.named_parameters(recurse=False)}
    while hasattr(layer, "parameter_name"):
        name = layer.parameter_name
        for adapter in () if layer.merged or layer.disable_adapters else layer.active_adapters:
            if adapter in layer.lora_A:
                tensors[name] = tensors[name] + layer.get_delta_weight(adapter).to(tensors[name].dtype)
        layer = layer.base_layer
    return tensors


def refuse_adapted_ties(model: Any) -> None:
    """Refuses an adapter, or a trained copy, of one of two tied matrices.

    Raises:
        UserError: merged, the embedding and the output head would differ, which no checkpoint with tied ones can hold.
    """
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if not (tied or getattr(model.config, "tie_word_embeddings", False)):
        return
    modules = {"embed_tokens": model.get_input_embeddings(), "lm_head": model.get_output_embeddings()}
    for name, module in modules.items():
        if type(module).__module__.startswith("peft."):
            raise UserError(
                f"the student's {name} is adapted (student.lora_target_modules, or peft's modules_to_save), and is one "
                "matrix with the other end of the model: merged, the two would differ. "
                f"Fix: leave {name} out, or a checkpoint whose config says tie_word_embeddings: false."
            )


def gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """Whole parameters inside: DeepSpeed's gathering under ZeRO-3, nothing otherwise.

    Those that are whole already stay so, also afterwards: this may be entered within itself.
    """
    parameters = [p for p in parameters if zero3.is_sharded(p)]
    if not parameters:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)  # type: ignore[no-any-return]


def whole(parameter: Tensor) -> Tensor:
    """The parameter's values: of all shards under FSDP2, a copy under ZeRO-3 (the gathered storage is freed)."""
    value = fsdp.whole(parameter)
    return value.clone() if hasattr(parameter, "ds_id") else value


def plain_name(name: str) -> str:
    """Without what compiling and checkpointing put into it."""
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module."):
        name = name.replace(wrapper, "")
    return name
