"""Which sequences of a round's texts share a backward pass: as many in each, or as many tokens as a budget has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmdistill.composition.batch import Text
from llmdistill.composition.term import Term
from llmdistill.texts.batches import Passes, split_evenly

Bounds = dict[str, list[tuple[int, int]]]  # of each text, of every pass: its sequences from .. to ..


def planned(texts: Mapping[str, Text], terms: Sequence[Term], passes: Passes, parts: int) -> Bounds:
    """Passes of (nearly) equally many sequences of every text; or of at most ``passes.tokens`` tokens, padding included
    or, where they are packed, their own. The largest is then as small as so many can be.

    Args:
        texts: each :func:`in_order`.
        parts: how many there are; of those that tokens bound, at least so many.

    Raises:
        UserError: what has to be in one pass is larger.
    """
    if not passes.tokens:
        return {name: split_evenly(len(text), parts) for name, text in texts.items()}
    kept = kept_together(texts, terms)
    sized = [_sizes(texts, names, passes.packed) for names in kept]
    items = sorted((size, k, i) for k, sizes in enumerate(sized) for i, size in enumerate(sizes))
    # Counterparts that are packed count as what they have together, which may be any number.
    widths = None if passes.packed else [len(kept[k]) for _, k, _ in items]
    bounds: Bounds = {name: [] for name in texts}
    reached = [0] * len(kept)
    for a, b in passes.bounds([size for size, _, _ in items], widths, at_least=parts):
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


def _sizes(texts: Mapping[str, Text], names: Sequence[str], packed: bool) -> list[int]:
    """Tokens of the longest of every sequence and its counterparts; packed, of all of them."""
    lengths = [texts[name].rollout.attention_mask.sum(1).tolist() for name in names]
    return [(sum if packed else max)(column) for column in zip(*lengths, strict=True)]


def in_order(texts: Mapping[str, Text], terms: Sequence[Term], packed: bool = False) -> dict[str, Text]:
    """Neighbours in length share a pass: less padding. Counterparts keep together.

    Ties keep their order, so a round is reproducible.
    """
    order = dict[str, list[int]]()
    for names in kept_together(texts, terms):
        lengths = _sizes(texts, names, packed)
        order.update(dict.fromkeys(names, sorted(range(len(lengths)), key=lambda i: lengths[i])))
    return {name: text.reorder(order[name]) for name, text in texts.items()}
