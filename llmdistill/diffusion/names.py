"""Functions by name: orders, selections, schedules and losses are what their modules define, without a registry."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from llmdistill.errors import UserError


def named(module: ModuleType, name: str, setting: str) -> Any:
    """What ``module`` defines as public ``name``.

    Raises:
        UserError: there is no such name; the message lists what there is.
    """
    known = sorted(module.__all__)
    if name not in known:
        raise UserError(f"{setting} is {name!r}; there are {', '.join(known)}. Fix: --{setting} {known[0]}.")
    return getattr(module, name)
