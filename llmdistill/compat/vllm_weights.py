"""New weights for a vLLM engine that runs.

On a CPU vLLM packs every weight for oneDNN and throws the plain copy away, so its own ``reload_weights`` rebuilds each
layer. An updatable engine keeps the plain copies instead (its weights take twice their memory): they are loaded in
place and what changed is packed again, in less than half the time, and a push may hold only the weights that are
trained. The student's side of a push is in :mod:`llmdistill.models.weights`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from llmdistill.compat.patching import patched
from llmdistill.compat.vllm_plain import cast_for, keeping_plain_weights, packer, without_a_head_it_lacks
from llmdistill.compat.vllm_transfer import takes_transfer, transfer

RESETS, RESET_S = 50, 0.1


def push_weights(llm: Any, pairs: Iterable[tuple[str, Tensor]], *, partial: bool = False) -> None:
    """Makes the engine use these weights, named as in a checkpoint, and forget what it cached of the old ones.

    By vLLM's weight-transfer API where the engine was loaded for it (:mod:`llmdistill.compat.vllm_transfer`).

    Args:
        partial: ``pairs`` holds only the weights that changed. Where :func:`takes_partial_push` is false vLLM would
            fill the rest of a layer with uninitialised memory.

    Raises:
        RuntimeError: weights of the engine's model are missing from a push that is not partial, or the cache stays.
    """
    if takes_transfer(llm):
        transfer(llm, pairs)
    else:
        llm.collective_rpc(load_into_worker, args=(iter(pairs), partial))
    forget_prefixes(llm)


def forget_prefixes(llm: Any) -> None:
    """Empties the prefix cache. vLLM says no while a block of it is in use, as by a request that was just aborted.

    Raises:
        RuntimeError: it keeps saying no. Samples of new weights behind old prefixes would look like any others.
    """
    for _ in range(RESETS):
        if llm.reset_prefix_cache():
            return
        time.sleep(RESET_S)
    raise RuntimeError("vLLM does not let go of its prefix cache; what it holds belongs to other weights")


def takes_partial_push(llm: Any) -> bool:
    """Whether weights are loaded in place: plain linear layers and embeddings on a CPU, loaded as updatable."""
    return not takes_transfer(llm) and all(llm.collective_rpc(worker_is_plain))


def load_into_worker(worker: Any, pairs: Iterator[tuple[str, Tensor]], partial: bool) -> None:
    """New weights for a worker's model; whoever calls forgets the prefix cache of the old ones.

    Raises:
        ValueError: ``partial`` where only complete sets can be loaded.
    """
    if worker_is_plain(worker):
        _load_in_place(worker, pairs, partial)
    elif partial:
        raise ValueError("this engine takes complete sets of weights only")
    else:
        model, cast = worker.get_model(), cast_for(worker.model_config.dtype, pairs)
        _forget_packed_experts(model)
        # As they were loaded: vLLM copies what it made of the new weights into what it had made of the old ones.
        with keeping_plain_weights() if _has_plain_weights(model) else nullcontext():
            worker.reload_weights(weights_iterator=without_a_head_it_lacks(model, cast))


def _has_plain_weights(model: nn.Module) -> bool:
    """Whether the engine was loaded as updatable: else what was packed has no plain weight left."""
    return all(parameter.numel() > 0 for parameter in model.parameters())


def _forget_packed_experts(model: nn.Module) -> None:
    """On a CPU experts are packed when their kernel is made. For a kernel that is there vLLM would pack no new ones and
    run it on plain weights."""
    if next(model.parameters()).device.type != "cpu":
        return
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def worker_is_plain(worker: Any) -> bool:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    model = worker.get_model()
    # Of a mixture's experts it is a module itself, and so in none of the layer's variables.
    methods = ((m, getattr(m, "quant_method", None)) for m in model.modules())
    return next(model.parameters()).device.type == "cpu" and all(
        method is None
        or (isinstance(method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod) and layer.weight.numel() > 0)
        for layer, method in methods
    )


@torch.no_grad()
def _load_in_place(worker: Any, pairs: Iterator[tuple[str, Tensor]], partial: bool) -> None:
    from vllm.model_executor.layers import utils
    from vllm.model_executor.models import utils as loading

    model, pack = worker.get_model(), packer(utils.dispatch_cpu_unquantized_gemm)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = set(parameters) - {name for name, _ in model.named_parameters()}
    # copy_ converts the dtype on the way, which is faster than a converted copy; vLLM would warn of every one
    with patched(loading.logger, "warning", lambda *args, **kwargs: None):
        kept = without_a_head_it_lacks(model, pairs)
        loaded = model.load_weights((name, tensor) for name, tensor in kept if name not in tied)
    missing = set(parameters) - tied - set(loaded)
    if missing and not partial:
        raise RuntimeError(f"weights of the vLLM model that the student did not provide: {sorted(missing)[:5]}")
    changed = {parameters[name].data_ptr() for name in loaded}
    for layer in model.modules():
        if "cpu_linear" in vars(layer) and layer.weight.data_ptr() in changed:
            pack(layer)
