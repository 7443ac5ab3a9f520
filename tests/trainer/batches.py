"""Micro-batches of hand-made sequences, as a trainer would make them of a round."""

from __future__ import annotations

from typing import Any

from llmdistill import DistillationTrainer
from llmdistill.composition.batch import MicroBatch, Text
from llmdistill.texts import Prompt, Rollout
from llmdistill.texts.pair import Pair


def prompts_of(rollout: Rollout) -> list[Prompt]:
    """What stands before the first counted token of every sequence."""
    found = []
    for ids, real, counted in zip(rollout.input_ids, rollout.attention_mask, rollout.completion_mask, strict=True):
        at = counted.nonzero()
        end = int(at[0]) if len(at) else len(ids)
        found.append(Prompt(ids[:end][real[:end]].tolist(), ""))
    return found


def micro_batch(
    t: DistillationTrainer,
    rollout: Rollout,
    prompts: list[Prompt] | None = None,
    *,
    total: float | None = None,
    teacher: Any = None,
    **known: Any,
) -> MicroBatch:
    """All of ``rollout`` as one micro-batch; ``teacher`` in the place of every judge, ``total`` as the denominator.

    known: rewards and advantages, one per sequence.
    """
    judges = None if teacher is None else dict.fromkeys(t.judges, teacher)
    (batch,) = t.batches({"main": Text(rollout, prompts or prompts_of(rollout), **known)}, 1, judges)
    for s in batch.slices if total is not None else ():
        s.total = total
    return batch


def pair_batch(t: DistillationTrainer, pairs: list[Pair]) -> MicroBatch:
    """Pairs as one micro-batch."""
    (batch,) = t.batches(t.draw(pairs), 1)
    return batch
