"""The interface of a student rollout engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from llmdistill.texts.rollout import Prompt, Rollout, Sampling


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
