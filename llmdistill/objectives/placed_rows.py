"""Evidence about some of N rows only: what a judge of another tokenizer says where both stand at one place of the text.

The judge has M rows of its own. Rows that it says nothing about have no loss, and none of the denominator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmdistill.objectives.classes import Classes
from llmdistill.objectives.rows import Index, PairedRows, RoutedRows, TeacherRows


@dataclass(frozen=True, eq=False)
class ClassedRows:
    """Logits of another vocabulary as log-probabilities of classes; the objective takes [n, K + 1]."""

    logits: TeacherRows
    classes: Classes

    @property
    def width(self) -> None:
        return None

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, index: Index) -> ClassedRows:
        return replace(self, logits=self.logits[index])

    def to(self, device: torch.device | str) -> ClassedRows:
        return replace(self, logits=self.logits.to(device))

    @torch.no_grad()
    def chunk(self, rows: slice, vocab_size: int | None) -> tuple[Tensor, ...]:
        (logits_nV,) = self.logits.chunk(rows, None)  # the cut is of the student's vocabulary
        return (self.classes.logprobs(logits_nV),)

    def over(self, change: Callable[[TeacherRows], TeacherRows]) -> ClassedRows:
        return replace(self, logits=change(self.logits))


@dataclass(frozen=True, eq=False)
class PlacedRows:
    """``part`` has M rows; place_N [N] int64 says which of them each of N rows goes with, -1: none.

    The objective takes what it takes of ``part``, zeros where there is none, and whether there is one, [n] bool.
    """

    part: TeacherRows
    place_N: Tensor

    @property
    def width(self) -> None:
        return None

    @property
    def told_N(self) -> Tensor:
        return self.place_N >= 0

    def __len__(self) -> int:
        return len(self.place_N)

    def __getitem__(self, index: Index) -> PlacedRows:
        return PlacedRows(self.part, self.place_N[index.cpu() if isinstance(index, Tensor) else index])

    def to(self, device: torch.device | str) -> PlacedRows:
        """With those of the judge's rows alone that these rows go with."""
        told_N = self.told_N
        part = self.part[self.place_N[told_N]].to(device)
        return PlacedRows(part, torch.full_like(self.place_N, -1).masked_scatter(told_N, torch.arange(len(part))))

    @torch.no_grad()
    def chunk(self, rows: slice, vocab_size: int | None) -> tuple[Tensor, ...]:
        place_n = self.place_N[rows]
        told_n = place_n >= 0
        part = self.part[place_n[told_n]]
        pieces = part.chunk(slice(0, len(part)), None)
        where = told_n.to(pieces[0].device)
        placed = [p.new_zeros((len(place_n), *p.shape[1:])).index_put_((where,), p) for p in pieces]
        return (*placed, where)

    def over(self, change: Callable[[TeacherRows], TeacherRows]) -> PlacedRows:
        return replace(self, part=change(self.part))


def told_rows(evidence: TeacherRows) -> Tensor | None:
    """Which rows some evidence speaks of, [N] bool on the CPU; None where it speaks of all."""
    if isinstance(evidence, PlacedRows):
        return evidence.told_N
    if isinstance(evidence, PairedRows):
        told = [part for part in map(told_rows, evidence.parts) if part is not None]
        return torch.stack(told).all(0) if told else None
    if isinstance(evidence, RoutedRows):
        parts = [told_rows(part) for part in evidence.parts]
        if all(part is None for part in parts):
            return None
        told_N = torch.ones(len(evidence), dtype=torch.bool)
        for part, place in zip(parts, evidence.places, strict=True):
            if part is not None:
                told_N[place] = part
        return told_N
    return None
