"""Numbers in few bits: ids at ceil(log2 V) bits each, log-probs at 16. numpy only, whole arrays at a time.

**Ids** lie one after another, lowest bit first, without gaps: id i takes the bits [i b, (i + 1) b). Eight of them fill
b bytes, so lane j of all groups of eight starts at the same bit of its group: one strided view reads the whole lane.

**Log-probs** of a row are its likeliest one's, in float32, and the distances down from it as 16-bit multiples of a
power of two that the row chooses: log-prob k is ``top - code_k * 2**-exponent``. Three things follow which IEEE halves,
of the same size, do not give (there a log-prob of -8 is off by 0.004, and 1 - sum(exp(...)) by more than a small tail):

- the error is below 2**-12 for a row that spans less than 16 nats, 2**-11 for 32, 2**-10 for 64, in every column;
- ``top`` is chosen such that the listed mass, and so the tail, is that of the exact row to the precision of float32;
- a row in descending order stays in descending order, ties stay ties, and a single column is exact.

Distances above :data:`MAX_DISTANCE`, odds of 1e56 to 1, are cut to it; -inf stays -inf.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_EXPONENT, MAX_EXPONENT = 9, 24
NOTHING = 65535  # the code of log-prob -inf
MAX_CODE = NOTHING - 1
MAX_DISTANCE = MAX_CODE * 2.0**-MIN_EXPONENT  # 128 nats, nearly
_CELLS = 1 << 18  # worked on at a time: temporaries stay in the cache, and small beside a block of whole vocabularies


def packed_size(count: int, bits: int) -> int:
    """Bytes of ``count`` values."""
    return (count * bits + 7) // 8


def pack_bits(values: NDArray[Any], bits: int) -> bytes:
    """``values``, any shape, each in [0, 2**bits), bits in [1, 32]."""
    groups = -(-values.size // 8)
    flat = values.reshape(-1)
    if values.size % 8:
        flat = np.zeros(8 * groups, values.dtype)
        flat[: values.size] = values.reshape(-1)
    lanes_G8 = flat.reshape(groups, 8)
    words = -(-bits // 8)  # of 64 bits, that hold a group
    packed = np.zeros((groups, words), "<u8")
    for j in range(8):
        lane = lanes_G8[:, j].astype(np.uint64)
        word, shift = divmod(j * bits, 64)
        packed[:, word] |= lane << np.uint64(shift)
        if shift + bits > 64:
            packed[:, word + 1] |= lane >> np.uint64(64 - shift)
    return packed.view(np.uint8)[:, :bits].tobytes()[: packed_size(values.size, bits)]


def unpack_bits(data: memoryview, count: int, bits: int) -> NDArray[np.int32]:
    """The ``count`` values in ``data``, ``packed_size(count, bits)`` bytes, bits in [1, 31]."""
    groups = -(-count // 8)
    padded = np.zeros(groups * bits + 8, np.uint8)  # so that the last wide read stays inside
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    word = np.dtype("<u4" if bits <= 25 else "<u8")  # 7 bits of shift and the value
    values = np.empty((groups, 8), np.int32)
    for j in range(8):
        byte, shift = divmod(j * bits, 8)
        lane = np.ndarray((groups,), word, padded, byte, (bits,))
        values[:, j] = (lane >> word.type(shift)) & word.type((1 << bits) - 1)
    return values.reshape(-1)[:count]


def to_codes(logprobs_nK: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.uint16]]:
    """Rows in descending order -> top [n] float32, exponent [n] uint8, codes [n, K] uint16. K >= 1."""
    n, k = logprobs_nK.shape
    tops, exponents = np.empty(n, np.float32), np.empty(n, np.uint8)
    codes = np.empty((n, k), np.uint16)
    for rows in row_chunks(n, k):
        piece_nK = logprobs_nK[rows].astype(np.float32, copy=False)
        top_n1, nothing_nK = piece_nK[:, :1], None
        with np.errstate(invalid="ignore"):
            below_nK = piece_nK - top_n1  # NaN in rows that list nothing but -inf
        if not np.isfinite(below_nK[:, -1]).all():
            nothing_nK = ~np.isfinite(below_nK)
            nothing_nK[:, 0] = False
            below_nK[nothing_nK | np.isnan(below_nK)] = 0.0
        lowest_n1 = below_nK[:, -1:] if nothing_nK is None else below_nK.min(1, keepdims=True)
        if lowest_n1.min() < -MAX_DISTANCE:
            np.maximum(below_nK, np.float32(-MAX_DISTANCE), out=below_nK)
            lowest_n1 = np.maximum(lowest_n1, np.float32(-MAX_DISTANCE))
        finest_n1 = np.floor(np.log2(MAX_CODE / np.maximum(-lowest_n1.astype(np.float64), 2.0**-MAX_EXPONENT)))
        exponent_n1 = np.clip(finest_n1, MIN_EXPONENT, MAX_EXPONENT)
        code_nK = below_nK * (-(2.0**exponent_n1)).astype(np.float32)  # exact, as all that follows but exp
        np.rint(code_nK, out=code_nK)
        codes[rows] = code_nK
        if nothing_nK is not None:
            codes[rows][nothing_nK] = NOTHING
        # The row's sum over its likeliest entry, and what rounding adds to it: the top makes up for that. An entry
        # moves by e**-moved, of which two terms are enough: moved is at most 2**-10.
        moved_nK = code_nK
        moved_nK *= (2.0**-exponent_n1).astype(np.float32)
        moved_nK += below_nK
        share_nK = np.exp(below_nK, out=below_nK)
        if nothing_nK is not None:
            share_nK[nothing_nK] = 0.0
        sum_n = share_nK.sum(1, dtype=np.float32).astype(np.float64)
        half_nK = moved_nK * np.float32(0.5)
        half_nK -= np.float32(1.0)
        half_nK *= moved_nK
        added_n = np.einsum("nk,nk->n", share_nK, half_nK).astype(np.float64)
        tops[rows] = np.minimum(top_n1[:, 0] - np.log1p(added_n / sum_n), 0.0)
        exponents[rows] = exponent_n1[:, 0]
    return tops, exponents, codes


def from_codes(top_n: NDArray[Any], exponent_n: NDArray[Any], code_nK: NDArray[Any]) -> NDArray[np.float32]:
    """The rows' log-probs, [n, K]; the inverse of :func:`to_codes` up to its rounding."""
    step_n = np.ldexp(np.float32(1.0), -exponent_n.astype(np.int32))
    logprobs_nK = code_nK.astype(np.float32)
    logprobs_nK *= step_n[:, None]  # exact: 16 bits and a power of two
    np.subtract(top_n[:, None], logprobs_nK, out=logprobs_nK)
    if code_nK.size and code_nK.max() == NOTHING:
        logprobs_nK[code_nK == NOTHING] = -np.inf
    return logprobs_nK


def ranked(columns_nV: NDArray[Any]) -> tuple[NDArray[np.int32], NDArray[Any]]:
    """Each row from its likeliest column down, ties in column order: the columns' indices and what they hold, [n, V].

    Rows are codes, or log-probs in float32 (at most 0). 16-bit numbers are sorted by radix, 25 times as fast as floats:
    without their sign log-probs sort as 32-bit numbers, in two such passes.
    """
    order_nV, ranked_nV = np.empty(columns_nV.shape, np.int32), np.empty_like(columns_nV)
    for rows in row_chunks(*columns_nV.shape):
        piece_nV = columns_nV[rows]
        if piece_nV.dtype == np.float32:
            key_nV = np.abs(piece_nV).view(np.uint32)
            order = np.argsort(key_nV.astype(np.uint16), axis=1, kind="stable")  # by the lower half
            upper = np.take_along_axis((key_nV >> 16).astype(np.uint16), order, 1)
            order = np.take_along_axis(order, np.argsort(upper, axis=1, kind="stable"), 1)
        else:
            order = np.argsort(piece_nV, axis=1, kind="stable")
        order_nV[rows] = order
        ranked_nV[rows] = np.take_along_axis(piece_nV, order, 1)
    return order_nV, ranked_nV


def by_id(columns_nV: NDArray[Any], ids_nV: NDArray[np.int32]) -> NDArray[Any]:
    """The inverse of :func:`ranked`: each row in the order of its ids."""
    made_nV = np.empty_like(columns_nV)
    for rows in row_chunks(*columns_nV.shape):
        np.put_along_axis(made_nV[rows], ids_nV[rows].astype(np.int64), columns_nV[rows], 1)
    return made_nV


def row_chunks(n: int, k: int) -> list[slice]:
    """Slices of n rows of k cells, few enough cells each that float64 temporaries cost little."""
    rows = max(1, _CELLS // max(k, 1))
    return [slice(start, start + rows) for start in range(0, n, rows)]
