"""What torch's FSDP2 and accelerate do not offer: whole weights for a while, and sharding where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_shard(parameter: Any) -> bool:
    """Whether a weight is, at the moment, this process's part of one."""
    return hasattr(parameter, "to_local")


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules of a model whose weights FSDP2 puts together as they run, outermost first."""
    return [module for module in model.modules() if hasattr(module, "set_reshard_after_forward")]


def shard_again(model: nn.Module) -> None:
    """Lets go of weights that are still whole after a pass without a backward one: what is written to shards, or read
    of them, is all there is. No process waits for another."""
    for module in sharded_modules(model):
        module.reshard()


@contextmanager
def whole_for_passes(model: nn.Module) -> Iterator[None]:
    """All weights whole inside, so that processes may run as many forward passes as each likes. All enter together."""
    modules = sharded_modules(model)
    if modules:
        modules[0]._get_fsdp_state()._lazy_init()  # settles what the outermost one does after a pass
    groups = [group for module in modules for group in module._get_fsdp_state()._fsdp_param_groups]
    after = [group.post_forward_mesh_info for group in groups]
    try:
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
    finally:
        for group, mesh in zip(groups, after, strict=True):
            group.post_forward_mesh_info = mesh
        for module in modules:
            module.reshard()


@contextmanager
def whole_inside(module: nn.Module) -> Iterator[None]:
    """Copies of the whole weights of ``module`` stand in their places inside, to be read. All processes enter it."""
    put = list[tuple[Any, str, Any]]()
    try:
        for part in module.modules():
            for name, parameter in list(part._parameters.items()):
                if is_shard(parameter):
                    put.append((part, name, parameter))
                    part._parameters[name] = nn.Parameter(whole(parameter), requires_grad=False)
        yield
    finally:
        for part, name, parameter in put:
            part._parameters[name] = parameter


def whole(parameter: Any) -> Tensor:
    """All of a weight, put together of the parts of all processes, which all call it."""
    value: Tensor = parameter.detach()
    return value.full_tensor() if is_shard(value) else value  # type: ignore[attr-defined,no-any-return]


def shard_frozen(model: Any, device: torch.device, kept: Sequence[nn.Parameter]) -> None:
    """Shards a model that is only read over all processes: its layers, and what is around them.

    Args:
        device: where the parts are, and the layers that run.
        kept: weights that stay whole on every device.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    how: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True, "ignored_params": set(kept)}
    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, **how)
    fully_shard(model, **how)
    for parameter in kept:
        parameter.data = parameter.data.to(device)


def prepare(trainer: Any, asked: bool) -> None:
    """Once a trainer's ``accelerator`` is made, and the launch file or ``train.fsdp`` asks for FSDP: checkpoints are in
    parts, and the student is sharded over gloo too.

    accelerate looks at its configuration on GPUs only, and otherwise leaves every process a whole student, in silence.
    What it does when it does look needs none.
    """
    if not asked or trainer.args.world_size == 1:
        return
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if not trainer.is_fsdp_enabled:
        state = AcceleratorState._shared_state
        state["distributed_type"] = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state["fsdp_plugin"] = FullyShardedDataParallelPlugin(**(trainer.args.fsdp_plugin_args or {}))
        trainer.is_fsdp_enabled = True
    trainer.accelerator.state.fsdp_plugin.set_state_dict_type("SHARDED_STATE_DICT")
