"""A tokenised pair of completions of one prompt, and what tells it from others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llmdistill.texts.facts import digest
from llmdistill.texts.rollout import Prompt

RejectedTokens = Literal["all", "after_divergence", "first_divergent"]


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

    def penalised(self, tokens: RejectedTokens) -> tuple[bool, ...]:
        """Which tokens of the rejected side the loss pushes down, those that do not count left out."""
        given = self.rejected_counts or (True,) * len(self.rejected)
        if tokens == "all":
            return given
        shared = common_prefix(self.chosen, self.rejected)
        end = len(self.rejected) if tokens == "after_divergence" else shared + 1
        return tuple(counts and shared <= i < end for i, counts in enumerate(given))


SIDES = ("chosen", "rejected", "chosen_counts", "rejected_counts")


def whole(pair: Pair) -> int:
    """63 bits that tell one pair from another."""
    return digest([*pair.prompt.ids, -1, *pair.chosen, -1, *pair.rejected])


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
