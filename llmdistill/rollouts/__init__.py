"""Where sequences come from: the Rollout type and the engines that sample from the student."""

from llmdistill.rollouts.engine import RolloutEngine, request_seed
from llmdistill.rollouts.rollout import Prompt, Rollout, Sampling, collate, position_ids, predicting_rows, span

__all__ = [
    "Prompt",
    "Rollout",
    "RolloutEngine",
    "Sampling",
    "collate",
    "position_ids",
    "predicting_rows",
    "request_seed",
    "span",
]
