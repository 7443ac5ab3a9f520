"""The engine's side of vLLM's weight-transfer API, in a worker of a service: it joins a trainer and takes weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from llmdistill.compat.patching import patched
from llmdistill.compat.vllm_gloo import GLOO, register
from llmdistill.compat.vllm_senders import from_json


def register_for(backend: str) -> None:
    """Makes a backend of ours known in this process."""
    if backend == GLOO:
        register()


def join(worker: Any, init: dict[str, Any], replica: int) -> None:
    """Joins the group of a trainer, out of an earlier one.

    Args:
        init: of vLLM's backend.
        replica: of several that join; vLLM numbers its workers by it.
    """
    worker.shutdown_weight_transfer_engine()
    parallel = worker.weight_transfer_engine.parallel_config
    with patched(parallel, "data_parallel_index", replica):
        worker.init_weight_transfer_engine(init)


def receive(worker: Any, update: dict[str, Any], seen: Callable[[str, Tensor], None]) -> None:
    """Loads a set of weights as the trainer sends it; ``seen`` is told of every tensor that came."""
    if "ipc_handles" in update:
        update = {**update, "ipc_handles": from_json(update["ipc_handles"])}
    model = worker.weight_transfer_engine.model
    load = model.load_weights

    def told(pairs: Iterable[tuple[str, Tensor]]) -> Any:
        def each() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in pairs:
                seen(name, tensor)
                yield name, tensor

        return load(each())

    worker.start_weight_update()
    with patched(model, "load_weights", told):
        worker.update_weights(update)
    worker.finish_weight_update()
