"""Hidden states of a model's layers, captured as they are computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmdistill.errors import UserError
from llmdistill.models.weights import base_model


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a decoder, in order.

    Raises:
        UserError: there is no one list of as many modules as the config has layers.
    """
    inner = base_model(model)
    count = inner.config.get_text_config().num_hidden_layers
    lists = [m for m in inner.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise UserError(
            f"no list of {count} layers was found in {type(inner).__name__}, whose hidden states a term reads. "
            "Fix: a decoder of transformers' usual form, or a method that reads logits."
        )
    largest = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))
    return list(largest)


def check_layers(model: nn.Module, layers: Sequence[int], setting: str) -> None:
    """Refuses numbers of layers that the model has not got; negative ones count from the last.

    Raises:
        UserError: naming ``setting``.
    """
    count = len(decoder_layers(model))
    for layer in layers:
        if not -count <= layer < count:
            raise UserError(
                f"{setting} names layer {layer}, and {type(base_model(model)).__name__} has {count}. "
                f"Fix: numbers from 0 to {count - 1}, or from the last, -1 to {-count}."
            )


@contextmanager
def captured(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Within it, layer -> what it put out last, [B, T, H], with gradient where the forward has one."""
    found: dict[int, Tensor] = {}
    every = decoder_layers(model) if layers else []

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [every[layer].register_forward_hook(keep(layer)) for layer in dict.fromkeys(layers)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def hidden_size(model: nn.Module) -> int:
    """Width of the hidden states."""
    return int(base_model(model).config.get_text_config().hidden_size)


def no_rows(model: nn.Module, layers: Sequence[int]) -> list[Tensor]:
    """Of an empty text: a tensor [0, H] for every layer."""
    parameter = next(model.parameters())
    return [torch.zeros(0, hidden_size(model), device=parameter.device) for _ in layers]
