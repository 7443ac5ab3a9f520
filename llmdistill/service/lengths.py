"""How long completions are, as they come: what a request for some is expected to take of the engine."""

from __future__ import annotations

import math
from collections.abc import Iterable

FIRST = 512  # tokens, until something was drawn
FADING = 0.9  # with every request


class Lengths:
    """A fading mean of the lengths drawn."""

    def __init__(self) -> None:
        self.mean = float(FIRST)

    def expected(self, most: int) -> int:
        """Tokens of a completion that may have ``most``."""
        return min(most, math.ceil(self.mean))

    def drawn(self, lengths: Iterable[int]) -> None:
        if found := list(lengths):
            self.mean = FADING * self.mean + (1 - FADING) * sum(found) / len(found)
