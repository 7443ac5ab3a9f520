"""Which sequences share a forward pass: so many of them, or so many tokens, padding included.

The one place that plans this: for generation, for teachers, for what is measured, for the passes that are trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

import torch

from llmdistill.errors import UserError
from llmdistill.texts.rollout import Rollout


def groups(lengths: Sequence[int], batch_tokens: int, *, at_most: int = 0) -> list[list[int]]:
    """Indices in their order, in groups of ``longest x sequences <= batch_tokens``; one that is longer is alone.

    Args:
        lengths: tokens of each sequence, with the room for what is generated.
        batch_tokens: 0: no bound.
        at_most: sequences of a group; 0: no bound.
    """
    return [list(range(a, b)) for a, b in _filled(lengths, [1] * len(lengths), batch_tokens, at_most)]


def by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """As :func:`groups`, of the indices from the shortest sequence to the longest: the least padding."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    return [[order[i] for i in group] for group in groups([lengths[i] for i in order], batch_tokens)]


def split_evenly(count: int, parts: int) -> list[tuple[int, int]]:
    """Bounds of ``parts`` (nearly) equal stretches of ``range(count)``."""
    return list(pairwise(count * k // parts for k in range(parts + 1)))


def spread(lengths: Sequence[int], parts: int, widths: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """Bounds of ``parts`` stretches, the last ones perhaps empty, of which the largest is as small as can be.

    Args:
        lengths: tokens of the longest sequence of every item, in the order that stays.
        widths: sequences of every item; 1 each where left out.
    """
    widths = widths or [1] * len(lengths)
    low = max((length * width for length, width in zip(lengths, widths, strict=True)), default=0)
    high = max(lengths, default=0) * sum(widths)
    while low < high:  # the least bound that so many stretches keep
        middle = (low + high) // 2
        if len(_filled(lengths, widths, middle)) <= parts:
            high = middle
        else:
            low = middle + 1
    found = _filled(lengths, widths, high)
    return found + [(len(lengths), len(lengths))] * (parts - len(found))


def needed(lengths: Sequence[int], batch_tokens: int, widths: Sequence[int] | None = None) -> int:
    """The fewest stretches that keep to ``batch_tokens``.

    Raises:
        UserError: an item alone is larger.
    """
    widths = widths or [1] * len(lengths)
    largest = max(zip(lengths, widths, strict=True), key=lambda item: item[0] * item[1], default=(0, 0))
    if largest[0] * largest[1] > batch_tokens:
        kept = f"{largest[1]} sequences of {largest[0]} tokens" if largest[1] > 1 else f"a sequence of {largest[0]}"
        raise UserError(
            f"objective.batch_tokens is {batch_tokens}, and there is {kept} that one pass has to hold. Fix: at least "
            f"{largest[0] * largest[1]}, or shorter texts: rollouts.max_new_tokens, data.max_prompt_tokens."
        )
    return len(_filled(lengths, widths, batch_tokens))


def _filled(lengths: Sequence[int], widths: Sequence[int], bound: int, at_most: int = 0) -> list[tuple[int, int]]:
    """Bounds of stretches that are filled one after the other: of all divisions in this order one of the shortest."""
    found, start, longest = list[tuple[int, int]](), 0, 0
    before = [0, *accumulate(widths)]
    for i, length in enumerate(lengths):
        padded = max(longest, length) * (before[i + 1] - before[start])
        if i > start and ((bound and padded > bound) or (at_most and i - start >= at_most)):
            found.append((start, i))
            start, longest = i, 0
        longest = max(longest, length)
    return [*found, (start, len(lengths))] if lengths else []


@dataclass(frozen=True)
class Passes:
    """How large the forward passes over a text are, and that all ranks make as many (ZeRO-3 gathers weights in each).

    Args:
        sequences: of a pass, where ``tokens`` is 0.
        tokens: of a pass, padding included.
        most: of how many passes this rank needs, the most that any does; every rank calls it.
    """

    sequences: int
    tokens: int = 0
    most: Callable[[Callable[[], int]], int] = field(default=lambda count: count())

    def of(self, rollout: Rollout, device: torch.device | str) -> Iterator[Rollout]:
        """The sequences of ``rollout`` in order, on ``device``; a pass too many has one in which nothing counts."""
        if not self.tokens:
            bounds = [(a, min(a + self.sequences, len(rollout))) for a in range(0, len(rollout), self.sequences)]
        else:
            lengths: list[int] = rollout.attention_mask.sum(1).tolist()
            bounds = spread(lengths, self.most(lambda: needed(lengths, self.tokens)))
        for a, b in bounds:
            yield (rollout.sequences(range(a, b)) if a < b else uncounted(rollout)).to(device)


def uncounted(rollout: Rollout) -> Rollout:
    """The first sequence, of which nothing counts."""
    first = rollout.sequences([0])
    return replace(first, completion_mask=torch.zeros_like(first.completion_mask))
