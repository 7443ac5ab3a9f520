"""A trainer that remembers what it was trained on."""

from __future__ import annotations

from typing import Any

from llmdistill import OPDTrainer
from llmdistill.training.made import Made


class Kept(OPDTrainer):
    """Remembers the rounds that it was trained on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.kept: list[Made] = []
        super().__init__(*args, **kwargs)

    def made(self, *args: Any) -> Made | None:
        made = super().made(*args)
        self.kept += [made] if made is not None else []
        return made
