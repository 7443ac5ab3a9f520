"""Token ids and log-probs as bytes: what a request for scores, one for completions, and completions are made of.

All three are frames (:mod:`llmdistill.wire.protocol`): a JSON object of settings, then little-endian arrays. As JSON
the 64 ids a caller chooses at a position are 473 bytes; here they are 144 at V = 151,936. And nothing in an array has
to be parsed: JSON of 8 MiB keeps a Python process from doing anything else for seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from llmdistill.wire.packing import pack_bits, packed_size, unpack_bits
from llmdistill.wire.protocol import FrameError, pack_frames, unpack_frames

HEAD_BYTES = 1 << 16  # of the settings of a request
Finish = Literal["stop", "length"]
FINISH: tuple[Finish, ...] = get_args(Finish)  # by the number that stands for it
Ids = NDArray[np.int32]


class BodyError(ValueError):
    """Bytes that are no such body."""


@dataclass(frozen=True)
class Sequences:
    """Sequences of ids, some of whose positions are to be scored.

    Attributes:
        settings: everything that is no array.
        ids: of each sequence, [T].
        positions: first and last + 1 scored token of each sequence, [n, 2].
        chosen: ids to list at each scored position of each sequence, [stop - start, C], -1 where there are fewer.
    """

    settings: dict[str, Any]
    ids: list[Ids]
    positions: NDArray[np.int64]
    chosen: list[Ids] | None = None


@dataclass(frozen=True)
class Prompts:
    """Prompts to be completed; ``rows`` number them for their seeds."""

    settings: dict[str, Any]
    ids: list[Ids]
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Completions:
    """Samples, those of one prompt adjacent: ids, the log-prob of each in the distribution drawn from, and the end."""

    settings: dict[str, Any]
    ids: list[Ids]
    logprobs: list[NDArray[np.float32]]
    finish: list[Finish]


def chosen_bits(vocab_size: int) -> int:
    """Of one chosen id: 0 stands for none, id + 1 for an id."""
    return vocab_size.bit_length()


def chosen_bytes(rows: int, columns: int, vocab_size: int) -> int:
    """Of a table of chosen ids in a body."""
    return packed_size(rows * columns, chosen_bits(vocab_size))


def pack_sequences(
    settings: Mapping[str, Any],
    ids: Sequence[Ids],
    positions: Sequence[tuple[int, int]],
    chosen: Sequence[Ids] | None,
    vocab_size: int,
) -> bytes:
    """The body of a request for scores. Fields as of :class:`Sequences`."""
    head, frames = dict(settings), list[bytes]()
    if chosen is not None:
        table_NC = np.concatenate(chosen) if chosen else np.zeros((0, 0), np.int32)
        head |= {"columns": table_NC.shape[1], "vocab_size": vocab_size}
        frames = [pack_bits(table_NC.astype(np.int64) + 1, chosen_bits(vocab_size))]
    spans = np.asarray(positions, "<u4").reshape(-1, 2)
    return pack_frames([_head(head), *_ragged(ids, "<i4"), spans.tobytes(), *frames])


def unpack_sequences(data: bytes | memoryview, *, max_cells: int) -> Sequences:
    """The inverse of :func:`pack_sequences`.

    Args:
        max_cells: chosen ids that are accepted, before anything is allocated for them.

    Raises:
        BodyError: it is no such body, or has more chosen ids.
    """
    settings, (lengths, flat, spans, *rest) = _frames(data, 4)
    ids = _split(flat, lengths, "<i4")
    positions = _array(spans, "<u4", 2 * len(ids)).reshape(-1, 2).astype(np.int64)
    if "columns" not in settings:
        if rest:
            raise BodyError("it has a table of chosen ids and no 'columns'")
        return Sequences(settings, ids, positions)
    columns, vocab = settings.pop("columns"), settings.pop("vocab_size", None)
    counts = positions[:, 1] - positions[:, 0]
    if type(columns) is not int or type(vocab) is not int or columns < 0 or not 0 < vocab < 1 << 30 or len(rest) != 1:
        raise BodyError("'columns', 'vocab_size' and one table go together where ids are chosen")
    if (counts < 0).any() or (rows := int(counts.sum())) * columns > max_cells:
        raise BodyError(f"it chooses more than {max_cells} ids, or for a negative number of positions")
    if len(rest[0]) != chosen_bytes(rows, columns, vocab):
        raise BodyError(f"its table of {rows} x {columns} chosen ids has {len(rest[0])} bytes")
    table_NC = unpack_bits(rest[0], rows * columns, chosen_bits(vocab)).reshape(rows, columns) - np.int32(1)
    if table_NC.size and int(table_NC.max()) >= vocab:
        raise BodyError(f"an id of {int(table_NC.max())} is chosen; ids go from 0 to {vocab - 1}")
    return Sequences(settings, ids, positions, np.split(table_NC, np.cumsum(counts)[:-1]) if len(ids) else [])


def pack_prompts(settings: Mapping[str, Any], ids: Sequence[Ids], rows: Sequence[int]) -> bytes:
    """The body of a request for completions."""
    return pack_frames([_head(settings), *_ragged(ids, "<i4"), np.asarray(rows, "<i8").tobytes()])


def unpack_prompts(data: bytes | memoryview) -> Prompts:
    """The inverse of :func:`pack_prompts`.

    Raises:
        BodyError: it is no such body.
    """
    settings, (lengths, flat, rows) = _frames(data, 4, exactly=True)
    ids = _split(flat, lengths, "<i4")
    return Prompts(settings, ids, _array(rows, "<i8", len(ids)).astype(np.int64))


def pack_completions(
    settings: Mapping[str, Any], ids: Sequence[Any], logprobs: Sequence[Any], finish: Sequence[str]
) -> bytes:
    """An answer; the fields of :class:`Completions`."""
    lengths, flat = _ragged([np.asarray(one, "<i4") for one in ids], "<i4")
    _, values = _ragged([np.asarray(one, "<f4") for one in logprobs], "<f4")
    ends = np.asarray([FINISH.index(one) for one in finish], np.uint8)  # type: ignore[arg-type]
    return pack_frames([_head(settings), lengths, flat, values, ends.tobytes()])


def unpack_completions(data: bytes | memoryview) -> Completions:
    """The inverse of :func:`pack_completions`.

    Raises:
        BodyError: it is no such answer.
    """
    settings, (lengths, flat, values, ends) = _frames(data, 5, exactly=True)
    ids = _split(flat, lengths, "<i4")
    finish = _array(ends, "u1", len(ids))
    if len(finish) and int(finish.max()) >= len(FINISH):
        raise BodyError(f"a completion ended with {int(finish.max())}; known are 0 ({FINISH[0]}) and 1 ({FINISH[1]})")
    return Completions(settings, ids, _split(values, lengths, "<f4"), [FINISH[i] for i in finish])


def _head(settings: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(settings)).encode()


def _ragged(rows: Sequence[NDArray[Any]], dtype: str) -> list[bytes]:
    """Lengths, and everything one after another."""
    flat = np.concatenate(rows).astype(dtype) if rows else np.zeros(0, dtype)
    return [np.asarray([len(row) for row in rows], "<u4").tobytes(), flat.tobytes()]


def _frames(data: bytes | memoryview, least: int, exactly: bool = False) -> tuple[dict[str, Any], list[memoryview]]:
    try:
        found = list(unpack_frames(data, max_frames=least + 1))
        if len(found) < least or (exactly and len(found) != least):
            raise BodyError(f"it has {len(found)} frames; {least} are needed")
        if len(found[0]) > HEAD_BYTES:
            raise BodyError(f"its settings have {len(found[0])} bytes; at most {HEAD_BYTES}")
        settings = json.loads(bytes(found[0]))
    except (FrameError, ValueError, RecursionError) as error:
        raise error if isinstance(error, BodyError) else BodyError(str(error)) from None
    if not isinstance(settings, dict):
        raise BodyError("its first frame is no JSON object")
    return settings, found[1:]


def _split(flat: memoryview, lengths: memoryview, dtype: str) -> list[NDArray[Any]]:
    if len(lengths) % 4:
        raise BodyError(f"{len(lengths)} bytes of lengths; each has 4")
    counts = np.frombuffer(lengths, "<u4").astype(np.int64)
    values = _array(flat, dtype, int(counts.sum()))
    return list(np.split(values, np.cumsum(counts)[:-1])) if len(counts) else []


def _array(data: memoryview, dtype: str, count: int) -> NDArray[Any]:
    if len(data) != count * np.dtype(dtype).itemsize:
        raise BodyError(f"an array of {count} numbers has {len(data)} bytes")
    return np.frombuffer(data, dtype)
