"""Data: traces that are verified, paired, curated and clean. Paths in, a manifest out.

from llmdistill.datagen import generate, verify, build_pairs, curate, decontaminate
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# public name -> its module in this package, which has another name: importing it would hide the step behind itself.
# Each is a step, ``step(src, out, **settings) -> Manifest``.
_HOME: dict[str, str] = {
    "build_pairs": "pairs",
    "card": "cards",
    "compare_teachers": "comparison",
    "curate": "curation",
    "decontaminate": "decontamination",
    "export": "exports",
    "generate": "generation",
    "score": "scores",
    "split": "splits",
    "train": "training",
    "verify": "verification",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"llmdistill.datagen.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
