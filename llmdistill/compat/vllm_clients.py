"""Several processes that ask one vLLM engine, as ``vllm serve --api-server-count`` has them.

The process that starts the engine asks it nothing: it binds the sockets of those that will (:class:`Seat`), starts them
and the engine, and watches both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

from llmdistill.compat.vllm import refusals_named
from llmdistill.compat.vllm_arrays import keep_arrays


@dataclass(frozen=True)
class Seat:
    """What one of the processes needs; it travels to a process that ``multiprocessing`` spawns."""

    config: Any  # vLLM's, of the engine that all of them ask
    addresses: dict[str, Any]
    index: int
    count: int


class SharedEngine:
    """An engine and the processes that ask it, started.

    Args:
        arguments: from :func:`llmdistill.compat.vllm.async_arguments`.
        start: starts the process of a seat, whose sockets are closed here once it returns.

    Raises:
        UserError: vLLM refuses the model, or one of the processes ended while it was loaded.
    """

    def __init__(self, arguments: Any, count: int, start: Callable[[Seat], BaseProcess]) -> None:
        from vllm.v1.engine.utils import bind_engine_zmq_listeners, launch_core_engines
        from vllm.v1.executor import Executor

        self.askers: list[BaseProcess] = []
        self._manager: Any = None
        self._ends: Any = None
        arguments._api_process_count, arguments._api_process_rank = count, -1
        try:
            with refusals_named(arguments.model):
                config = arguments.create_engine_config()
                # whose end would take the sockets' names away, which the engine is still to connect to
                ends = self._ends = bind_engine_zmq_listeners(config, count)
                with launch_core_engines(config, Executor.get_class(config), True, ends.addresses) as launched:
                    self._manager = launched.engine_manager
                    for i, (into, out) in enumerate(zip(ends.inputs, ends.outputs, strict=True)):
                        addresses: dict[str, Any] = {"input_address": into.address, "output_address": out.address}
                        addresses |= {"input_listener": into.socket, "output_listener": out.socket}
                        self.askers.append(start(Seat(config, addresses, i, count)))
                        into.close()
                        out.close()
                    launched.watched_frontend_processes = self.askers
        except BaseException:
            self.close()
            raise

    @property
    def cores(self) -> list[BaseProcess]:
        """The engine's processes."""
        return list(self._manager.processes)

    def close(self) -> None:
        """Ends whatever of it runs."""
        for process in self.askers:
            if process.is_alive():
                process.kill()
        if self._manager is not None:
            self._manager.shutdown()
        if self._ends is not None:
            self._ends.cleanup()


def seated(seat: Seat) -> Any:
    """The ``AsyncLLM`` of one of the processes, once the engine is up."""
    from vllm.v1.engine.async_llm import AsyncLLM

    keep_arrays()
    seat.config.parallel_config._api_process_rank = seat.index
    return AsyncLLM.from_vllm_config(
        seat.config, client_addresses=seat.addresses, client_count=seat.count, client_index=seat.index
    )
