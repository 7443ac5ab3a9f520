"""What the service asks of an engine. Engines know nothing of HTTP; the service knows nothing of models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmdistill.teachers.base import TeacherInfo
from llmdistill.texts import Sampling
from llmdistill.texts.rollout import Finish
from llmdistill.wire.blocks import BlockHeader, ScoreBlock
from llmdistill.wire.hidden import Form, HeadWeights, HiddenBlock, HiddenHeader
from llmdistill.wire.listing import columns, support_of


@dataclass(frozen=True)
class ScoreJob:
    """One sequence: score its tokens ``start`` to ``stop - 1``."""

    ids: list[int]  # up to ``stop``: later tokens change nothing
    start: int
    stop: int
    top_k: int
    chosen: Tensor | None = None  # [stop - start, C] int64, -1 where a row has fewer
    hidden: Form | None = None  # hidden states in this form instead of log-probs

    def block(self, info: TeacherInfo, rows: tuple[Tensor, Tensor, Tensor] | None = None) -> ScoreBlock:
        """The evidence as a block; None where there is nothing to score."""
        width = columns(self.top_k, self.chosen, info.vocab_size)
        if rows is None:
            rows = (torch.zeros(0), torch.zeros(0, width, dtype=torch.int32), torch.zeros(0, width))
        header = BlockHeader(
            info.fingerprint, info.tokenizer, width, info.vocab_size, support=support_of(self.top_k, self.chosen)
        )
        return ScoreBlock(slice(self.start, self.stop), *rows, header)

    def states(self, info: TeacherInfo, head: HeadWeights, hidden_nH: Tensor | None = None) -> HiddenBlock:
        """Hidden states as a block; None where there is nothing to score."""
        assert self.hidden is not None
        rows = torch.zeros(0, head.weight.shape[1]) if hidden_nH is None else hidden_nH
        header = HiddenHeader(
            info.fingerprint, info.tokenizer, head.fingerprint, rows.shape[1], head.weight.shape[0], self.hidden
        )
        return HiddenBlock(slice(self.start, self.stop), rows, header)


@dataclass(frozen=True)
class GenerateJob:
    """``samples_per_prompt`` completions of every prompt; ``rows`` number the prompts for their seeds."""

    prompts: list[list[int]]
    rows: list[int]
    sampling: Sampling
    eos_ids: tuple[int, ...]
    adapter: str | None = None


@dataclass(frozen=True)
class Sample:
    """One completion, the ending eos included."""

    ids: list[int]
    logprobs: list[float]  # of the distribution drawn from
    finish: Finish


Told = Callable[[int, Sequence[int], Sequence[float]], None]  # number of a sample, its ids and log-probs so far
Evidence = ScoreBlock | HiddenBlock
Done = Callable[[int, Evidence], None]


class EngineDead(RuntimeError):
    """The engine will not answer any more; the process has to be started again."""


class Engine(Protocol):
    """A model that scores, generates and takes new weights. All calls but the loading ones may overlap."""

    kind: str  # "hf" or "vllm"
    dtype: str
    chosen_ids: bool  # whether jobs may choose ids
    max_top_k: int
    max_model_len: int
    capacity_tokens: int | None  # that it works at together; None: no bound of its own. Known once it is started
    adapters: dict[str, str]  # name -> folder
    tokenizer: PreTrainedTokenizerBase

    weights_bytes: int  # of all weights in float32
    partial_weights: bool  # whether a push may hold only the weights that changed; known once it is started
    transfer: str  # how a trainer may send weights to the engine itself, as in rollouts.transfer; "": not
    workers: int  # processes that such a sender reaches

    @property
    def info(self) -> TeacherInfo: ...

    async def start(self) -> None:
        """What needs a running loop, before the first call."""
        ...

    async def check(self) -> None:
        """Raises EngineDead when the engine has died while nobody asked. Called every few seconds."""
        ...

    async def score(self, jobs: Sequence[ScoreJob], done: Done | None = None) -> list[Evidence]:
        """One block per job; ``done`` is told of each as soon as it is there, on the loop."""
        ...

    def head(self) -> HeadWeights | None:
        """The output head that goes with hidden states; None where there are none. May read a file."""
        ...

    async def generate(self, job: GenerateJob, told: Told | None = None) -> list[list[Sample]]:
        """Samples of every prompt; ``told`` hears of each sample while it grows, on the loop."""
        ...

    async def load_weights(self, folder: Path, partial: bool) -> None:
        """Weights from the safetensors files of ``folder``. Nothing else is running meanwhile.

        Raises:
            ValueError: they do not fit the model; the old ones are still in place.
            EngineDead: they are half loaded.
        """
        ...

    async def join(self, init: dict[str, Any], replica: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Joins a trainer that will send weights of these shapes.

        Raises:
            ValueError: they do not fit the model, or vLLM refuses the trainer.
        """
        ...

    async def receive(self, update: dict[str, Any]) -> None:
        """Loads what the trainer sends meanwhile. Nothing else is running.

        Raises:
            EngineDead: it did not come whole.
        """
        ...

    def check_adapter(self, folder: Path) -> None:
        """Raises ValueError for what is no adapter of this model."""
        ...

    async def add_adapter(self, name: str, folder: Path) -> None:
        """One that was checked. Its folder stays until it is removed, or another takes its name, whose requests are
        answered before this returns."""
        ...

    async def remove_adapter(self, name: str) -> None:
        """No new request gets it; returns when those that had it are answered."""
        ...

    async def close(self) -> None: ...


@asynccontextmanager
async def cancelling() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group that ends with its first error, the other tasks cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
