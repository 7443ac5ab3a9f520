"""Which prompts to keep by how often they are solved, and which of a prompt's traces: far apart, or first and shortest.

DED (METHODS 4.4) keeps prompts that the student solves seldom, and of each several trajectories far apart in edit
distance. Where that is too slow (it grows with the product of two lengths), the distance is 1 less the similarity of
their sets of words in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

Distance = Literal["edit", "minhash"]


def in_band(right: int, graded: int, *, least: float = 0.0, most: float = 1.0) -> bool:
    """Whether a prompt's pass rate right / graded lies in [least, most]; without graded traces it does not.

    Raises:
        ValueError: the band is empty or outside [0, 1].
    """
    if not 0 <= least <= most <= 1:
        raise ValueError(f"the band is {least} to {most}; it must lie in [0, 1]")
    return graded > 0 and least <= right / graded <= most


def distances(texts: Sequence[str], by: Distance = "edit") -> np.ndarray:
    """[T, T] float32 distances in [0, 1]: 0 between equal texts.

    Args:
        by: "edit": Levenshtein distance in characters over the longer length. "minhash": 1 less the estimated Jaccard
            similarity of runs of 5 words.

    Raises:
        ImportError: rapidfuzz is not installed (the ``data`` extra).
    """
    if by == "minhash":
        from llmdistill.datagen.near_duplicates import signatures

        found = signatures(list(texts), 5)
        return np.float32(1) - (found[:, None] == found[None]).mean(2, dtype=np.float32)
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    return np.asarray(cdist(texts, texts, scorer=Levenshtein.normalized_distance, dtype=np.float32))


def far_apart(distance: np.ndarray, k: int, *, least: float = 0.0) -> list[int]:
    """Up to k items, each the farthest from those taken before (the greedy 2-approximation of max-min diversity).

    The first is the medoid, the item nearest to all: a far-off trace is often a strange one.

    Args:
        distance: [T, T] symmetric.
        k: how many.
        least: stop when no item is at least so far from all that were taken.

    Returns:
        Their numbers in the order they were taken; equal distances go to the earlier item.
    """
    if not len(distance) or k < 1:
        return []
    taken = [int(distance.sum(1).argmin())]
    nearest = distance[taken[0]].astype(np.float64)
    while len(taken) < min(k, len(distance)):
        nearest[taken] = -1.0
        candidate = int(nearest.argmax())
        if nearest[candidate] < least:
            break
        taken.append(candidate)
        nearest = np.minimum(nearest, distance[candidate])
    return taken


def shortest(lengths: Sequence[int], k: int) -> list[int]:
    """The k shortest, shortest first; of equal ones the earlier."""
    return sorted(range(len(lengths)), key=lambda i: (lengths[i], i))[:k]


def per_prompt(prompts: Sequence[str], choose: Callable[[list[int]], list[int]]) -> list[int]:
    """Rows that remain when ``choose`` picks among each prompt's rows, in order.

    Args:
        prompts: the prompt's id of each row.
        choose: gets the numbers of one prompt's rows, returns those to keep.
    """
    rows: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(number)
    return sorted(i for group in rows.values() for i in choose(group))
