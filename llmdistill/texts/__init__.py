"""Sequences and where they come from: prompts, completions, pairs. The only place with positions."""

from llmdistill.texts.rollout import (
    Prompt,
    Reading,
    Rollout,
    Sampling,
    collate,
    position_ids,
    predicting_rows,
    request_seed,
    span,
)

__all__ = [
    "Prompt",
    "Reading",
    "Rollout",
    "Sampling",
    "collate",
    "position_ids",
    "predicting_rows",
    "request_seed",
    "span",
]
