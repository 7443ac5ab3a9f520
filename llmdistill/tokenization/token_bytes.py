"""What every id of a tokenizer adds to a text, in bytes: from its table of tokens, never by decoding ids one by one.

Decoding a token alone loses what only its neighbours complete: half a character, the leading space of SentencePiece.
Four families: byte-level BPE (GPT-2's alphabet, and tekken, which has bytes itself), SentencePiece (``▁`` for a space,
``<0x0A>`` for a byte, a space put before the text), WordPiece (``##`` goes on, all else begins after a space), and
bytes (ByT5).
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmdistill.errors import UserError

Family = Literal["byte_level", "sentencepiece", "wordpiece", "bytes"]
# Units past all characters: what a token means that is not text, however each side writes it.
MARK = 0x110000
END, START, THINK, END_THINK, UNKNOWN, CALL, END_CALL = range(MARK, MARK + 7)
SPACE = "▁"
BLANKS = tuple(b" \t\n\r\v\f")
BYTE_TOKENS = {f"<0x{b:02X}>": b for b in range(256)}


@dataclass(frozen=True, eq=False)
class TokenTable:
    """The units of every id: bytes, or one unit >= ``MARK`` for a token that is no text.

    ``prefix``: a space that the tokenizer puts before a text (``first``) or before every stretch of text between
    special tokens (``always``), and that is no part of it.
    """

    family: Family
    units: tuple[tuple[int, ...], ...]  # of every id
    prefix: Literal["", "first", "always"] = ""

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Units of every id, and of what is none, [V + 1]."""
        return np.fromiter(map(len, self._and_none), np.int64, len(self._and_none))

    @property
    def _and_none(self) -> tuple[tuple[int, ...], ...]:
        return (*self.units, (UNKNOWN,))

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where the units of every id begin in ``flat``, [V + 1]."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def flat(self) -> NDArray[np.int32]:
        """The units of all ids, one after another."""
        return np.fromiter((u for token in self._and_none for u in token), np.int32, int(self.lengths.sum()))

    @cached_property
    def first_units(self) -> NDArray[np.int32]:
        """The unit that every id begins with, [V]; -1 of one without."""
        return np.where(self.lengths > 0, self.flat[np.minimum(self.starts, len(self.flat) - 1)], -1)[:-1]

    @cached_property
    def ids_by_units(self) -> dict[tuple[int, ...], int]:
        """The lowest id of every spelling."""
        return {units: i for i, units in reversed(list(enumerate(self.units))) if units}

    @cached_property
    def byte_ids(self) -> list[int | None]:
        """The id that is exactly one byte, for each of the 256; None where the vocabulary has none."""
        return [self.ids_by_units.get((b,)) for b in range(256)]

    def begins_word(self, columns: int) -> Tensor:
        """Which ids begin after the end of a word: with a blank, or with what is no text -> [columns] bool."""
        return self._word_starts[:columns] if columns <= len(self._word_starts) else self._padded(columns)

    @cached_property
    def _word_starts(self) -> Tensor:
        first = self.first_units
        return torch.from_numpy(((first >= MARK) & (first != UNKNOWN)) | np.isin(first, BLANKS))

    def _padded(self, columns: int) -> Tensor:
        return torch.nn.functional.pad(self._word_starts, (0, columns - len(self._word_starts)))

    def marked(self, marks: Mapping[int, int]) -> TokenTable:
        """With ids that are no text: id -> unit."""
        units = list(self.units)
        for i, unit in marks.items():
            if 0 <= i < len(units):
                units[i] = (unit,)
        return replace(self, units=tuple(units))

    def shared(self, other: TokenTable) -> tuple[list[int], list[int]]:
        """Ids of the tokens that both have, by what they spell: (own, other's), in the order of the own."""
        pairs = [
            (i, other.ids_by_units[units])
            for i, units in enumerate(self.units)
            if units and units[0] != UNKNOWN and self.ids_by_units[units] == i and units in other.ids_by_units
        ]
        return [i for i, _ in pairs], [j for _, j in pairs]


_tables: weakref.WeakKeyDictionary[Any, tuple[Any, TokenTable]] = weakref.WeakKeyDictionary()


def table_of(tokenizer: PreTrainedTokenizerBase) -> TokenTable:
    """The table of a tokenizer, with its bos, eos and unknown tokens as units of their own; made once for each state.

    Raises:
        UserError: its tokens are of no family known here.
    """
    state = (len(tokenizer), tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    if tokenizer not in _tables or _tables[tokenizer][0] != state:
        _tables[tokenizer] = (state, _made(tokenizer))
    return _tables[tokenizer][1]


def _made(tokenizer: PreTrainedTokenizerBase) -> TokenTable:
    tokens = _tokens(tokenizer)
    added = _added(tokenizer)
    family, prefix = _family(tokenizer, tokens)
    spell = {
        "byte_level": _byte_level,
        "sentencepiece": _sentencepiece,
        "wordpiece": _wordpiece,
        "bytes": _single_characters,
    }[family]
    units = [
        () if token is None else tuple(added[i].encode()) if i in added else spell(token)
        for i, token in enumerate(tokens)
    ]
    for i, raw in _tekken(tokenizer):
        units[i] = tuple(raw)
    marks: dict[int, int] = {}
    for i, unit in (
        (tokenizer.unk_token_id, UNKNOWN),
        (tokenizer.bos_token_id, START),
        (tokenizer.eos_token_id, END),  # in GPT-2 all three are one
    ):
        if i is not None:
            marks[int(i)] = unit
    return TokenTable(family, tuple(units), prefix).marked(marks)


def _tokens(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    if hasattr(tokenizer, "backend_tokenizer") or not hasattr(tokenizer, "convert_ids_to_tokens"):
        vocabulary = tokenizer.get_vocab()
        tokens: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        for token, i in vocabulary.items():
            tokens[i] = token
        return tokens
    return list(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Tokens that are found in a text as they stand: id -> text."""
    decoder = getattr(tokenizer, "added_tokens_decoder", None)
    found = {i: str(token.content) for i, token in decoder.items()} if isinstance(decoder, Mapping) else {}
    for i in tokenizer.all_special_ids:
        found.setdefault(int(i), str(tokenizer.convert_ids_to_tokens(int(i))))
    return found


def _family(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str | None]
) -> tuple[Family, Literal["", "first", "always"]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        parts = list(_parts(json.loads(backend.to_str())))
        kinds = {part["type"] for part in parts}
        if "ByteLevel" in kinds:
            return "byte_level", ""
        if "WordPiece" in kinds:
            return "wordpiece", "always"
        if "ByteFallback" in kinds or "Metaspace" in kinds:
            return "sentencepiece", _put_before(parts)
    elif _inner(tokenizer) is not None and hasattr(_inner(tokenizer), "id_to_byte_piece"):
        return "byte_level", ""
    elif type(tokenizer).__name__ == "ByT5Tokenizer":
        return "bytes", ""
    elif sum((token or "").startswith(SPACE) for token in tokens) > len(tokens) // 20:
        return "sentencepiece", "first"
    raise UserError(
        f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} is neither byte-level BPE, SentencePiece, "
        "WordPiece nor bytes: what its tokens add to a text is not known. Fix: a model with one of these."
    )


def _parts(tokenizer: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The normalizers, pre-tokenizers and decoders of a fast tokenizer, sequences taken apart."""
    waiting = [tokenizer[key] for key in ("normalizer", "pre_tokenizer", "decoder") if tokenizer.get(key)]
    while waiting:
        part = waiting.pop()
        yield part
        for key in ("normalizers", "pretokenizers", "decoders"):
            waiting += part.get(key, [])


def _put_before(parts: Sequence[Mapping[str, Any]]) -> Literal["", "first", "always"]:
    if any(part["type"] == "Prepend" for part in parts):
        return "always"
    schemes = {part.get("prepend_scheme", "always") for part in parts if part["type"] == "Metaspace"}
    if not schemes:  # Gemma: spaces are replaced, and none is put before
        return ""
    return "first" if "first" in schemes else "always" if "always" in schemes else ""


def _inner(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The vocabulary of mistral-common's tokenizers, tekken or SentencePiece."""
    return getattr(getattr(getattr(tokenizer, "tokenizer", None), "instruct_tokenizer", None), "tokenizer", None)


def _tekken(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, bytes]]:
    inner = _inner(tokenizer)
    if hasattr(inner, "id_to_byte_piece"):
        for i in range(inner.num_special_tokens, inner.n_words):
            yield i, inner.id_to_byte_piece(i)


@cache
def _alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others for 256 and on in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def _byte_level(token: str) -> tuple[int, ...]:
    alphabet = _alphabet()
    if all(c in alphabet for c in token):
        return tuple(alphabet[c] for c in token)
    return tuple(token.encode())


def _sentencepiece(token: str) -> tuple[int, ...]:
    if token in BYTE_TOKENS:
        return (BYTE_TOKENS[token],)
    return tuple(token.replace(SPACE, " ").encode())


def _wordpiece(token: str) -> tuple[int, ...]:
    return tuple(token[2:].encode() if token.startswith("##") else b" " + token.encode())


def _single_characters(token: str) -> tuple[int, ...]:
    return (ord(token),) if len(token) == 1 and ord(token) < 256 else tuple(token.encode())
