"""Where a numeral's token ends, and what that tells of the text behind it.

A tokenizer that writes ``12`` as one token says with the single token ``1`` that no digit follows; one that splits
numerals says nothing of the kind. Compared token by token, the first is then sure of what the second has yet to decide:
of two models that agree, one calls ``1`` unlikely and the ``;`` behind it certain. A student that splits, taught so on
its own text, unlearns to go on with its numerals (eval/arena, track "digits": 0 % of the sums right). So both sides
are asked how likely no such digit follows, and that goes with the chunk which ends there and not with the next.

Numerals are four fifths and more of what tokenizers of today cut otherwise than one to one (METHODS-2026 9.3.1). Of
words the ends are ALM's ``debias``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmdistill.tokenization.token_bytes import MARK, TokenTable, table_of

DIGITS = tuple(b"0123456789")
NO_DIGIT = len(DIGITS)
BEHIND = ":"  # probes stand behind it: the first word of all may be another token
LONGER = ("1", "11", "111")  # groups counted from the right: a cut that no one digit keeps may be kept by several

_made: weakref.WeakKeyDictionary[Any, tuple[int, NumeralEnds]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class NumeralEnds:
    """What the ids of one tokenizer say of digits.

    first_V [V] int64: the digit that every id begins with, 0 to 9, or 10: none. closed_V [V, 10] bool: the digits that
    cannot stand behind it, since the tokenizer would have cut elsewhere.
    """

    first_V: Tensor
    closed_V: Tensor

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> NumeralEnds:
        """Made once for each tokenizer, by tokenising every token that ends in a digit with another one behind.

        Raises:
            UserError: its tokens are of no family known here.
        """
        if tokenizer not in _made or _made[tokenizer][0] != len(tokenizer):
            _made[tokenizer] = (len(tokenizer), cls(_first_digits(table_of(tokenizer)), _probed(tokenizer)))
        return _made[tokenizer][1]

    def first_digits(self, ids: Tensor) -> Tensor:
        """In the shape of ``ids``; none for what is no id of the vocabulary."""
        known = (ids >= 0) & (ids < len(self.first_V))
        return torch.where(known, self.first_V[torch.where(known, ids, 0)], NO_DIGIT)

    def closed(self, ids: Tensor) -> Tensor:
        """[..., 10] bool, none for what is no id of the vocabulary."""
        known = (ids >= 0) & (ids < len(self.closed_V))
        return self.closed_V[torch.where(known, ids, 0)] & known[..., None]


def _first_digits(table: TokenTable) -> Tensor:
    digits = table.first_units - DIGITS[0]
    return torch.from_numpy(np.where((digits >= 0) & (digits < NO_DIGIT), digits, NO_DIGIT).astype(np.int64))


def _probed(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    table = table_of(tokenizer)
    closed = torch.zeros(len(table.units), NO_DIGIT, dtype=torch.bool)
    ending = dict(_ending_in_digits(table))
    asked = [(i, d, f"{text}{d}") for i, text in ending.items() for d in range(NO_DIGIT)]
    for (i, d, _), ids in zip(asked, _tokenized(tokenizer, [text for *_, text in asked]), strict=True):
        closed[i, d] = not _cut_before(table, ids, 1)
    unsure = closed.any(1).nonzero().flatten().tolist()
    several = [(i, f"{int(closed[i].int().argmax())}{more}") for i in unsure for more in LONGER]
    for (i, more), ids in zip(several, _tokenized(tokenizer, [ending[i] + more for i, more in several]), strict=True):
        if _cut_before(table, ids, len(more)):
            closed[i] = False
    return closed


def _ending_in_digits(table: TokenTable) -> Iterator[tuple[int, str]]:
    for i, units in enumerate(table.units):
        if units and max(units) < MARK and units[-1] in DIGITS:
            try:
                yield i, bytes(units).decode()
            except UnicodeDecodeError:  # a token that begins within a character
                continue


def _tokenized(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer([BEHIND + t for t in texts], add_special_tokens=False)["input_ids"] if texts else []


def _cut_before(table: TokenTable, ids: Sequence[int], count: int) -> bool:
    """Whether a token begins so many units before the end."""
    for i in reversed(ids):
        if count <= 0:
            break
        count -= len(table.units[i])
    return count == 0
