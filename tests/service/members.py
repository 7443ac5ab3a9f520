"""``serve`` with several processes that have a transformers model each instead of one engine: what starts them, hands
them connections and watches them is the service's own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess

from llmdistill.compat.vllm_clients import Seat
from llmdistill.service.processes import run
from llmdistill.service.serve import ServeConfig, parsed


class OneEach:
    def __init__(self, config: ServeConfig, start: Callable[[Seat], BaseProcess]) -> None:
        count = config.api_processes
        self.askers = [start(Seat(None, {}, i, count)) for i in range(count)]
        self.cores: list[BaseProcess] = []

    def close(self) -> None:
        for process in self.askers:
            process.kill()
            process.join()


if __name__ == "__main__":
    raise SystemExit(run(parsed(sys.argv[2:]), None, OneEach))
