"""Which sequences share a forward pass: so many of them, or so many tokens; padding is counted unless it is packed.

The one place that plans this: for generation, for teachers, for what is measured, for the passes that are trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

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


def by_length(lengths: Sequence[int], batch_tokens: int, *, packed: bool = False) -> list[list[int]]:
    """As :func:`groups`, of the indices from the shortest sequence to the longest: the least padding.

    Args:
        packed: there is none, and a group holds ``batch_tokens`` of its sequences' own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    in_order = [lengths[i] for i in order]
    return [order[a:b] for a, b in _filled(in_order, [1] * len(order), batch_tokens, packed=packed)]


def split_evenly(count: int, parts: int) -> list[tuple[int, int]]:
    """Bounds of ``parts`` (nearly) equal stretches of ``range(count)``."""
    return list(pairwise(count * k // parts for k in range(parts + 1)))


def spread(
    lengths: Sequence[int], parts: int, widths: Sequence[int] | None = None, *, packed: bool = False
) -> list[tuple[int, int]]:
    """Bounds of ``parts`` stretches, the last ones perhaps empty, of which the largest is as small as can be.

    Args:
        lengths: tokens of the longest sequence of every item, in the order that stays.
        widths: sequences of every item; 1 each where left out.
        packed: nothing is padded: an item has ``length * width`` tokens, whatever it stands beside.
    """
    widths = widths or [1] * len(lengths)
    sizes = [length * width for length, width in zip(lengths, widths, strict=True)]
    low, high = max(sizes, default=0), sum(sizes) if packed else max(lengths, default=0) * sum(widths)
    while low < high:  # the least bound that so many stretches keep
        middle = (low + high) // 2
        if len(_filled(lengths, widths, middle, packed=packed)) <= parts:
            high = middle
        else:
            low = middle + 1
    found = _filled(lengths, widths, high, packed=packed)
    return found + [(len(lengths), len(lengths))] * (parts - len(found))


def needed(
    lengths: Sequence[int], batch_tokens: int, widths: Sequence[int] | None = None, *, packed: bool = False
) -> int:
    """The fewest stretches that keep to ``batch_tokens``. Arguments as of :func:`spread`.

    Raises:
        UserError: an item alone is larger.
    """
    widths = widths or [1] * len(lengths)
    largest = max(zip(lengths, widths, strict=True), key=lambda item: item[0] * item[1], default=(0, 0))
    if largest[0] * largest[1] > batch_tokens:
        kept = f"{largest[1]} sequences of {largest[0]} tokens" if largest[1] > 1 else f"a sequence of {largest[0]}"
        kept = f"text of {largest[0]} tokens" if packed else kept
        raise UserError(
            f"objective.batch_tokens is {batch_tokens}, and there is {kept} that one pass has to hold. Fix: at least "
            f"{largest[0] * largest[1]}, or shorter texts: rollouts.max_new_tokens, data.max_prompt_tokens."
        )
    return len(_filled(lengths, widths, batch_tokens, packed=packed))


def _filled(
    lengths: Sequence[int], widths: Sequence[int], bound: int, at_most: int = 0, *, packed: bool = False
) -> list[tuple[int, int]]:
    """Bounds of stretches that are filled one after the other: of all divisions in this order one of the shortest."""
    found, start, longest, tokens, sequences = list[tuple[int, int]](), 0, 0, 0, 0
    for i, (length, width) in enumerate(zip(lengths, widths, strict=True)):
        size = tokens + length * width if packed else max(longest, length) * (sequences + width)
        if i > start and ((bound and size > bound) or (at_most and i - start >= at_most)):
            found.append((start, i))
            start, longest, tokens, sequences = i, 0, 0, 0
        longest, tokens, sequences = max(longest, length), tokens + length * width, sequences + width
    return [*found, (start, len(lengths))] if lengths else []


@dataclass(frozen=True)
class Passes:
    """How large the forward passes over a text are, and that all ranks make as many (ZeRO-3 gathers weights in each).

    Args:
        sequences: of a pass, where ``tokens`` is 0.
        tokens: of a pass; padding is counted too, unless there is none.
        most: of how many passes this rank needs, the most that any does; every rank calls it.
        packed: its sequences stand one behind another, without padding.
    """

    sequences: int
    tokens: int = 0
    most: Callable[[Callable[[], int]], int] = field(default=lambda count: count())
    packed: bool = False

    def of(self, rollout: Rollout, device: torch.device | str) -> Iterator[Rollout]:
        """The sequences of ``rollout`` in order, on ``device``; a pass too many has one in which nothing counts."""
        if not self.tokens:
            bounds = [(a, min(a + self.sequences, len(rollout))) for a in range(0, len(rollout), self.sequences)]
        else:
            bounds = self.bounds(rollout.attention_mask.sum(1).tolist())
        for a, b in bounds:
            part = rollout.sequences(range(a, b)) if a < b else uncounted(rollout)
            yield replace(part, packed=self.packed).to(device)

    def bounds(
        self, lengths: Sequence[int], widths: Sequence[int] | None = None, *, at_least: int = 1
    ) -> list[tuple[int, int]]:
        """Of passes of at most ``tokens``, the largest of them as small as so many can be; see :func:`spread`.

        Args:
            at_least: so many are made also where fewer would do.

        Raises:
            UserError: an item alone is larger.
        """
        count = self.most(lambda: needed(lengths, self.tokens, widths, packed=self.packed))
        return spread(lengths, max(count, at_least), widths, packed=self.packed)


def uncounted(rollout: Rollout) -> Rollout:
    """The first sequence, of which nothing counts."""
    first = rollout.sequences([0])
    return replace(first, completion_mask=torch.zeros_like(first.completion_mask))
