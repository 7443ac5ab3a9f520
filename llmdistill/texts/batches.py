"""Sequences in groups that are worked at together: a bound on the tokens of a group, padding included."""

from __future__ import annotations

from collections.abc import Sequence


def groups(lengths: Sequence[int], batch_tokens: int, *, at_most: int = 0) -> list[list[int]]:
    """Indices in their order, in groups of ``longest x sequences <= batch_tokens``; one that is longer is alone.

    Args:
        lengths: tokens of each sequence, with the room for what is generated.
        batch_tokens: 0: no bound.
        at_most: sequences of a group; 0: no bound.
    """
    found = list[list[int]]()
    longest = 0
    for i, length in enumerate(lengths):
        padded = max(longest, length) * (len(found[-1]) + 1) if found else 0
        fits = (not batch_tokens or padded <= batch_tokens) and (not at_most or (found and len(found[-1]) < at_most))
        if found and fits:
            found[-1].append(i)
            longest = max(longest, length)
        else:
            found.append([i])
            longest = length
    return found
