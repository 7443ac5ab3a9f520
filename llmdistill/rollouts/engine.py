"""The interface of a student rollout engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn

from llmdistill.texts.rollout import Prompt, Rollout, Sampling

Hear = Callable[[Rollout, Sequence[Prompt]], None]  # of finished sequences, each with its prompt


class RolloutEngine(Protocol):
    """Samples completions from the current student."""

    def sync(self, model: nn.Module, policy_version: int) -> None:
        """Makes the engine sample from the weights of ``model`` (unwrapped) from now on."""
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        """``samples_per_prompt`` completions of every prompt, samples of one prompt adjacent: [B * n] sequences."""
        ...

    def close(self) -> None:
        """Frees what the engine holds. The engine is not used afterwards."""
        ...


@runtime_checkable
class LaterEngine(Protocol):
    """An engine elsewhere, which samples from weights of some steps ago while the student is trained."""

    def snapshot(self, model: nn.Module, policy_version: int) -> Any:
        """The weights of ``model`` as they are now; between steps, on every rank."""
        ...

    def install(self, snapshot: Any) -> None:
        """Makes the engine sample from a snapshot from now on; beside a step, on every rank."""
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, hear: Hear | None = None) -> Rollout:
        """As :meth:`RolloutEngine.generate`; ``hear`` is told of sequences as soon as they are finished."""
        ...
