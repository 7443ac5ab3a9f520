"""The trainer's side of vLLM's weight-transfer API: the student's weights to the engines of services, without HTTP.

vLLM's own senders do the work (`vllm.distributed.weight_transfer`, as 0.32 has it): ``nccl``, one broadcast from the
first rank to all workers of all replicas, sharded weights gathered a tensor at a time by all ranks; ``nccl_m2n``, where
every rank sends its own shards (it needs NVIDIA's nccl-extensions); ``ipc``, handles of memory on GPUs that trainer and
engine share. ``gloo`` is ours (:mod:`llmdistill.compat.vllm_gloo`), for CPUs. What each is told of, and by whom, is the
same for all.

Run here: gloo, against real engines. Not run: nccl, nccl_m2n and ipc, which need CUDA; tests hold what is called
against the signatures of the installed vLLM.
"""

from __future__ import annotations

import base64
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmdistill.compat import fsdp
from llmdistill.compat.vllm import imported_beside_training
from llmdistill.errors import UserError

BACKENDS = {"nccl": "nccl", "ipc": "ipc", "nccl_m2n": "nccl_m2n", "gloo": "llmdistill_gloo"}  # our word: vLLM's
Pairs = Callable[[], Iterator[tuple[str, Tensor]]]


class Client(Protocol):
    """What vLLM's senders tell the engines (its ``VLLMWeightSyncClient``)."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Any) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


def make_sender(
    backend: str,
    pairs: Pairs,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    model: nn.Module,
    client: Client,
    *,
    rank: int,
    ranks: int,
    workers: tuple[int, int],
    address: str,
) -> Any:
    """vLLM's sender for this rank, when the engines have joined it. Every rank of the launch makes one at one time.

    Args:
        backend: of :data:`BACKENDS`.
        pairs: the weights, named as in a checkpoint, from the start; gathering them takes every rank.
        shapes: what ``pairs`` yields, in its order.
        model: the student, of which nccl_m2n reads the shards.
        workers: replicas, and the workers of each.
        address: of this machine, as the engines see it.

    Raises:
        UserError: vLLM is missing, or the backend cannot send this student.
    """
    with imported_beside_training():
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        count, port = workers[0] * workers[1], free_port(address) if rank == 0 else 0
        rendezvous: dict[str, Any] = {"rank": rank, "master_address": address, "master_port": port}
        info: Any
        if backend == "gloo":
            from llmdistill.compat.vllm_gloo import trainer_info

            info = trainer_info(rank, address, port, 1 + count)
        elif backend == "nccl":
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            info = NCCLTrainerInitInfo(**rendezvous, world_size=1 + count)
        elif backend == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            info = IPCTrainerInitInfo(rank=rank)  # not packed: a push is one message
        else:
            from vllm.distributed.weight_transfer.m2n_trainer import M2NTrainerInitInfo

            rendezvous["master_port"] = from_first(port)
            mesh: dict[str, Any] = {"num_trainer_ranks": ranks, "dst_mesh_dims": workers}
            info = M2NTrainerInitInfo(**rendezvous, world_size=ranks + count, **mesh)
        source = shards(model, shapes, ranks) if backend == "nccl_m2n" else whole_tensors(pairs, shapes)
        return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)


def whole_tensors(pairs: Pairs, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> Any:
    """A source of vLLM's that yields ``pairs``. A round that was broken off is ended by :func:`gathered_to_the_end`, or
    the other ranks would wait for this one."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):
        under_way: Iterator[tuple[str, Tensor]] | None = None

        def metadata(self) -> list[ParamMeta]:
            self.under_way = None  # asked once a round, before the tensors
            return [ParamMeta(name, dtype, shape) for name, (dtype, shape) in shapes.items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            self.under_way = pairs()
            yield from map(tuple, self.under_way)  # type: ignore[arg-type]  # a map: closing it leaves the pairs open

    return Source()


def gathered_to_the_end(sender: Any) -> None:
    """The rest of a round that was broken off, for the other ranks, which gather with this one."""
    source = sender.source
    if hasattr(source, "under_way"):
        for _ in source if source.under_way is None else source.under_way:
            pass


def shards(model: Any, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], ranks: int) -> Any:
    """A source of vLLM's that yields this rank's parts.

    Raises:
        UserError: the checkpoint's weights are not the model's own parameters one by one.
    """
    from vllm.distributed.weight_transfer.m2n_common import M2NParamMeta
    from vllm.distributed.weight_transfer.m2n_source import DTensorModuleSource, placements_from_tensor

    parameters = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name in shapes}
    if missing := sorted(set(shapes) - set(parameters)):
        raise UserError(
            f"rollouts.transfer is nccl_m2n, which sends parameters as they are sharded, and {missing[0]!r} of the "
            f"checkpoint is none of the student's ({len(missing)} like it: adapters, fused experts). "
            "Fix: --rollouts.transfer nccl."
        )
    parameters = {name: parameters[name] for name in shapes}  # in its order

    class Shards(DTensorModuleSource):
        def __init__(self) -> None:
            super().__init__(model, ranks)

        def metadata(self) -> list[Any]:
            found = ((n, *shapes[n], placements_from_tensor(p)) for n, p in parameters.items())
            return [M2NParamMeta(*one) for one in found]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            for name, parameter in parameters.items():
                part: Any = parameter.detach()
                yield name, (part.to_local() if fsdp.is_shard(part) else part).to(shapes[name][0])

    return Shards()


def from_first(port: int) -> int:
    """The number that the first rank has, on all of them."""
    if not torch.distributed.is_initialized():
        return port
    told = [port]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]


def free_port(address: str) -> int:
    """One that nobody listens on now."""
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as found:
        return int(found.getsockname()[1])


# ---------------------------------------------------------------- handles of memory on GPUs, in JSON

_CLASSES: dict[str, Any] = {
    "Tensor": Tensor,
    "Parameter": nn.Parameter,
    "UntypedStorage": torch.UntypedStorage,
    "TypedStorage": torch.storage.TypedStorage,
}


def in_json(value: Any) -> Any:
    """Handles of CUDA memory, as torch makes them, in what JSON can hold: vLLM's own client would pickle them."""
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, type):
        return {"class": next(name for name, cls in _CLASSES.items() if cls is value)}
    if isinstance(value, tuple):
        return {"tuple": [in_json(one) for one in value]}
    if isinstance(value, list):
        return [in_json(one) for one in value]
    if isinstance(value, dict):
        return {"dict": {name: in_json(one) for name, one in value.items()}}
    return value


def from_json(value: Any) -> Any:
    """What :func:`in_json` was given.

    Raises:
        ValueError: it is nothing that it makes.
    """
    if isinstance(value, list):
        return [from_json(one) for one in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError(f"{sorted(value)[:5]} is no value of a handle")
    ((kind, held),) = value.items()
    if kind == "bytes" and isinstance(held, str):
        return base64.b64decode(held, validate=True)
    if kind == "dtype" and isinstance(getattr(torch, str(held), None), torch.dtype):
        return getattr(torch, held)
    if kind == "class" and held in _CLASSES:
        return _CLASSES[held]
    if kind == "tuple" and isinstance(held, list):
        return tuple(from_json(one) for one in held)
    if kind == "dict" and isinstance(held, dict):
        return {name: from_json(one) for name, one in held.items()}
    raise ValueError(f"{kind!r} is no value of a handle")
