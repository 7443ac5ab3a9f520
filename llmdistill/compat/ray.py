"""What Ray says by itself, in pages, where a line of ours is enough."""

from __future__ import annotations

from typing import Any


def quiet() -> None:
    """Before ``ray.init``: a node that dies prints no part of its log into this process's output."""
    from ray._private import worker

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    worker.print_to_stdstream = nothing
