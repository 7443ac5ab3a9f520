"""What ``data.train`` and ``data.heldout`` may be."""

from __future__ import annotations

import os
from typing import Any

import yaml

from llmdistill.errors import UserError
from llmdistill.recipe.settings import require


def sources(given: Any, setting: str) -> Any:
    """Files of a recipe: a name, a list of names, or of held-out sets a mapping; on the command line as YAML."""
    if isinstance(given, str) and given.startswith(("[", "{")):
        try:
            given = yaml.safe_load(given)
        except yaml.YAMLError:
            raise UserError(f"{setting} is {given!r}, which is no list. Fix: --{setting} '[A, B]'.") from None
    entries = given.values() if isinstance(given, dict) else [given]
    for entry in entries:
        names = entry if isinstance(entry, list | tuple) else [entry]
        good = bool(names) and all(isinstance(name, str | os.PathLike) for name in names)
        require(good, setting, given, "a file or dataset, or a list of files", f"--{setting} FILE")
    if isinstance(given, dict):
        return {str(name): sources(entry, setting) for name, entry in given.items()}
    return [os.fspath(name) for name in given] if isinstance(given, list | tuple) else os.fspath(given)
