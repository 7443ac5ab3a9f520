"""vLLM's weight-transfer API (`vllm.distributed.weight_transfer`), for an engine in the process that trains.

Of vLLM's own backends nccl and ipc carry weights to an engine in another process. In one process neither can: a CUDA
IPC handle cannot be opened where it was made, and a device is no peer of its own in NCCL. Nor is there anything to
carry: ``PROCESS``, a backend of ours in vLLM's registry, hands over the tensors themselves, a bucket at a time, and
vLLM loads them layer by layer into the memory that its captured graphs read. With a sharded student a bucket bounds
what is whole at one time; of a tensor parallel engine each rank's worker takes its part of every tensor.

Run here on a CPU engine, where it works too; the push of `vllm_weights` is the faster one there. Not run: a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from llmdistill.compat.vllm_plain import cast_for, keeping_plain_weights, pack_tied_heads, without_a_head_it_lacks

PROCESS = "llmdistill_process"
BUCKET_BYTES = 1 << 29


def can_transfer() -> bool:
    """Whether the installed vLLM has the API, as 0.32 has it."""
    return importlib.util.find_spec("vllm.distributed.weight_transfer.factory") is not None


def transfer_options() -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for an engine that takes weights by :func:`transfer`."""
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if PROCESS not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(PROCESS, _engine_class())
    return {"weight_transfer_config": WeightTransferConfig(backend=PROCESS)}


def takes_transfer(llm: Any) -> bool:
    """Whether it was loaded with :func:`transfer_options`."""
    config = getattr(llm.llm_engine.vllm_config, "weight_transfer_config", None)
    return config is not None and config.backend == PROCESS


def transfer(llm: Any, pairs: Iterable[tuple[str, Tensor]], bucket_bytes: int = BUCKET_BYTES) -> None:
    """A complete set of weights, named as in a checkpoint; whoever calls forgets the prefix cache of the old ones.

    Args:
        bucket_bytes: of the tensors that are handed over at one time; one larger than that comes alone.
    """
    llm.start_weight_update()
    for bucket in buckets(pairs, bucket_bytes):
        llm.update_weights({"update_info": {"pairs": bucket}})
    llm.finish_weight_update()


def buckets(pairs: Iterable[tuple[str, Tensor]], most: int) -> Iterator[list[tuple[str, Tensor]]]:
    held, size = list[tuple[str, Tensor]](), 0
    for name, tensor in pairs:
        if held and size + tensor.nbytes > most:
            yield held
            held, size = [], 0
        held.append((name, tensor))
        size += tensor.nbytes
    if held:
        yield held


def _engine_class() -> Any:
    """Made when it is asked for: its base class is vLLM's."""
    from dataclasses import dataclass

    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class Pairs(WeightTransferUpdateInfo):
        pairs: list[tuple[str, Tensor]]

    class InProcess(WeightTransferEngine[WeightTransferInitInfo, Pairs]):
        init_info_cls = WeightTransferInitInfo
        update_info_cls = Pairs

        def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
            """Nothing to agree on."""

        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            # Trainer and engine share the thread and its stream: no wait for the device is needed, as theirs have.
            self.receive_weights(self.parse_update_info(update_info))

        def receive_weights(self, update_info: Pairs) -> None:
            with keeping_plain_weights():
                model: Any = self.model
                pairs = cast_for(self.model_config.dtype, update_info.pairs)  # type: ignore[arg-type]
                model.load_weights(without_a_head_it_lacks(model, pairs))

        def finish_weight_update(self) -> None:
            with keeping_plain_weights():
                finalize_layerwise_reload(self.model, self.model_config)
                pack_tied_heads(self.model)

        def shutdown(self) -> None:
            """Nothing is held."""

    return InProcess
