"""A service whose engine costs nothing but time: so many tokens a second, as many at one time as its cache holds.

``python -m tests.service.metered serve --model M ...``: the command, with that engine in place of the real one.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

from llmdistill.service import command, serve
from llmdistill.service.engine import Done, Engine, GenerateJob, Sample, ScoreJob
from llmdistill.teachers.base import TeacherInfo
from llmdistill.wire.blocks import ScoreBlock

RATE, CAPACITY = (int(os.environ.get(name, "0")) for name in ("METERED_RATE", "METERED_CAPACITY"))


class Metered:
    """Implements :class:`~llmdistill.service.engine.Engine`: one meter, which sequences pass one after another."""

    kind, dtype, chosen_ids, partial_weights = "hf", "float32", False, False
    transfer, workers = "", 1
    max_top_k, max_model_len, weights_bytes = 8, 4096, 0
    capacity_tokens: int | None = CAPACITY

    def __init__(self, model: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.adapters: dict[str, str] = {}
        self.free_at = 0.0
        self.info = TeacherInfo("metered", "0" * 16, "t" * 16, 264, (1,), 4096, None)

    async def start(self) -> None: ...

    async def check(self) -> None: ...

    async def close(self) -> None: ...

    async def score(self, jobs: Sequence[ScoreJob], done: Done | None = None) -> list[ScoreBlock]:
        await self._pass(sum(job.stop for job in jobs))
        blocks = [self._block(job) for job in jobs]
        if done is not None:
            for i, block in enumerate(blocks):
                done(i, block)
        return blocks

    async def generate(self, job: GenerateJob) -> list[list[Sample]]:
        raise NotImplementedError

    async def load_weights(self, folder: Path, partial: bool) -> None: ...

    def check_adapter(self, folder: Path) -> None: ...

    async def add_adapter(self, name: str, folder: Path) -> None: ...

    async def remove_adapter(self, name: str) -> None: ...

    def _block(self, job: ScoreJob) -> ScoreBlock:
        n = job.stop - job.start
        ids = torch.zeros(n, job.top_k, dtype=torch.int32)
        return job.block(self.info, (torch.zeros(n), ids, torch.full((n, job.top_k), -1.0)))

    async def _pass(self, tokens: int) -> None:
        loop = asyncio.get_running_loop()
        self.free_at = max(self.free_at, loop.time()) + tokens / RATE
        await asyncio.sleep(self.free_at - loop.time())


def load(config: serve.ServeConfig) -> Engine:
    return Metered(config.model)


if __name__ == "__main__":
    serve.load = load
    sys.exit(command.main(sys.argv[2:]))
