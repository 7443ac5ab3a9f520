"""Two tokenizations of one text: the smallest chunks of both that spell the same bytes (METHODS-2026 9.3.1).

Each side is spelled out in units (bytes, and one unit for a token that is no text), and a chunk ends wherever a token
of both sides does. That is exact, needs no search, and takes a few array operations whatever the text is.

Where the two sides do not spell the same (a tokenizer that lower-cases, strips spaces or composes characters), they are
aligned on a form that ignores all that, a character at a time; where they differ even so, they are not aligned, and the
reason names the character.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from llmdistill.tokenization.token_bytes import END, MARK, SPACE, UNKNOWN, TokenTable, table_of

Units = NDArray[np.int32]
Ends = NDArray[np.int64]
SPACE_UNIT = 32
SHOWN = 24  # units of a text in a message


@dataclass(frozen=True, eq=False)
class Spelling:
    """A token sequence spelled out. Ends are in half units: an odd one lies within a unit, and closes no chunk."""

    units: Units  # [U]
    ends: Ends  # [n], ascending: where every token ends


@dataclass(frozen=True, eq=False)
class Alignment:
    """Chunks of two tokenizations, in order. C chunks; they cover all tokens of both sides, unless there are none."""

    student_ends: Ends  # [C]: tokens up to the end of each chunk
    teacher_ends: Ends  # [C]
    exact: bool  # both sides spell the same units
    reason: str = ""  # why they do not, or are not aligned

    @property
    def aligned(self) -> bool:
        return not self.reason or len(self.student_ends) > 0

    def slices(self) -> list[tuple[slice, slice]]:
        """The chunks: (tokens of the student, tokens of the teacher)."""

        def side(ends: Ends) -> list[slice]:
            bounds = [0, *ends.tolist()]
            return [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]

        return list(zip(side(self.student_ends), side(self.teacher_ends), strict=True))


def align_chunks(
    student_ids: Sequence[int],
    teacher_ids: Sequence[int],
    student_tok: PreTrainedTokenizerBase,
    teacher_tok: PreTrainedTokenizerBase,
) -> list[tuple[slice, slice]]:
    """Minimal chunks that spell the same on both sides: (slice of student_ids, slice of teacher_ids) each.

    They partition both sequences. A token that spells nothing belongs to the chunk after it, or to the last one. bos
    and eos of one side go with those of the other. Empty where the two do not spell the same text; :func:`align` says
    why.
    """
    return align(spell(student_ids, table_of(student_tok)), spell(teacher_ids, table_of(teacher_tok))).slices()


def spell(ids: Sequence[int] | NDArray[np.int64], table: TokenTable, *, whole: bool = False) -> Spelling:
    """Spells ids out, without the space that a tokenizer puts before a text, unless the ``whole`` is asked for.

    An id past the vocabulary, as heads have columns for, is unknown.
    """
    at = np.minimum(np.asarray(ids, dtype=np.int64), len(table.units))
    lengths = table.lengths[at]
    ends = np.cumsum(lengths)
    offsets = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)
    units = table.flat[np.repeat(table.starts[at], lengths) + offsets]
    if table.prefix and len(units) and not whole:
        return _without(units, ends, _put_before(units, table.prefix))
    return Spelling(units, 2 * ends)


def _put_before(units: Units, prefix: str) -> NDArray[np.int64]:
    """Where the spaces are that stand for the beginning of a text."""
    text = units < MARK
    begins = text & np.concatenate([[True], ~text[:-1]])
    at = np.flatnonzero(begins & (units == SPACE_UNIT))
    if prefix == "always":
        return at
    first = np.flatnonzero(text)[:1]
    return at[np.isin(at, first)]


def _without(units: Units, ends: Ends, gone: NDArray[np.int64]) -> Spelling:
    shift = np.searchsorted(gone, ends, side="left")  # how many of them lie before each end
    return Spelling(np.delete(units, gone), 2 * (ends - shift))


def behind_front(spelling: Spelling, front: int) -> Spelling:
    """The spelling without its first ``front`` units; tokens that end there spell nothing any more."""
    return Spelling(spelling.units[front:], np.maximum(spelling.ends - 2 * front, 0))


def substituted(spelling: Spelling, marks: Mapping[bytes, int]) -> Spelling:
    """With every occurrence of these bytes as the one unit that they stand for."""
    units = spelling.units.copy()
    raw = np.where(units < MARK, units, 0xFF).astype(np.uint8).tobytes()  # no text has the byte 0xFF
    kept, within = np.ones(len(units), dtype=bool), np.zeros(len(units) + 1, dtype=bool)
    for pattern, unit in marks.items():
        start = raw.find(pattern)
        while start >= 0:
            stop = start + len(pattern)
            units[start] = unit
            kept[start + 1 : stop], within[start + 1 : stop] = False, True
            start = raw.find(pattern, stop)
    before = np.concatenate([[0], np.cumsum(kept)])  # kept units before each place
    places = np.where(within, 2 * before - 1, 2 * before)
    return Spelling(units[kept], places[spelling.ends // 2])


def align(student: Spelling, teacher: Spelling) -> Alignment:
    """The smallest chunks of two spellings of one text."""
    if np.array_equal(student.units, teacher.units) and not (student.units == UNKNOWN).any():
        return Alignment(*_common_ends(student, teacher), exact=True)
    reason = _difference(student.units, teacher.units, _bytes_shown)
    folded = folded_spelling(student), folded_spelling(teacher)
    if np.array_equal(folded[0].units, folded[1].units) and not (folded[0].units == UNKNOWN).any():
        return Alignment(*_common_ends(*folded), exact=False, reason=reason)
    none = np.zeros(0, dtype=np.int64)
    return Alignment(none, none, exact=False, reason=_difference(folded[0].units, folded[1].units, _characters_shown))


def _common_ends(student: Spelling, teacher: Spelling) -> tuple[Ends, Ends]:
    if not len(student.ends) or not len(teacher.ends):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    common = np.intersect1d(student.ends, teacher.ends)
    common = common[(common % 2 == 0) & (common > 0)]
    # The first token that reaches the end: those after it that spell nothing belong to the next chunk.
    own, other = (np.searchsorted(side.ends, common, side="left") + 1 for side in (student, teacher))
    if len(common):
        own[-1], other[-1] = len(student.ends), len(teacher.ends)
    return own, other


def folded_spelling(spelling: Spelling) -> Spelling:
    """In a form in which what tokenizers normalise away makes no difference: case, accents, spaces, width, controls.

    Units are then code points, and marks stay. A token that ends within a character ends within a unit.
    """
    units, places = list[int](), [0]  # places: half units up to the end of each of the given units
    marks = np.flatnonzero(spelling.units >= MARK)
    start = 0
    for stop in [*marks.tolist(), len(spelling.units)]:
        raw = spelling.units[start:stop].astype(np.uint8).tobytes()
        for character in raw.decode("utf-8", "surrogateescape"):
            folded = _folded(character)
            width = len(character.encode("utf-8", "surrogateescape"))
            before = 2 * len(units)
            units += folded
            places += [before + 1 if folded else before] * (width - 1) + [2 * len(units)]
        if stop < len(spelling.units):
            units.append(int(spelling.units[stop]))
            places.append(2 * len(units))
        start = stop + 1
    return Spelling(np.asarray(units, dtype=np.int32), np.asarray(places, dtype=np.int64)[spelling.ends // 2])


@lru_cache(1 << 16)
def _folded(character: str) -> list[int]:
    kept = unicodedata.normalize("NFKD", character).casefold()
    return [ord(c) for c in unicodedata.normalize("NFKD", kept) if not _is_dropped(c)]


def _is_dropped(character: str) -> bool:
    """Whether some tokenizer leaves it out of a text, or writes it as a space: SentencePiece does so with its mark."""
    unseen = unicodedata.category(character) in ("Cc", "Cf") or character in (SPACE, "\ufffd")
    return unseen or character.isspace() or unicodedata.combining(character) > 0


def _difference(student: Units, teacher: Units, show: Callable[[Units], str]) -> str:
    """Where two texts part."""
    for side, units, across in (("student", student, teacher), ("teacher", teacher, student)):
        if len(found := np.flatnonzero(units == UNKNOWN)):
            at = int(found[0])
            known = np.array_equal(units[:at], across[:at]) and (across[at : at + 1] < MARK).any()
            what = f", {show(across[at : at + 1])}" if known else ""
            return (
                f"the {side}'s tokenizer has no token for what comes after {show(units[max(at - SHOWN, 0) : at])}{what}"
            )
    n = min(len(student), len(teacher))
    apart = np.flatnonzero(student[:n] != teacher[:n])
    first = int(apart[0]) if len(apart) else n
    own, other = (show(units[first : first + SHOWN]) for units in (student, teacher))
    return (
        f"after {show(student[max(0, first - SHOWN // 2) : first])} the student's tokens spell {own}, the teacher's "
        f"{other}"
    )


def _bytes_shown(units: Units) -> str:
    text = repr(units[units < MARK].astype(np.uint8).tobytes().decode("utf-8", "replace"))
    return f"{text} and the end of the turn" if len(units) and units[-1] == END else text


def _characters_shown(units: Units) -> str:
    text = repr("".join(map(chr, units[units < MARK].tolist())).encode("utf-8", "replace").decode())
    return f"{text} and the end of the turn" if len(units) and units[-1] == END else text
