"""Near duplicates among more rows than memory holds: MinHash signatures and locality-sensitive hashing.

What is compared are the sets of n words in a row of two texts (words as ``llmdistill.evals.ngrams`` reads them: case,
punctuation and LaTeX's spacing do not matter; here the signs of arithmetic are words, too): their Jaccard similarity
|A and B| / |A or B|. The minima of 112 hash functions over a set agree in the share of places that is the similarity
(Broder 1997). Signatures that agree in one of 14 bands of 8 are looked at, so that a pair of similarity s is found with
probability 1 - (1 - s^8)^14 (0.56 at 0.7, 0.92 at 0.8, 1 - 4e-4 at 0.9), and count as duplicates if whole signatures
agree in ``threshold`` of their places, an estimate with a standard error of at most 0.05.

The later row of a pair goes. What went is near to a row that stayed, or to one that went because of such a row, and
so on. Of rows that share a band with many others the first 32 of them that are not near to each other take away what
is near to them. Texts shorter than n words are duplicates if they are equal but for spaces and the case of letters.

A row takes 224 bytes of signature, which lie in a file; while a band is looked at its keys take some 50 bytes of memory
a row.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from llmdistill.evals.ngrams import Words, batches, normalise

BANDS, ROWS = 14, 8
_HASHES = BANDS * ROWS
_MOST = 32  # rows of a bucket that the others are compared with
_FACTORS = np.random.default_rng(20261129).integers(1, 2**63, _HASHES, np.uint64) * np.uint64(2) + np.uint64(1)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
# "57 + 87" is not "57 - 87", which words of letters and digits alone would not tell apart
_SIGNS = {
    ord(sign): f" sign{i} "
    for i, signs in enumerate(("+", "-−", "*×·", "/÷", "=", "<≤", ">≥", "^", "%"))
    for sign in signs
}
_PAIRS = 200_000  # signatures compared at a time


@dataclass(frozen=True)
class Duplicate:
    """Row ``row`` repeats the earlier row ``of``; ``similarity`` is the estimate, 1.0 for equal words."""

    row: int
    of: int
    similarity: float


def near_duplicates(
    texts: Iterable[str],
    *,
    threshold: float = 0.8,
    n: int = 5,
    folder: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Duplicate]:
    """The rows to leave out, in order; see the module for which they are.

    Args:
        texts: of the rows, in order; read once.
        threshold: least similarity of duplicates, in (0, 1].
        n: words in a row.
        folder: where the signatures lie while this runs; the system's folder for temporary files when None.
        progress: called with the number of rows hashed, after each batch.

    Raises:
        ValueError: ``threshold`` outside (0, 1], or n < 1.
    """
    if not 0 < threshold <= 1 or n < 1:
        raise ValueError(f"threshold is {threshold} and n {n}; threshold must be in (0, 1] and n at least 1")
    with tempfile.TemporaryFile(dir=folder) as file:
        rows = 0
        for batch in batches(texts, str):
            file.write(signatures(batch, n).tobytes())
            rows += len(batch)
            if progress:
                progress(rows)
        if rows < 2:
            return []
        file.flush()
        signature = np.memmap(file, np.uint16, "r", shape=(rows, _HASHES))
        return sorted(_dropped(signature, threshold), key=lambda duplicate: duplicate.row)


def signatures(texts: list[str], n: int) -> np.ndarray:
    """[len(texts), 112] uint16: of each text the minima of 112 hash functions over its runs of n words."""
    raw = [normalise(text.translate(_SIGNS)) for text in texts]
    words = Words(raw)
    lengths = np.diff(words.firsts) - 1
    windows = next(w for length, w in words.windows(n) if length == n) if len(words.hashes) >= n else words.hashes[:0]
    owner = np.repeat(np.arange(len(texts)), lengths + 1)[: len(windows)]
    inside = np.arange(len(windows)) + n <= (words.firsts[:-1] + lengths)[owner]
    windows, owner = windows[inside], owner[inside]
    windows = (windows ^ (windows >> np.uint64(31))) * _MIX
    windows ^= windows >> np.uint64(29)
    found = np.empty((len(texts), _HASHES), np.uint16)
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    there = owner[starts]
    for i in range(_HASHES) if len(starts) else ():
        # the middle bits of a minimum: its high ones are zero, the low ones of a product are weak
        found[there, i] = (np.minimum.reduceat(windows * _FACTORS[i], starts) >> np.uint64(24)).astype(np.uint16)
    for i in np.flatnonzero(lengths < n).tolist():  # too short for a run: the whole text is its only element
        whole = b" ".join((raw[i] if lengths[i] else texts[i].encode("utf-8", "replace")).split())
        seed = int.from_bytes(blake2b(whole, digest_size=8).digest(), "big")
        found[i] = np.random.default_rng(seed).integers(0, 2**16, _HASHES, np.uint16)
    return found


def _dropped(signature: np.ndarray, threshold: float) -> Iterator[Duplicate]:
    """Band by band: in each bucket the first row that is still there takes those near to it away, then the next one."""
    here = np.ones(len(signature), bool)
    for band in range(BANDS):
        rows = np.flatnonzero(here)
        keys = np.ascontiguousarray(signature[rows, band * ROWS : (band + 1) * ROWS]).view(np.uint64)
        key = (keys[:, 0] * _MIX) ^ keys[:, 1]
        order = np.argsort(key, kind="stable")
        rows, bucket = rows[order], np.cumsum(np.diff(key[order], prepend=key[order][:1]) != 0)
        for _ in range(_MOST):
            size = np.bincount(bucket)
            shared = size[bucket] > 1
            rows, bucket = rows[shared], bucket[shared]
            if not len(rows):
                break
            first = np.flatnonzero(np.diff(bucket, prepend=-1))
            leader = np.repeat(rows[first], np.diff(np.append(first, len(rows))))
            similarity = _similarity(signature, rows, leader)
            near = (similarity >= threshold) & (rows != leader)
            here[rows[near]] = False
            for i in np.flatnonzero(near).tolist():
                yield Duplicate(int(rows[i]), int(leader[i]), float(similarity[i]))
            left = ~near & (rows != leader)
            rows, bucket = rows[left], bucket[left]


def _similarity(signature: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[len(a)] estimates, a bounded number of signatures at a time."""
    parts = [slice(start, start + _PAIRS) for start in range(0, len(a), _PAIRS)]
    return np.concatenate([(signature[a[part]] == signature[b[part]]).mean(1) for part in parts])
