"""Which sequences of a round's texts share a backward pass: as many in each, or as many tokens as a budget has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from llmdistill.composition.batch import Text
from llmdistill.composition.term import Term
from llmdistill.texts.batches import needed, split_evenly, spread

Bounds = dict[str, list[tuple[int, int]]]  # of each text, of every pass: its sequences from .. to ..


def by_count(texts: Mapping[str, Text], parts: int) -> Bounds:
    """Passes of (nearly) equally many sequences of every text."""
    return {name: split_evenly(len(text), parts) for name, text in texts.items()}


def by_tokens(
    texts: Mapping[str, Text],
    terms: Sequence[Term],
    batch_tokens: int,
    *,
    at_least: int = 1,
    most: Callable[[Callable[[], int]], int] = lambda count: count(),
) -> Bounds:
    """Passes of at most ``batch_tokens`` tokens, padding included, the largest of them as small as so many can be.

    Args:
        texts: each :func:`in_order`.
        at_least: so many passes are made also where fewer would do.
        most: of how many passes this rank needs, the most that any does; every rank calls it.

    Raises:
        UserError: what has to be in one pass is larger.
    """
    kept = kept_together(texts, terms)
    items = sorted((length, k, i) for k, names in enumerate(kept) for i, length in enumerate(longest(texts, names)))
    lengths, widths = [length for length, _, _ in items], [len(kept[k]) for _, k, _ in items]
    parts = max(most(lambda: needed(lengths, batch_tokens, widths)), at_least)
    bounds: Bounds = {name: [] for name in texts}
    reached = [0] * len(kept)
    for a, b in spread(lengths, parts, widths):
        for k, names in enumerate(kept):
            start = reached[k]
            reached[k] += sum(of == k for _, of, _ in items[a:b])
            for name in names:
                bounds[name].append((start, reached[k]))
    return bounds


def kept_together(texts: Mapping[str, Text], terms: Sequence[Term]) -> list[tuple[str, ...]]:
    """The texts in sets: those that one loss of groups reads, whose sequences are each other's counterparts."""
    found = [{name} for name in texts]
    for term in terms:
        if term.group is not None:
            joined = [names for names in found if names & set(term.texts)]
            found = [names for names in found if not names & set(term.texts)] + [set().union(*joined)]
    return [tuple(name for name in texts if name in names) for names in found if names]


def longest(texts: Mapping[str, Text], names: Sequence[str]) -> list[int]:
    """Tokens of the longest of every sequence and its counterparts."""
    lengths = [texts[name].rollout.attention_mask.sum(1).tolist() for name in names]
    return [max(column) for column in zip(*lengths, strict=True)]


def in_order(texts: Mapping[str, Text], terms: Sequence[Term]) -> dict[str, Text]:
    """Neighbours in length share a pass: less padding. Counterparts keep together.

    Ties keep their order, so a round is reproducible.
    """
    order = dict[str, list[int]]()
    for names in kept_together(texts, terms):
        lengths = longest(texts, names)
        order.update(dict.fromkeys(names, sorted(range(len(lengths)), key=lambda i: lengths[i])))
    return {name: text.reorder(order[name]) for name, text in texts.items()}
