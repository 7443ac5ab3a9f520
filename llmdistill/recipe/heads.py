"""The file of a recipe, where it is not there or was given to another front door than its head names."""

from __future__ import annotations

import difflib
import itertools
import re
from pathlib import Path

from llmdistill.errors import UserError, in_this_folder


def no_recipe(path: Path) -> UserError:
    """What is said of a recipe that is not there, with the name in its folder that is nearest."""
    there = [str(file) for file in sorted(path.parent.glob("*.yaml"))]
    near = difflib.get_close_matches(str(path), there, n=1)
    fix = f"--config {near[0]}" if near else "recipes/ of the source has the ready-made ones"
    return UserError(f"--config {path}: there is no such file{in_this_folder(path)}. Fix: {fix}.")


def launched(recipe: str) -> str:
    """The front door that the head of a recipe names last, which knows its keys; as the end of a message."""
    head = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), recipe.splitlines()))
    doors = re.findall(r"accelerate launch.*? -m (llmdistill\.\w+)", head)
    return f". Its head says: accelerate launch -m {doors[-1]}" if doors else ""
