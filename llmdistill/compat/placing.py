"""Puts weights, and what an optimizer remembers of them, where this launch keeps them: whole, or in parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmdistill.compat import zero3
from llmdistill.compat.stored import Moments, Stored


def optimizer_inside(optimizer: Any) -> Any:
    """What accelerate has wrapped: DeepSpeed's optimizer of flat parts, or torch's."""
    while hasattr(optimizer, "optimizer") and not _is_zero(optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def place(model: nn.Module, optimizer: Any, stored: Stored, named: Mapping[str, nn.Parameter]) -> None:
    """Makes the trained weights, and the optimizer's memory of them, those of a checkpoint. Every process calls it.

    Args:
        optimizer: of :func:`optimizer_inside`.
        named: the trained weights, by their names in ``model``.

    Raises:
        ValueError: a weight is not there or has another size; or this optimizer, or the one that wrote the checkpoint,
            remembers something else than numbers for every element.
    """
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        put: Callable[..., None] = _put_zero3
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        put = _put_zero12
    elif isinstance(optimizer, torch.optim.Optimizer):
        put = _put_plain
    else:
        raise ValueError(f"no checkpoint can be taken apart for {type(optimizer).__name__}")
    groups = {id(p): group for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
    for name, parameter in named.items():
        weight = stored.weight(name)
        if weight is None:
            raise ValueError(f"it has no weight {name}")
        moments = stored.moments(name)
        size = getattr(parameter, "ds_numel", parameter.numel())
        for key, value in {"it": weight, **(moments.values if moments else {})}.items():
            if value.numel() != size:
                raise ValueError(f"of {name} it has {value.numel()} elements ({key}), and here there are {size}")
        put(optimizer, parameter, weight.flatten(), moments, groups.get(id(parameter), {}))
    zero3.gather_again(named.values())


@torch.no_grad()
def put_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """As ``load_state_dict`` of whole tensors, also where FSDP2 has sharded the module.

    Raises:
        KeyError: one is missing.
    """
    sharded = {name: p for name, p in module.named_parameters() if hasattr(p, "to_local")}
    for name, parameter in sharded.items():
        parameter.to_local().copy_(local_part(state[name], parameter))
    module.load_state_dict({name: tensor for name, tensor in state.items() if name not in sharded}, strict=not sharded)


@torch.no_grad()
def _put_plain(optimizer: Any, parameter: Any, weight: Tensor, moments: Moments | None, group: Any) -> None:
    own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    own.copy_(local_part(weight, parameter))
    if moments is None:
        return
    state: dict[str, Any] = {}
    for key, value in moments.values.items():
        part = local_part(value, parameter).to(own.device, own.dtype, copy=True)
        if hasattr(parameter, "to_local"):
            from torch.distributed.tensor import DTensor

            mesh, placements = parameter.device_mesh, parameter.placements
            state[key] = DTensor.from_local(
                part, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
            )
        else:
            state[key] = part
    if moments.step is not None:
        on_device = group.get("fused") or group.get("capturable")
        state["step"] = torch.tensor(moments.step, device=own.device if on_device else "cpu")
    optimizer.state[parameter] = state


@torch.no_grad()
def _put_zero12(optimizer: Any, parameter: Any, weight: Tensor, moments: Moments | None, _: Any) -> None:
    parameter.copy_(weight.view(parameter.shape))
    mapping = parameter._hp_mapping
    if mapping is None:  # the other processes'
        return
    flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    a, n = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
    here = slice(mapping.lp_fragment_address.start, mapping.lp_fragment_address.start + n)
    _put_flat(optimizer.optimizer, flat, a, weight[here], moments, here)


@torch.no_grad()
def _put_zero3(optimizer: Any, parameter: Any, weight: Tensor, moments: Moments | None, _: Any) -> None:
    parameter.ds_tensor.copy_(zero3.shard_like(weight, parameter))
    group, a, n = optimizer.grad_position[optimizer.get_param_id(parameter)]
    flat = optimizer.fp32_partitioned_groups_flat[group]
    if flat is None:
        raise ValueError("train.deepspeed keeps the optimizer on NVMe")
    begun = n * parameter.ds_zero_partition_rank
    here = slice(begun, min(begun + n, parameter.ds_numel))
    _put_flat(optimizer.optimizer, flat, a, weight[here], moments, here)


def _put_flat(inner: Any, flat: Tensor, a: int, weight: Tensor, moments: Moments | None, here: slice) -> None:
    """A weight's piece in this process's flat part, which ``a`` is the begin of."""
    flat.narrow(0, a, len(weight)).copy_(weight)
    if moments is None:
        return
    state = inner.state[flat]
    for key, value in moments.values.items():
        if key not in state:
            state[key] = torch.zeros_like(flat)
        state[key].narrow(0, a, len(weight)).copy_(value.flatten()[here])
    if moments.step is None:
        return
    counted = max(moments.step, float(state.get("step", 0)))  # all weights of a part have one count
    fused = any(group.get("fused") or group.get("capturable") for group in inner.param_groups)
    counts_in_int = type(inner).__name__ in ("DeepSpeedCPUAdam", "FusedAdam")  # DeepSpeed's own
    state["step"] = int(counted) if counts_in_int else torch.tensor(counted, device=flat.device if fused else "cpu")


def local_part(whole: Tensor, parameter: Any) -> Tensor:
    """What this process holds of a whole tensor that is laid out as ``parameter`` is."""
    if hasattr(parameter, "to_local"):
        from torch.distributed.tensor import distribute_tensor

        shaped, mesh = whole.view(parameter.shape), parameter.device_mesh
        part = distribute_tensor(shaped.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
        return part.to_local()
    if hasattr(parameter, "ds_tensor"):
        return zero3.shard_like(whole, parameter)
    return whole.view(parameter.shape)


def _is_zero(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat") or hasattr(optimizer, "single_partition_of_fp32_groups")
