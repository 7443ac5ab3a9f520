"""The classes of tokens that two vocabularies can both tell: the longest token of both that a token begins with.

Where two tokenizers stand at one place of a text, the next token of either says how the text goes on. "Goes on with 2"
both can say, the one with 2, the other with 2, 20 and 201; so tokens are put with the longest token that both have and
that they begin with. Bytes do it: a string that one side cuts short of a shared token where the other does not (two
merge orders) is in two classes, which is what remains of the difference between the two.
"""

from __future__ import annotations

from collections.abc import Collection, Set

import torch
from torch import Tensor

from llmdistill.tokenization.token_bytes import UNKNOWN, TokenTable

Units = tuple[int, ...]


def shared_classes(
    student: TokenTable,
    judge: TokenTable,
    special: tuple[Collection[int], Collection[int]] = ((), ()),
) -> tuple[Tensor, Tensor, Tensor]:
    """Classes of both vocabularies' ids, numbered alike: ([V] of the student, [V] of the judge, same [K] bool).

    K, the number of classes, is in none: an id that spells nothing, begins with no token of both, or is one of the
    ``special`` ids (of the student, of the judge) that the other has not. ``same``: neither side has folded another
    token into the class.
    """
    shared = sorted(u for u in student.ids_by_units.keys() & judge.ids_by_units.keys() if u[0] != UNKNOWN)
    number = {units: k for k, units in enumerate(shared)}
    same, found = torch.ones(len(shared), dtype=torch.bool), []
    for table, not_text in zip((student, judge), special, strict=True):
        of_V = torch.full((len(table.units),), len(shared), dtype=torch.int64)
        for i, units in enumerate(table.units):
            prefix = _longest_prefix(units, number.keys())
            if prefix and (prefix == units or i not in not_text):
                of_V[i] = number[prefix]
                same[number[prefix]] &= prefix == units
        found.append(of_V)
    return found[0], found[1], same


def _longest_prefix(units: Units, known: Set[Units]) -> Units:
    return next((units[:n] for n in range(len(units), 0, -1) if units[:n] in known), ())
