"""A stage of ``llmdistill.redi``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from llmdistill.methods.redi_config import REDIConfig
from llmdistill.recipe.command_line import Recipe
from llmdistill.record.run_folder import RunFolder
from llmdistill.texts.pair import Pair


@dataclass
class Stage:
    """What a stage's trainer is made of."""

    recipe: Recipe
    folder: RunFolder
    model: Any
    tokenizer: Any
    heldout: list[Pair]

    @property
    def args(self) -> REDIConfig:
        return cast(REDIConfig, self.recipe.args)
