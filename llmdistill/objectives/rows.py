"""What the teacher says about N rows, in the forms the streaming engine can read a chunk at a time.

All are indexable by a slice or an index tensor over rows, so that a batch's rows split into micro-batches
(`rows[a:b]`), and none carries gradient. Those of a round wait on the host; `to` brings a micro-batch's to its device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from llmdistill.objectives.fused import compute_dtype
from llmdistill.objectives.projection import Projection, cast_head, matmul_dtype

Index = slice | Tensor


class TeacherRows(Protocol):
    @property
    def width(self) -> int | None:
        """Number of logit columns, or None where there are none."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Index) -> "TeacherRows": ...

    def to(self, device: torch.device | str) -> "TeacherRows":
        """The same rows there; the host goes on meanwhile, where they come from pinned memory."""
        ...

    def chunk(self, rows: slice, vocab_size: int | None) -> tuple[Tensor, ...]:
        """The objective's arguments after the student's logits, cut to these rows and vocab_size tokens."""


@runtime_checkable
class Nested(Protocol):
    """Rows that are made of others."""

    def over(self, change: Callable[[TeacherRows], TeacherRows]) -> TeacherRows:
        """The same of ``change(others)``."""
        ...


@dataclass(frozen=True, eq=False)
class LogitRows:
    """Logits that exist already; the objective takes (student_logits, logits)."""

    logits_NV: Tensor

    @property
    def width(self) -> int:
        return self.logits_NV.shape[-1]

    def __len__(self) -> int:
        return len(self.logits_NV)

    def __getitem__(self, index: Index) -> "LogitRows":
        return LogitRows(self.logits_NV[index])

    def to(self, device: torch.device | str) -> "LogitRows":
        return LogitRows(self.logits_NV.to(device, non_blocking=True))

    def chunk(self, rows: slice, vocab_size: int | None) -> tuple[Tensor, ...]:
        return (self.logits_NV.detach()[rows, :vocab_size],)


@dataclass(frozen=True, eq=False)
class HiddenRows:
    """Final hidden states, projected a chunk at a time; the objective takes (student_logits, logits).

    logit_scale and softcap are the teacher's own; see `Projection`.
    """

    hidden_NH: Tensor
    lm_head: nn.Linear
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def width(self) -> int:
        return self.lm_head.weight.shape[0]

    def __len__(self) -> int:
        return len(self.hidden_NH)

    def __getitem__(self, index: Index) -> "HiddenRows":
        return replace(self, hidden_NH=self.hidden_NH[index])

    def to(self, device: torch.device | str) -> "HiddenRows":
        return replace(self, hidden_NH=self.hidden_NH.to(device, non_blocking=True))

    @torch.no_grad()
    def chunk(self, rows: slice, vocab_size: int | None) -> tuple[Tensor, ...]:
        head = Projection.of(self.lm_head, self.hidden_NH.dtype, vocab_size, self.logit_scale, self.softcap)
        hidden_nH = self.hidden_NH[rows].to(self.lm_head.weight.device, non_blocking=True)
        return (head.rescale(head.matmul(hidden_nH)),)


@dataclass(frozen=True, eq=False)
class SparseRows:
    """Top-k evidence; the objective takes (student_logits, topk_ids, topk_logprobs), as those of `sparse` do.

    Under a vocabulary cut, ids past it become padding: their probability falls to the tail bucket.
    """

    topk_ids_NK: Tensor
    topk_logprobs_NK: Tensor

    def __post_init__(self) -> None:
        if self.topk_ids_NK.shape != self.topk_logprobs_NK.shape:
            raise ValueError(
                f"topk_ids_NK is {tuple(self.topk_ids_NK.shape)}, topk_logprobs_NK "
                f"{tuple(self.topk_logprobs_NK.shape)}; both are [N, K]"
            )

    @property
    def width(self) -> None:
        return None

    def __len__(self) -> int:
        return len(self.topk_ids_NK)

    def __getitem__(self, index: Index) -> "SparseRows":
        return SparseRows(self.topk_ids_NK[index], self.topk_logprobs_NK[index])

    def to(self, device: torch.device | str) -> "SparseRows":
        return SparseRows(*(x.to(device, non_blocking=True) for x in (self.topk_ids_NK, self.topk_logprobs_NK)))

    def chunk(self, rows: slice, vocab_size: int | None) -> tuple[Tensor, ...]:
        ids = self.topk_ids_NK[rows]
        if vocab_size is not None:
            ids = ids.masked_fill(ids >= vocab_size, -1)
        return ids, self.topk_logprobs_NK.detach()[rows]


@dataclass(frozen=True, eq=False, init=False)
class TokenRows:
    """A token per row and any tensors [N, ...]; the objective takes (student_logits, token_ids, *per_row)."""

    token_ids_N: Tensor
    per_row: tuple[Tensor, ...]

    def __init__(self, token_ids_N: Tensor, *per_row: Tensor) -> None:
        for position, tensor in enumerate(per_row, start=1):
            if len(tensor) != len(token_ids_N):
                raise ValueError(
                    f"tensor {position} after token_ids_N has {len(tensor)} rows, token_ids_N "
                    f"{len(token_ids_N)}; all must have one row per token"
                )
        object.__setattr__(self, "token_ids_N", token_ids_N)
        object.__setattr__(self, "per_row", per_row)

    @property
    def width(self) -> None:
        return None

    def __len__(self) -> int:
        return len(self.token_ids_N)

    def __getitem__(self, index: Index) -> "TokenRows":
        return TokenRows(self.token_ids_N[index], *(tensor[index] for tensor in self.per_row))

    def to(self, device: torch.device | str) -> "TokenRows":
        return TokenRows(*(x.to(device, non_blocking=True) for x in (self.token_ids_N, *self.per_row)))

    def chunk(self, rows: slice, vocab_size: int | None) -> tuple[Tensor, ...]:
        return self.token_ids_N[rows], *(tensor.detach()[rows] for tensor in self.per_row)


@dataclass(frozen=True, eq=False)
class TensorRows:
    """Tensors [N, ...] in the order the objective takes them; with none, ``rows`` says how many there are."""

    tensors: tuple[Tensor, ...]
    rows: int

    @property
    def width(self) -> None:
        return None

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: Index) -> "TensorRows":
        count = torch.arange(self.rows)[index.cpu() if isinstance(index, Tensor) else index].numel()
        return TensorRows(tuple(tensor[index] for tensor in self.tensors), count)

    def to(self, device: torch.device | str) -> "TensorRows":
        return replace(self, tensors=tuple(tensor.to(device, non_blocking=True) for tensor in self.tensors))

    def chunk(self, rows: slice, vocab_size: int | None) -> tuple[Tensor, ...]:
        return tuple(tensor.detach()[rows] for tensor in self.tensors)


@dataclass(frozen=True, eq=False)
class RoutedRows:
    """Rows of several teachers, each for its share of the N tokens; the objective takes what theirs takes.

    parts[m] has n_m rows; they speak of rows places[m] [n_m], int64 on the CPU and ascending. Every one of the N rows
    is in one of the places.
    """

    parts: tuple[TeacherRows, ...]
    places: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        counts = [(len(part), len(at)) for part, at in zip(self.parts, self.places, strict=True)]
        if not counts or any(rows != places for rows, places in counts):
            raise ValueError(f"(rows, places) of the parts are {counts}; there is a part, and each row has a place")

    @property
    def width(self) -> int | None:
        return _narrowest(self.parts)

    def __len__(self) -> int:
        return sum(map(len, self.places))

    def __getitem__(self, index: Index) -> "RoutedRows":
        if isinstance(index, slice) and index.step in (None, 1):  # as a batch is split: views, no copies
            start, stop, _ = index.indices(len(self))
            edges = [torch.searchsorted(at, torch.tensor([start, max(start, stop)])).tolist() for at in self.places]
            return RoutedRows(
                tuple(part[a:b] for part, (a, b) in zip(self.parts, edges, strict=True)),
                tuple(at[a:b] - start for at, (a, b) in zip(self.places, edges, strict=True)),
            )
        owner_N, row_N = torch.empty(len(self), dtype=torch.int64), torch.empty(len(self), dtype=torch.int64)
        for m, at in enumerate(self.places):
            owner_N[at], row_N[at] = m, torch.arange(len(at))
        index = index.cpu() if isinstance(index, Tensor) else index
        owner_n, row_n = owner_N[index], row_N[index]
        places = [(owner_n == m).nonzero().flatten() for m in range(len(self.parts))]
        parts = tuple(part[_view(row_n[at])] for part, at in zip(self.parts, places, strict=True))
        return RoutedRows(parts, tuple(places))

    def to(self, device: torch.device | str) -> "RoutedRows":
        return replace(self, parts=tuple(part.to(device) for part in self.parts))

    @torch.no_grad()
    def chunk(self, rows: slice, vocab_size: int | None) -> tuple[Tensor, ...]:
        part, columns = self[rows], vocab_size or self.width
        # A teacher without rows here is not asked; if none has any, the first gives the empty result its shape.
        busy = [pair for pair in zip(part.parts, part.places, strict=True) if len(pair[1])]
        if len(busy) <= 1:
            only = busy[0][0] if busy else part.parts[0]
            return only.chunk(slice(0, len(only)), columns)
        answers = [teacher.chunk(slice(0, len(teacher)), columns) for teacher, _ in busy]
        merged = []
        for pieces in zip(*answers, strict=True):
            dtype = pieces[0].dtype
            for piece in pieces[1:]:
                dtype = torch.promote_types(dtype, piece.dtype)
            whole = pieces[0].new_empty((len(part), *pieces[0].shape[1:]), dtype=dtype)
            for piece, (_, at) in zip(pieces, busy, strict=True):
                whole[at] = piece.to(whole)
            merged.append(whole)
        return tuple(merged)


@dataclass(frozen=True, eq=False)
class MixtureRows:
    """The arithmetic mixture sum_m weights[m] p_m of teachers with logits; the objective takes (student_logits, its
    log-probs [N, V]).

    Under a vocabulary cut every p_m is cut and renormalised before it is mixed, so that the padding columns of one
    teacher cannot move the weights.
    """

    parts: tuple[TeacherRows, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.parts) != len(self.weights) or not self.parts or min(self.weights) <= 0:
            raise ValueError(f"{len(self.parts)} parts, weights {self.weights}; every part has a weight > 0")
        if len({len(part) for part in self.parts}) > 1:
            raise ValueError(f"the parts have {[len(p) for p in self.parts]} rows; all must speak of the same tokens")

    @property
    def width(self) -> int | None:
        return _narrowest(self.parts)

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, index: Index) -> "MixtureRows":
        return replace(self, parts=tuple(part[index] for part in self.parts))

    def to(self, device: torch.device | str) -> "MixtureRows":
        return replace(self, parts=tuple(part.to(device) for part in self.parts))

    @torch.no_grad()
    def chunk(self, rows: slice, vocab_size: int | None) -> tuple[Tensor, ...]:
        total, columns, mixed = sum(self.weights), vocab_size or self.width, None
        for part, weight in zip(self.parts, self.weights, strict=True):
            (logits_nV,) = part.chunk(rows, columns)
            log_p = logits_nV.log_softmax(-1, dtype=compute_dtype(logits_nV)) + math.log(weight / total)
            mixed = log_p if mixed is None else torch.logaddexp(mixed, log_p)
        assert mixed is not None
        return (mixed,)


@dataclass(frozen=True, eq=False)
class PairedRows:
    """Several kinds of evidence about the same tokens; the objective takes all their arguments, one after another."""

    parts: tuple[TeacherRows, ...]

    def __post_init__(self) -> None:
        if len({len(part) for part in self.parts}) != 1:
            raise ValueError(f"the parts have {[len(p) for p in self.parts]} rows; all must speak of the same tokens")

    @property
    def width(self) -> int | None:
        widths = [part.width for part in self.parts if part.width is not None]
        return min(widths) if widths else None

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, index: Index) -> "PairedRows":
        return PairedRows(tuple(part[index] for part in self.parts))

    def to(self, device: torch.device | str) -> "PairedRows":
        return PairedRows(tuple(part.to(device) for part in self.parts))

    def chunk(self, rows: slice, vocab_size: int | None) -> tuple[Tensor, ...]:
        columns = vocab_size or self.width  # two heads of different width are cut to the narrower one
        return tuple(tensor for part in self.parts for tensor in part.chunk(rows, columns))


def _view(index: Tensor) -> Index:
    """A slice, which copies nothing, in place of the numbers of consecutive rows."""
    if not len(index):
        return slice(0, 0)
    consecutive = bool((index[1:] == index[:-1] + 1).all())
    return slice(int(index[0]), int(index[-1]) + 1) if consecutive else index


def _narrowest(parts: tuple[TeacherRows, ...]) -> int | None:
    widths = [part.width for part in parts]
    return None if None in widths else min(w for w in widths if w is not None)


Teacher = Tensor | tuple[Tensor, nn.Linear] | TeacherRows


def as_rows(teacher: Teacher) -> TeacherRows:
    """Logits and (hidden, lm_head) pairs become rows; a head that autocast would cast is cast here, once."""
    if isinstance(teacher, Tensor):
        return LogitRows(teacher)
    if isinstance(teacher, RoutedRows | MixtureRows | PairedRows):
        return replace(teacher, parts=tuple(map(as_rows, teacher.parts)))
    if isinstance(teacher, Nested):
        return teacher.over(as_rows)
    rows = HiddenRows(*teacher) if isinstance(teacher, tuple) else teacher
    if isinstance(rows, HiddenRows):
        dtype = matmul_dtype(rows.hidden_NH)
        rows = replace(rows, hidden_NH=rows.hidden_NH.to(dtype), lm_head=cast_head(rows.lm_head, dtype))
    return rows
