"""How far generation is: samples, tokens a second, time left, cost, and what was right so far."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console

from llmdistill.datagen.asking import Desk

EVERY_S = 5.0  # between two lines


class Progress:
    """Prints a line on standard error now and then. A context manager, which ends it with a line.

    Args:
        desk: whose calls are counted.
        shown: whether anything is printed.
        total: samples there will be, where that is known.
    """

    def __init__(self, desk: Desk, *, shown: bool, total: int = 0) -> None:
        self.desk, self.shown, self.total = desk, shown, total
        self.samples = 0
        self.verdicts = Counter[bool | None]()
        self._began = self._last = time.monotonic()
        self._console = Console(stderr=True, highlight=False, markup=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.shown and self.samples:
            self._console.print(self.line())

    def note(self, text: str) -> None:
        """A line of its own."""
        if self.shown:
            self._console.print(text)

    def judged(self, verdict: Mapping[str, Any]) -> None:
        self.verdicts[verdict["passed"]] += 1

    def show(self, samples: int) -> None:
        """So many samples are finished."""
        self.samples = samples
        now = time.monotonic()
        if self.shown and now - self._last >= EVERY_S:
            self._last = now
            self._console.print(self.line())

    def line(self) -> str:
        """For the terminal."""
        asked, seconds = self.desk.asked, max(time.monotonic() - self._began, 1e-9)
        told = [f"{self.samples:,} samples", f"{asked.calls:,} calls ({asked.kept:,} more were there)"]
        told.append(f"{asked.tokens / seconds:,.0f} tokens/s")
        if self.total > self.samples > 0:
            left = seconds * (self.total - self.samples) / self.samples
            told.append(f"{left / 60:.0f} min left")
        if self.desk.purse.spent:
            told.append(f"cost {self.desk.purse.spent:.4g}")
        if judged := self.verdicts[True] + self.verdicts[False]:
            told.append(f"{self.verdicts[True] / judged:.0%} right")
        if asked.refused:
            told.append(f"{asked.refused:,} refused")
        return ", ".join(told)
