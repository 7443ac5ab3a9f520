"""What weights have to be for vLLM's loading, and the plain copies of them that an updatable engine keeps.

On a CPU vLLM packs every weight for oneDNN and throws the plain copy away. An engine that is given new weights keeps
the plain ones (its weights take twice their memory).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmdistill.compat.patching import patched


def cast_for(dtype: torch.dtype, pairs: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The pairs in the dtype of an engine's weights."""
    return ((name, tensor.to(dtype) if tensor.is_floating_point() else tensor) for name, tensor in pairs)


def without_a_head_it_lacks(model: nn.Module, pairs: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The pairs without the output head, where the model reads its embeddings for that (Gemma) and has none."""
    heads = any(name.endswith("lm_head.weight") for name, _ in model.named_parameters(remove_duplicate=False))
    return ((name, tensor) for name, tensor in pairs if heads or not name.endswith("lm_head.weight"))


def keep_plain_weights() -> None:
    """For good, in a process that only holds an engine: what an updatable engine needs (see the module's docstring)."""
    from vllm.model_executor.layers import utils

    utils.dispatch_cpu_unquantized_gemm = packer(utils.dispatch_cpu_unquantized_gemm)


def weight_of(layer: Any) -> Tensor:
    found: Tensor = layer.weight
    return found


def pack_tied_heads(model: nn.Module) -> None:
    """After new weights came layer by layer: on a CPU a head that is the embedding matrix got none of its own, and what
    was packed of it is the old one."""
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    layers: list[Any] = list(model.modules())
    embeddings = {
        weight_of(layer).data_ptr()
        for layer in layers
        if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)
    }
    pack = packer(utils.dispatch_cpu_unquantized_gemm)
    for layer in layers:
        packed = isinstance(layer, ParallelLMHead) and "cpu_linear" in vars(layer)
        if packed and weight_of(layer).data_ptr() in embeddings:
            pack(layer)


@contextmanager
def keeping_plain_weights() -> Iterator[None]:
    """Layers packed meanwhile keep their plain weights; an embedding that is no output head is not packed at all."""
    from vllm.model_executor.layers import utils

    with patched(utils, "dispatch_cpu_unquantized_gemm", packer(utils.dispatch_cpu_unquantized_gemm)):
        yield


def packer(dispatch: Callable[..., None]) -> Callable[..., None]:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    def pack(layer: Any, remove_weight: bool = False) -> None:
        if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
            layer.cpu_linear = nn.functional.linear  # type: ignore[assignment]
        else:
            dispatch(layer, remove_weight=False)

    return pack
