"""A backend of ours in vLLM's weight-transfer API: one broadcast over gloo from the trainer to all replicas' workers.

It is what vLLM's nccl backend is on GPUs, with the same handshake and the same lifecycle, for engines on a CPU: every
step of the way but NCCL itself runs here. Ranks: the trainer that sends is 0, the workers follow.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from llmdistill.compat.vllm_plain import pack_tied_heads, without_a_head_it_lacks

GLOO = "llmdistill_gloo"
NAP_S = 0.0005
JOIN_S, TENSOR_S = 600.0, 60.0  # until a side gives up that waits for the other to join, and for one tensor


def register() -> None:
    """In vLLM's registries, of this process."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

    if GLOO not in WeightTransferEngineFactory._registry:
        worker, trainer = _classes()
        WeightTransferEngineFactory.register_engine(GLOO, worker)
        WeightTransferTrainerFactory.register_engine(GLOO, trainer)


def trainer_info(rank: int, address: str, port: int, world: int) -> Any:
    """What vLLM's factory of senders is given."""
    register()
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    cls: Any = WeightTransferTrainerFactory._registry[GLOO]()
    return cls.init_info_cls(rank=rank, master_address=address, master_port=port, world_size=world)


def _group(address: str, port: int, rank: int, world: int) -> Any:
    """Not by torch's rendezvous, nor vLLM's, which goes by that: under torchrun it takes its own launch's store."""
    from torch.distributed.distributed_c10d import ProcessGroupGloo

    most = timedelta(seconds=JOIN_S)
    store = torch.distributed.TCPStore(address, port, world, rank == 0, timeout=most, wait_for_workers=False)
    return ProcessGroupGloo(torch.distributed.PrefixStore(GLOO, store), rank, world, timeout=most)


def _broadcast(group: Any, tensor: Tensor, over: Future[Any] | None = None) -> None:
    """From the sender to all; what ``over`` raises where it is done before, as when the other side will not take it."""
    options = torch.distributed.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    options.timeout = timedelta(seconds=TENSOR_S)
    work = group.broadcast([tensor], options)
    while over is not None and not work.is_completed():
        if over.done():
            over.result()
        time.sleep(NAP_S)
    work.wait()


def _bytes(tensor: Tensor) -> Tensor:
    """The storage of a contiguous tensor; gloo knows few dtypes."""
    return tensor.reshape(-1).view(torch.uint8)


def _classes() -> tuple[Any, Any]:
    """Made when they are asked for: their base classes are vLLM's."""
    from vllm.distributed.weight_transfer.base import (
        TrainerInitInfo,
        TrainerWeightTransferEngine,
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class Join(WeightTransferInitInfo):
        master_address: str
        master_port: int
        rank_offset: int
        world_size: int

    @dataclass
    class Update(WeightTransferUpdateInfo):
        names: list[str]
        dtype_names: list[str]
        shapes: list[list[int]]

    class Worker(WeightTransferEngine[Join, Update]):
        init_info_cls, update_info_cls = Join, Update
        group: Any = None

        def init_transfer_engine(self, init_info: Join) -> None:
            parallel = self.parallel_config
            rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
            self.group = _group(init_info.master_address, init_info.master_port, rank, init_info.world_size)

        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            self.receive_weights(self.parse_update_info(update_info))  # no device to wait for

        def receive_weights(self, update_info: Update) -> None:
            columns = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)

            def pairs() -> Iterator[tuple[str, Tensor]]:
                for name, dtype, shape in columns:
                    tensor = torch.empty(shape, dtype=getattr(torch, dtype))
                    _broadcast(self.group, _bytes(tensor))
                    yield name, tensor

            model: Any = self.model
            model.load_weights(without_a_head_it_lacks(model, pairs()))

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)
            pack_tied_heads(self.model)

        def shutdown(self) -> None:
            self.group = None

    @dataclass
    class Send(TrainerInitInfo):
        backend: ClassVar[str] = GLOO
        master_address: str
        master_port: int
        world_size: int

    class Trainer(TrainerWeightTransferEngine[Send]):
        init_info_cls = Send
        group: Any = None

        @classmethod
        def trainer_init(cls, init_info: Send, *, client: Any, source: Any = None) -> Self:
            made = cls(client=client, source=source, is_sender=init_info.is_sender)
            if made.is_sender:
                at = init_info.master_address, init_info.master_port
                join = Join(*at, rank_offset=1, world_size=init_info.world_size)
                with ThreadPoolExecutor(1) as thread:  # both sides wait for each other
                    joined = thread.submit(client.init_weight_transfer_engine, vars(join))
                    made.group = _group(*at, 0, init_info.world_size)
                    joined.result()
            return made

        def send_weights(self) -> None:
            assert self.source is not None
            if not self.is_sender:
                for _ in self.source:  # it gathers shards
                    pass
                return
            meta = self.source.metadata()
            dtypes = [str(m.dtype).removeprefix("torch.") for m in meta]
            update = {"names": [m.name for m in meta], "dtype_names": dtypes, "shapes": [list(m.shape) for m in meta]}
            self.client.start_weight_update()
            thread = ThreadPoolExecutor(1)
            try:
                received = thread.submit(self.client.update_weights, update)
                for _, tensor in self.source:
                    _broadcast(self.group, _bytes(tensor.contiguous()), received)
                received.result()
            finally:
                thread.shutdown(wait=False)
            self.client.finish_weight_update()

        def shutdown(self) -> None:
            self.group = None

    return Worker, Trainer
