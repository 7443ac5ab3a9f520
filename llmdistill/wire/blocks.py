"""Score blocks: what a teacher says about one sequence (DESIGN idea 4: the wire format is the disk format).

A block as bytes, version 1, everything little-endian::

    "LDSB"                                              magic
    u16 version, u8 flags, u8 support                   flags: 1 the log-probs are 16-bit, 2 some ids are padding
    u32 start, stop, n, K, V, f64 temperature           positions, rows, columns, vocabulary
    u8 length + UTF-8, twice                            fingerprints of teacher and tokenizer
    f32 [n]                                             log-probs of the sequence's own tokens
    [n, K] ids at ceil(log2 V) bits                     padded: id + 1 at ceil(log2(V + 1)) bits; see packing
    f32 [n, K]                                          listed log-probs, or
    f32 [n], u8 [n], u16 [n, K - 1]                     the same in 16 bits: tops, exponents, codes; see packing
    u32                                                 CRC-32 of everything before

Where K = V and nothing is padding no ids are written: the log-probs (then K codes a row) lie in the order of ids. At
K = 64, V = 151,936 a token takes 279 bytes in 16 bits, 404 in float32; the rest is about 80 bytes a block.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmdistill.wire.packing import (
    MAX_EXPONENT,
    MIN_EXPONENT,
    by_id,
    from_codes,
    pack_bits,
    packed_size,
    ranked,
    row_chunks,
    to_codes,
    unpack_bits,
)

FORMAT_VERSION = 1

Support = Literal["teacher", "caller", "union"]

_MAGIC = b"LDSB"
_START = struct.Struct("<4sH")
_FIELDS = struct.Struct("<BBIIIIId")
_CRC = struct.Struct("<I")
_SHORT, _PADDED = 1, 2  # flags
_SUPPORTS: tuple[Support, ...] = get_args(Support)
_DTYPES = {"float32": 0, "float16": _SHORT}
_ROUNDING = 1e-4  # a log-softmax, or a mean of several, may end this far above 0 where it should be 0


class BlockError(ValueError):
    """Bytes that are no score block: damaged, cut off, of another version, contradictory, or over a limit."""


@dataclass(frozen=True)
class BlockHeader:
    """Who scored, with which vocabulary, and how the numbers are to be read."""

    teacher: str  # fingerprint of the teacher's weights
    tokenizer: str  # fingerprint of its vocabulary
    top_k: int  # columns of the block, K
    vocab_size: int
    dtype: str = "float32"  # of the listed log-probs as encoded: "float32" as they are, "float16" in 16 bits each
    temperature: float = 1.0  # temperature of every log-prob in the block
    support: Support = "teacher"  # who chose the listed tokens; "union": the teacher's top-k and the caller's
    version: int = FORMAT_VERSION


@dataclass(frozen=True)
class ScoreBlock:
    """One sequence's teacher evidence. n counted tokens, K listed candidates.

    The tail mass ``1 - sum(exp(topk_logprobs))`` is never stored: it is always derivable. The listed ids of a row are
    distinct; a row with fewer than K of them is padded at its end with id -1 and log-prob -inf.
    """

    positions: slice  # first to last counted token of the sequence; n is smaller where tokens between do not count
    token_logprobs: Tensor  # [n] float32, log p_T(token at t | before t)
    topk_ids: Tensor  # [n, K] int32, sorted by log-prob, descending
    topk_logprobs: Tensor  # [n, K] float32, log-softmax over the FULL vocabulary
    header: BlockHeader


def encode(block: ScoreBlock, dtype: str | None = None) -> bytes:
    """The block as bytes.

    Args:
        dtype: of the listed log-probs: "float32" keeps every bit of them, "float16" is 16 bits each (the row-scaled
            code of :mod:`~llmdistill.wire.packing`, not IEEE halves: those move divergences by several 1e-3 nats).
            None: ``block.header.dtype``. The log-probs of the sequence's own tokens are always float32.

    Raises:
        ValueError: the block is not as :class:`ScoreBlock` says. Log-probs up to 1e-4 above 0 are rounding, and
            written as 0.
    """
    header, short = block.header, _flag_of(block.header.dtype if dtype is None else dtype)
    n, k, vocab = len(block.token_logprobs), header.top_k, header.vocab_size
    token_lp, ids, listed = _checked(block, n)
    padded = bool((ids < 0).any())
    dense = _is_dense(k, vocab, padded)
    fields = _FIELDS.pack(
        short | (_PADDED if padded else 0),
        _SUPPORTS.index(header.support),
        block.positions.start,
        block.positions.stop,
        n,
        k,
        vocab,
        header.temperature,
    )
    names = [name.encode() for name in (header.teacher, header.tokenizer)]
    if max(map(len, names)) > 255:
        raise ValueError(f"fingerprints of {[len(name) for name in names]} bytes; a block holds at most 255 each")
    parts = [_START.pack(_MAGIC, FORMAT_VERSION), fields, *(bytes([len(name)]) + name for name in names)]
    parts.append(token_lp.tobytes())
    if k and not dense:
        parts.append(pack_bits(ids + np.int32(padded), _bits(vocab, padded)))
    if k and short:
        tops, exponents, codes = to_codes(listed)
        codes = by_id(codes, ids) if dense else np.ascontiguousarray(codes[:, 1:])
        parts += [tops.tobytes(), exponents.tobytes(), codes.tobytes()]
    elif k:
        parts.append((by_id(listed, ids) if dense else listed).tobytes())
    body = b"".join(parts)
    return body + _CRC.pack(zlib.crc32(body))


def decode(
    data: bytes | bytearray | memoryview, *, max_positions: int = 1 << 20, max_bytes: int = 1 << 32
) -> ScoreBlock:
    """The block in ``data``. ``header.dtype`` tells how its log-probs were encoded; its tensors are float32 and int32.

    Args:
        max_positions: rows that are accepted.
        max_bytes: size of the tensors that is accepted. They are at most 4 times as large as ``data``.

    Raises:
        BlockError: for whatever is wrong with the bytes. Nothing is allocated before the declared sizes are found to
            fit ``data`` and the limits.
    """
    view = memoryview(data).cast("B")
    at = _START.size + _FIELDS.size
    if len(view) < at + 2 + _CRC.size:
        raise BlockError(f"{len(view)} bytes; a score block has at least {at + 2 + _CRC.size}")
    magic, version = _START.unpack_from(view)
    if magic != _MAGIC:
        raise BlockError(f"starts with {magic!r}; a score block starts with {_MAGIC!r}")
    if version != FORMAT_VERSION:
        raise BlockError(f"score block of version {version}; version {FORMAT_VERSION} is read. Fix: update llmdistill")
    (crc,) = _CRC.unpack_from(view, len(view) - _CRC.size)
    if zlib.crc32(view[: -_CRC.size]) != crc:
        raise BlockError(f"a score block of {len(view)} bytes is damaged: its checksum differs")
    return _layout(view, at, max_positions, max_bytes).read()


class _Layout(NamedTuple):
    """A block whose header makes sense and whose sizes fit; nothing of its arrays has been looked at."""

    payload: memoryview
    positions: slice
    n: int
    header: BlockHeader
    padded: bool

    def size(self) -> int:
        """Bytes that the arrays take."""
        n, k, vocab = self.n, self.header.top_k, self.header.vocab_size
        if not k:
            return 4 * n
        dense = _is_dense(k, vocab, self.padded)
        ids = 0 if dense else packed_size(n * k, _bits(vocab, self.padded))
        return 4 * n + ids + (n * (5 + 2 * (k if dense else k - 1)) if self.short() else 4 * n * k)

    def short(self) -> bool:
        return self.header.dtype == "float16"

    def read(self) -> ScoreBlock:
        n, k, vocab = self.n, self.header.top_k, self.header.vocab_size
        reader = _Reader(self.payload)
        token_lp = reader.array(np.float32, n).copy()
        if not bool((token_lp <= 0).all()):
            raise BlockError("a log-prob of the sequence's own tokens is positive or not a number")
        if not k or not n:
            ids, listed = np.zeros((n, k), np.int32), np.zeros((n, k), np.float32)
        elif _is_dense(k, vocab, self.padded):
            ids, listed = self._read_dense(reader)
        else:
            bits = _bits(vocab, self.padded)
            packed = reader.bytes(packed_size(n * k, bits))
            if n * k * bits % 8 and packed[-1] >> n * k * bits % 8:
                raise BlockError("bits after the last id")
            ids = unpack_bits(packed, n * k, bits).reshape(n, k)
            ids -= np.int32(self.padded)
            listed = self._read_listed(reader)
            _check_ids(ids, listed, vocab, self.padded, BlockError)
        if self.padded and not bool((ids < 0).any()):
            raise BlockError("declares padding and has none")
        token_logprobs, topk_ids, topk_logprobs = (torch.from_numpy(array) for array in (token_lp, ids, listed))
        return ScoreBlock(self.positions, token_logprobs, topk_ids, topk_logprobs, self.header)

    def _read_listed(self, reader: _Reader) -> NDArray[np.float32]:
        n, k = self.n, self.header.top_k
        if not self.short():
            listed = reader.array(np.float32, n, k).copy()
        else:
            tops, exponents = self._read_tops(reader)
            codes = np.zeros((n, k), np.uint16)
            codes[:, 1:] = reader.array(np.uint16, n, k - 1)
            listed = from_codes(tops, exponents, codes)
        _check_order(listed, BlockError)
        return listed

    def _read_dense(self, reader: _Reader) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        n, k = self.n, self.header.top_k
        if self.short():
            tops, exponents = self._read_tops(reader)
            ids, codes = ranked(reader.array(np.uint16, n, k))
            if codes[:, 0].any():
                raise BlockError("a row of codes without its likeliest token")
            return ids, from_codes(tops, exponents, codes)
        columns = reader.array(np.float32, n, k)
        if not bool((columns <= 0).all()):
            raise BlockError("a listed log-prob is positive or not a number")
        return ranked(columns)

    def _read_tops(self, reader: _Reader) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        tops, exponents = reader.array(np.float32, self.n), reader.array(np.uint8, self.n)
        if exponents.min() < MIN_EXPONENT or exponents.max() > MAX_EXPONENT:
            raise BlockError(f"an exponent outside {MIN_EXPONENT} to {MAX_EXPONENT}")
        if not bool((tops <= 0).all()):
            raise BlockError("a listed log-prob is positive or not a number")
        return tops, exponents


class _Reader:
    """Arrays one after another, without copying."""

    def __init__(self, view: memoryview) -> None:
        self.view, self.at = view, 0

    def bytes(self, size: int) -> memoryview:
        self.at += size
        return self.view[self.at - size : self.at]

    def array(self, dtype: type[np.generic], *shape: int) -> NDArray[Any]:
        return np.frombuffer(self.bytes(math.prod(shape) * np.dtype(dtype).itemsize), dtype).reshape(shape)


def fingerprints(view: memoryview, at: int, end: int, whose: Sequence[str]) -> tuple[list[str], int]:
    """The fingerprints that stand from ``at`` on, each behind a byte with its length, and where they end.

    Raises:
        BlockError: one runs past ``end``, or is no text.
    """
    names = list[str]()
    for what in whose:
        if at >= end or at + 1 + view[at] > end:
            raise BlockError(f"the {what}'s fingerprint runs past the end")
        try:
            names.append(str(view[at + 1 : at + 1 + view[at]], "utf-8"))
        except UnicodeDecodeError:
            raise BlockError(f"the {what}'s fingerprint is no UTF-8") from None
        at += 1 + view[at]
    return names, at


def _layout(view: memoryview, at: int, max_positions: int, max_bytes: int) -> _Layout:
    """Reads everything before the arrays. ``view`` holds at least the fixed part, a CRC and two bytes."""
    flags, support, start, stop, n, k, vocab, temperature = _FIELDS.unpack_from(view, _START.size)
    if flags & ~(_SHORT | _PADDED) or support >= len(_SUPPORTS):
        raise BlockError(f"flags {flags} and support {support}; known are flags up to 3 and support up to 2")
    end = len(view) - _CRC.size
    names, at = fingerprints(view, at, end, ("teacher", "tokenizer"))
    _check_header(start, stop, n, k, vocab, temperature, BlockError)
    if n > max_positions:
        raise BlockError(f"{n} positions; at most {max_positions} are accepted")
    if 4 * n + 8 * n * k > max_bytes:
        raise BlockError(f"{4 * n + 8 * n * k} bytes of tensors; at most {max_bytes} are accepted")
    dtype = "float16" if flags & _SHORT else "float32"
    header = BlockHeader(names[0], names[1], k, vocab, dtype, temperature, _SUPPORTS[support])
    layout = _Layout(view[at:end], slice(start, stop), n, header, bool(flags & _PADDED))
    if layout.size() != end - at:
        raise BlockError(f"n = {n}, K = {k}, V = {vocab} take {layout.size()} bytes of arrays, there are {end - at}")
    return layout


def _checked(block: ScoreBlock, n: int) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]:
    """The block's arrays, if it is as it should be."""
    header, k = block.header, block.header.top_k
    if header.version != FORMAT_VERSION:
        raise ValueError(f"header.version is {header.version}; version {FORMAT_VERSION} is written")
    if header.support not in _SUPPORTS:
        raise ValueError(f"header.support is {header.support!r}; it must be one of {', '.join(_SUPPORTS)}")
    start, stop, step = block.positions.start, block.positions.stop, block.positions.step
    if not (isinstance(start, int) and isinstance(stop, int) and 0 <= start <= stop < 1 << 32 and step in (None, 1)):
        raise ValueError(f"positions are {block.positions}; they must be a slice from start to stop, in steps of 1")
    _check_header(start, stop, n, k, header.vocab_size, header.temperature, ValueError)
    for name, shape in (("token_logprobs", (n,)), ("topk_ids", (n, k)), ("topk_logprobs", (n, k))):
        if (found := tuple(getattr(block, name).shape)) != shape:
            raise ValueError(f"{name} has shape {found}; with n = {n} tokens and top_k {k} it must be {shape}")
    if block.topk_ids.is_floating_point():
        raise ValueError(f"topk_ids are {block.topk_ids.dtype}; they must be integers")
    if k and n and not -1 <= int(block.topk_ids.min()) <= int(block.topk_ids.max()) < header.vocab_size:
        raise ValueError(
            f"topk_ids are {int(block.topk_ids.min())} to {int(block.topk_ids.max())}; "
            f"they must lie in [-1, {header.vocab_size})"
        )
    token_lp, listed = (_log_probs(getattr(block, name), name) for name in ("token_logprobs", "topk_logprobs"))
    ids = block.topk_ids.detach().to("cpu", torch.int32).contiguous().numpy()
    _check_order(listed, ValueError)
    _check_ids(ids, listed, header.vocab_size, True, ValueError)
    return token_lp, ids, listed


def _log_probs(logprobs: Tensor, name: str) -> NDArray[np.float32]:
    values: NDArray[np.float32] = logprobs.detach().to("cpu", torch.float32).contiguous().numpy()
    if not bool((values <= _ROUNDING).all()):
        raise ValueError(f"{name} holds {values[~(values <= _ROUNDING)][0]}; log-probs are at most 0, and numbers")
    return np.minimum(values, 0.0, dtype=np.float32) if bool((values > 0).any()) else values


def _check_header(
    start: int, stop: int, n: int, k: int, vocab: int, temperature: float, error: type[ValueError]
) -> None:
    if n > stop - start or (n == 0) != (stop == start):
        raise error(f"{n} counted tokens at positions {start} to {stop}; they must fit, and both ends count")
    if not 0 <= k <= vocab or not 0 < vocab < 1 << 31:
        raise error(f"top_k is {k} and vocab_size {vocab}; needed: 0 <= K <= V, 1 <= V < 2**31")
    if not (math.isfinite(temperature) and temperature > 0):
        raise error(f"temperature is {temperature}; it must be a positive number")


def _check_order(listed_nK: NDArray[np.float32], error: type[ValueError]) -> None:
    """At most 0, descending, numbers: a NaN fails one of the comparisons."""
    if not bool((listed_nK[:, :1] <= 0).all() and (listed_nK[:, :-1] >= listed_nK[:, 1:]).all()):
        raise error("a row of listed log-probs is not in descending order, positive or not a number")


def _check_ids(
    ids_nK: NDArray[np.int32], listed_nK: NDArray[np.float32], vocab: int, padded: bool, error: type[ValueError]
) -> None:
    """Below V, none twice, and padding only at the end of a row and at -inf."""
    if not ids_nK.size:
        return
    if ids_nK.max() >= vocab:
        raise error(f"id {ids_nK.max()} is listed; the vocabulary has {vocab}")
    for rows in row_chunks(*ids_nK.shape):
        in_order = np.sort(ids_nK[rows], axis=1)
        again = in_order[:, 1:] == in_order[:, :-1]
        if (again & (in_order[:, 1:] >= 0) if padded else again).any():
            raise error("a row lists an id twice")
    if padded:
        pad_nK = ids_nK < 0
        if (pad_nK[:, :-1] & ~pad_nK[:, 1:]).any() or (listed_nK[pad_nK] != -np.inf).any():
            raise error("padding (id -1) stands before a listed id, or its log-prob is not -inf")


def _flag_of(dtype: str) -> int:
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be 'float32' or 'float16'")
    return _DTYPES[dtype]


def _is_dense(k: int, vocab: int, padded: bool) -> bool:
    """All ids are listed, so that none needs to be written."""
    return k == vocab and not padded


def _bits(vocab: int, padded: bool) -> int:
    """Of one id in a list that is not dense: at least 1."""
    return (vocab if padded else vocab - 1).bit_length()
