"""What the teacher says about N rows, in the forms the streaming engine can read a chunk at a time.

All are indexable by a slice or an index tensor over rows, so that a batch's rows split into micro-batches
(`rows[a:b]`), and none carries gradient.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from llmdistill.objectives.projection import Projection, cast_head, matmul_dtype

Index = slice | Tensor


class TeacherRows(Protocol):
    @property
    def width(self) -> int | None:
        """Number of logit columns, or None where there are none."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Index) -> "TeacherRows": ...

    def chunk(self, rows: slice, vocab_size: int | None) -> tuple[Tensor, ...]:
        """The objective's arguments after the student's logits, cut to these rows and vocab_size tokens."""


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

    @torch.no_grad()
    def chunk(self, rows: slice, vocab_size: int | None) -> tuple[Tensor, ...]:
        head = Projection.of(self.lm_head, self.hidden_NH.dtype, vocab_size, self.logit_scale, self.softcap)
        return (head.rescale(head.matmul(self.hidden_NH[rows])),)


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

    def chunk(self, rows: slice, vocab_size: int | None) -> tuple[Tensor, ...]:
        return self.token_ids_N[rows], *(tensor.detach()[rows] for tensor in self.per_row)


Teacher = Tensor | tuple[Tensor, nn.Linear] | TeacherRows


def as_rows(teacher: Teacher) -> TeacherRows:
    """Logits and (hidden, lm_head) pairs become rows; a head that autocast would cast is cast here, once."""
    if isinstance(teacher, Tensor):
        return LogitRows(teacher)
    rows = HiddenRows(*teacher) if isinstance(teacher, tuple) else teacher
    if isinstance(rows, HiddenRows):
        dtype = matmul_dtype(rows.hidden_NH)
        rows = replace(rows, hidden_NH=rows.hidden_NH.to(dtype), lm_head=cast_head(rows.lm_head, dtype))
    return rows
