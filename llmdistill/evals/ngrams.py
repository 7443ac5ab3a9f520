"""Word sequences of a small set of texts, found in a stream of many: the index under the contamination check.

A text becomes words: lower case, NFKC, LaTeX commands that only space, size or set type dropped, everything that is
neither letter nor digit a separator, digits split from letters ("2x" is "2 x"), each CJK character a word. So case,
punctuation, line breaks, "$", "\\left(" and "\\," do not hide a copy.

Only the small set is kept in memory. The stream is looked at in batches of bytes: one polynomial hash per word by
``reduceat``, window hashes by Horner's rule over words, a bitmap that rejects nearly all windows, a sorted table for
the rest. Words are then compared as bytes, so a collision of hashes is never reported.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

_LATEX = re.compile(
    rb"\\(?:[hv]space\*?\{[^{}]*\}|(?:q?quad|left|right|bigg?[lrm]?|(?:display|text|script)style|limits|noindent|mbox|hbox"
    rb"|math(?:rm|bf|it|sf|tt|cal|frak|bb)|text(?:rm|bf|it|tt|sf|normal)?|operatorname|(?:thin|med|thick)space)(?![a-z]))"
)
_FRACTION = re.compile(rb"\\[dtc]frac(?![a-z])")
_NON_ASCII = re.compile(r"[^\x00-\x7f]+")
_BETWEEN = b"\n\x00\n"  # a word that no text has stands between documents, so that no match spans two

_LETTER, _DIGIT, _MARK = 1, 2, 3
_CLASS = bytes(
    _MARK if c == 0 else _DIGIT if 48 <= c <= 57 else _LETTER if 97 <= c <= 122 or c >= 128 else 0 for c in range(256)
)
_SYMBOLS = re.compile(rb"[-+/=<>^]")
_BATCH = 400_000  # characters
Item = TypeVar("Item")
_BASE = 0x9E3779B97F4A7C15  # odd: it has an inverse modulo 2**64
_STEP = np.uint64(0xD6E8FEB86659FD93)
_SPREAD = np.uint64(0xC2B2AE3D27D4EB4F)


class _Characters(dict[int, str]):
    """What ``str.translate`` makes of a non-ASCII character; filled as characters turn up."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kind = unicodedata.category(character)
        if kind == "Lo" and unicodedata.east_asian_width(character) in "WF":
            value = f" {character} "
        elif kind[0] in "LMN":
            value = character
        elif kind == "Cf":  # soft hyphens, zero-width spaces: invisible inside words
            value = ""
        else:
            value = {"−": "-", "≤": "<", "≥": ">", "∕": "/", "⁄": "/"}.get(character, " ")
        self[code] = value
        return value


_CHARACTERS = _Characters()


def normalise(text: str) -> bytes:
    """``text`` as the words are read from: lower-case UTF-8 without LaTeX's spacing, punctuation still in place."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
        text = _NON_ASCII.sub(lambda found: found[0].translate(_CHARACTERS), text)
    raw = text.lower().encode("utf-8", "replace")
    if b"\\" in raw:
        raw = _FRACTION.sub(rb"\\frac", _LATEX.sub(b" ", raw))
    return raw.replace(b"\x00", b" ") if b"\x00" in raw else raw


def batches(items: Iterable[Item], text: Callable[[Item], str]) -> Iterator[list[Item]]:
    """Items in order, as many together as have some 400,000 characters: arrays that fit into a core's cache."""
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(text(item)) + 16  # empty ones must fill a batch, too
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def words(text: str) -> list[bytes]:
    """The words of a text, see the module."""
    return Words([normalise(text)]).between(0, None)


class Words:
    """The words of a batch of normalised texts.

    Attributes:
        starts, ends: [W] where each word lies in ``raw``.
        hashes: [W] uint64.
        firsts: [D + 1] number of the first word of each text; texts are followed by one separator word each.
    """

    def __init__(self, texts: Sequence[bytes]) -> None:
        self.raw = _BETWEEN.join([*texts, b""])
        classes = np.frombuffer(self.raw.translate(_CLASS), np.uint8)
        edges = np.flatnonzero(classes[1:] != classes[:-1]) + 1
        starts = np.concatenate(([0], edges))
        ends = np.concatenate((edges, [len(self.raw)]))
        power, inverse = _powers(len(self.raw))
        terms = np.frombuffer(self.raw, np.uint8).astype(np.uint64)
        terms *= power
        sums = np.add.reduceat(terms, starts)
        sums *= inverse[starts]
        sums ^= sums >> np.uint64(29)  # a polynomial's low bits are weak
        sums *= _SPREAD
        kept = classes[starts] > 0
        self.starts, self.ends, self.hashes = starts[kept], ends[kept], sums[kept]
        self.firsts = np.concatenate(([0], np.flatnonzero(classes[self.starts] == _MARK) + 1))

    def word(self, i: int) -> bytes:
        return self.raw[self.starts[i] : self.ends[i]]

    def between(self, low: int, high: int | None) -> list[bytes]:
        """Words low to high (the last text's end when None)."""
        high = int(self.firsts[-1]) - 1 if high is None else high
        spans = zip(self.starts[low:high].tolist(), self.ends[low:high].tolist(), strict=True)
        return [self.raw[a:b] for a, b in spans]

    def symbols(self, low: int, high: int) -> bytes:
        """The arithmetic signs among words low to high, in order."""
        return b"".join(_SYMBOLS.findall(self.raw[self.starts[low] : self.ends[high - 1]]))

    def windows(self, longest: int) -> Iterator[tuple[int, np.ndarray]]:
        """(L, hashes [W - L + 1] of all L words in a row) for L from 1 to ``longest``."""
        window = self.hashes.copy()
        for length in range(1, longest + 1):
            if length > 1:
                if len(window) < 2:
                    return
                window = window[:-1] * _STEP
                window += self.hashes[length - 1 :]
            yield length, window


_power_table = (np.ones(1, np.uint64), np.ones(1, np.uint64))


def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """_BASE**i and _BASE**-i modulo 2**64 for i < size; kept, and grown as needed."""
    global _power_table
    if len(_power_table[0]) < size:
        grown = []
        for base in (_BASE, pow(_BASE, -1, 2**64)):
            factors = np.full(max(size, 1 << 18), base, np.uint64)
            factors[0] = 1
            grown.append(np.multiply.accumulate(factors))
        _power_table = (grown[0], grown[1])
    return _power_table[0][:size], _power_table[1][:size]


class _Table:
    """Hash of a window -> places in the indexed texts."""

    def __init__(self, hashes: np.ndarray, places: np.ndarray) -> None:
        order = np.argsort(hashes, kind="stable")
        self.hashes, self.places = hashes[order], places[order]
        bits = max(12, int(hashes.size * 32).bit_length())  # one slot in 32 is taken: 3% of windows are looked up
        self.shift = np.uint64(64 - bits)
        self.taken = np.zeros(1 << bits, bool)
        self.taken[(self.hashes * _SPREAD) >> self.shift] = True

    def find(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs (window, place) with equal hashes, ordered by window."""
        likely = np.flatnonzero(self.taken[(windows * _SPREAD) >> self.shift])
        low = np.searchsorted(self.hashes, windows[likely])
        hit = self.hashes[np.minimum(low, self.hashes.size - 1)] == windows[likely]
        likely, low = likely[hit], low[hit]
        count = np.searchsorted(self.hashes, windows[likely], side="right") - low
        offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        return np.repeat(likely, count), self.places[np.repeat(low, count) + offset]


@dataclass(frozen=True)
class Match:
    """Words [start, start + length) of indexed text ``text`` occur in a row in document ``document`` of the batch."""

    document: int
    text: int
    start: int
    length: int


class Index:
    """Finds runs of n or more words of the indexed texts, and texts of fewer than n words as a whole.

    Args:
        texts: what to look for.
        n: words in a row that count as a match.
        shortest: texts of fewer words are not looked for (``unchecked``).
        most_sharing: n-grams that more than so many different texts contain are the benchmark's boilerplate ("Write a
            function to"); they do not count as a match by themselves, only as part of a longer one. A text that has no
            other n-grams keeps them.

    Attributes:
        lengths: words of each text.
        boilerplate: how many different n-grams were set aside.
        unchecked: numbers of the texts that are too short.
    """

    def __init__(self, texts: Sequence[str], n: int = 13, shortest: int = 4, most_sharing: int = 10) -> None:
        if not texts:
            raise ValueError("an index needs at least one text")
        if n < 2 or shortest < 1:
            raise ValueError(f"n is {n} and shortest {shortest}; n must be at least 2, shortest at least 1")
        self.n = n
        self.words = Words([normalise(text) for text in texts])
        self.firsts = self.words.firsts[:-1]
        self.lengths = np.diff(self.words.firsts) - 1
        self.listed = self.words.between(0, len(self.words.starts))
        self.unchecked = [int(i) for i in np.flatnonzero(self.lengths < min(shortest, n))]
        self.owner = np.repeat(np.arange(len(texts)), self.lengths + 1)
        short: dict[int, list[int]] = defaultdict(list)
        for i, length in enumerate(self.lengths.tolist()):
            if min(shortest, n) <= length < n:
                short[length].append(int(self.firsts[i]))
        self.tables: dict[int, _Table] = {}
        self.boilerplate = 0
        for length, window in self.words.windows(n):
            if length in short:
                places = np.array(short[length])
                self.tables[length] = _Table(window[places], places)
            if length == n and (self.lengths >= n).any():
                places = self._telling(window, most_sharing)
                self.tables[n] = _Table(window[places], places)

    def _telling(self, window: np.ndarray, most_sharing: int) -> np.ndarray:
        """Where the n-grams are that identify a text."""
        starts = np.arange(len(window))
        owner = self.owner[starts]
        places = starts[starts + self.n < (self.firsts + self.lengths + 1)[owner]]
        _, gram = np.unique(window[places], return_inverse=True)
        # Copies of a text (a problem in two suites) are one text here.
        first_of: dict[bytes, int] = {}
        bounds = zip(self.firsts.tolist(), (self.firsts + self.lengths).tolist(), strict=True)
        kind = np.array([first_of.setdefault(b" ".join(self.listed[a:b]), i) for i, (a, b) in enumerate(bounds)])
        pairs = np.unique(np.stack([gram, kind[self.owner[places]]]), axis=1)
        shared = np.bincount(pairs[0], minlength=int(gram.max()) + 1) > most_sharing
        self.boilerplate = int(shared.sum())
        telling = ~shared[gram]
        has_telling = np.zeros(len(self.lengths), bool)
        has_telling[self.owner[places[telling]]] = True
        return places[telling | ~has_telling[self.owner[places]]]

    def search(self, texts: Sequence[str]) -> list[Match]:
        """All matches in a batch of documents, maximal on both sides, ordered by document."""
        found: list[Match] = []
        if not texts:
            return found
        batch = Words([normalise(text) for text in texts])
        for length, window in batch.windows(self.n):
            if length in self.tables:
                at, place = self.tables[length].find(window)
                if at.size:
                    found += self._verified(batch, length, at, place)
        return sorted(found, key=lambda match: match.document)

    def _verified(self, batch: Words, length: int, at: np.ndarray, place: np.ndarray) -> Iterator[Match]:
        """Compares words, and makes one match of neighbouring windows."""
        document = np.searchsorted(batch.firsts, at, side="right") - 1
        order = np.lexsort((at, at - place))
        reach: Counter[int] = Counter()  # first word past the last match on the diagonal, a document and a text's shift
        for i in order.tolist():
            a, p, d = int(at[i]), int(place[i]), int(document[i])
            if a + length <= reach[a - p]:
                continue
            t = int(self.owner[p])
            low, high = int(self.firsts[t]), int(self.firsts[t] + self.lengths[t])
            if batch.between(a, a + length) != self.listed[p : p + length]:
                continue
            if length < self.n:
                if batch.symbols(a, a + length) == self.words.symbols(p, p + length):
                    yield Match(d, t, 0, length)
                continue
            left = right = 0
            while p - left > low and batch.word(a - left - 1) == self.listed[p - left - 1]:
                left += 1
            while p + length + right < high and batch.word(a + length + right) == self.listed[p + length + right]:
                right += 1
            reach[a - p] = a + length + right
            yield Match(d, t, p - left - low, left + length + right)
