"""What DeepSpeed's ZeRO-3 names only on the parameters themselves: the parts of sharded weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(parameter: Any) -> bool:
    """Whether ZeRO-3 shards a weight, and it is not whole at the moment."""
    return hasattr(parameter, "ds_id") and parameter.ds_status.name != "AVAILABLE"


def local_shard(parameter: Any) -> Tensor:
    """What this rank holds of a weight that ZeRO-3 shards, without the padding at its end, which is any memory at all;
    of another one all of it. Shares its storage."""
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter  # type: ignore[no-any-return]
    begun = part.ds_numel * parameter.ds_zero_partition_rank
    return part[: max(0, min(part.ds_numel, parameter.ds_numel - begun))]  # type: ignore[no-any-return]


def shard_like(whole: Tensor, parameter: Any) -> Tensor:
    """What this rank holds of a whole tensor that is sharded as ``parameter`` is, padded at the end as that is.

    Raises:
        ValueError: ``parameter`` is not sharded by ZeRO-3, or has another number of elements.
    """
    part = getattr(parameter, "ds_tensor", None)
    if part is None or whole.numel() != parameter.ds_numel:
        raise ValueError("it is made of other shards than these weights")
    size, flat = part.ds_numel, whole.flatten()
    own = flat[size * parameter.ds_zero_partition_rank :][:size]
    return torch.cat([own, own.new_zeros(size - len(own))])


@contextmanager
def gathered_as_run(model: nn.Module) -> Iterator[None]:
    """Runs inside may be of a model that no engine of DeepSpeed has yet: each module's own weights are put together
    while it runs. All processes run the same."""
    held: dict[nn.Module, ExitStack] = {}

    def gather(module: nn.Module, _: Any) -> None:
        import deepspeed

        held[module] = ExitStack()
        own = [p for p in module.parameters(recurse=False) if is_sharded(p)]
        held[module].enter_context(deepspeed.zero.GatheredParameters(own))

    def release(module: nn.Module, *_: Any) -> None:
        held.pop(module).close()

    owners = [m for m in model.modules() if any(is_sharded(p) for p in m.parameters(recurse=False))]
    handles = [m.register_forward_pre_hook(gather) for m in owners]
    handles += [m.register_forward_hook(release) for m in owners]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for stack in reversed(held.values()):  # of modules that failed
            stack.close()


def gather_again(parameters: Iterable[Any]) -> None:
    """Under ZeRO-3: makes whole weights of the ranks' parts anew, after those were written to.

    What is gathered at the moment, and small weights, which DeepSpeed never lets go of, would stay as they were.
    """
    whole = [p for p in parameters if hasattr(p, "ds_id") and not is_sharded(p)]
    if whole:
        whole[0].partition(whole, has_been_updated=False)
        whole[0].all_gather(whole)
