"""A tokenised pair of completions of one prompt, and what tells it from others."""

from __future__ import annotations

from dataclasses import dataclass

from llmdistill.texts.facts import digest
from llmdistill.texts.rollout import Prompt


@dataclass(frozen=True)
class Pair:
    """A tokenised pair. ``rejected`` is empty in a positive: a chosen completion alone, for fine-tuning."""

    prompt: Prompt
    chosen: tuple[int, ...]
    rejected: tuple[int, ...] = ()
    cut: int = 0  # completions that max_completion_tokens shortened
    chosen_counts: tuple[bool, ...] = ()  # which tokens the loss trains on; empty: all
    rejected_counts: tuple[bool, ...] = ()

    @property
    def row(self) -> int:
        """Index in the dataset it was read from."""
        return self.prompt.row

    @property
    def num_tokens(self) -> int:
        """Of the longer of its two sequences."""
        return len(self.prompt.ids) + max(len(self.chosen), len(self.rejected))


SIDES = ("chosen", "rejected", "chosen_counts", "rejected_counts")


def whole(pair: Pair) -> int:
    """63 bits that tell one pair from another."""
    return digest([*pair.prompt.ids, -1, *pair.chosen, -1, *pair.rejected])
