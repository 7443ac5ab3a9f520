"""What a denoiser does not read of its text, sequence by sequence, and what that counts for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Noise:
    """One draw of masks for the sequences of a rollout, which itself stays clean. B sequences, T tokens.

    The rollout's ``completion_mask`` marks the rows, the tokens that are asked for; each of them is masked.
    """

    masked: Tensor  # [B, T] bool: read as the mask token
    countable: Tensor  # [B, T] bool: tokens that a draw may have for rows; the means of losses divide by these
    weight: Tensor  # [B, T] float32: of a row's loss; the time's weight in the bound
    no_suffix: Tensor  # [B, T] bool: nothing that is read stands to the right of it
    blocks: Tensor  # [B, T] int64: which block a token is of, -1 on padding
    ahead: Tensor  # [B] float64: share of what lies ahead that attention reaches; 1: all
    seeds: Tensor  # [B] int64: of the draw of that share
    view: Callable[[Any], Any]  # rollout -> View: how the model reads it

    def sequences(self, index: Sequence[int], columns: slice) -> Noise:
        """Of the given sequences, within the given columns."""
        return self._each(lambda x: x[index, columns] if x.ndim == 2 else x[index])

    def ended(self, gone_BT: Tensor) -> Noise:
        """With sequences that end before the marked tokens."""
        kept: dict[str, Any] = {name: getattr(self, name) & ~gone_BT for name in ("masked", "countable", "no_suffix")}
        return replace(self, **kept, blocks=self.blocks.masked_fill(gone_BT, -1))

    def counting(self, keep_B: Tensor) -> Noise:
        """With nothing to count in the sequences that are not marked."""
        return replace(self, countable=self.countable & keep_B[:, None])

    def to(self, device: torch.device | str) -> Noise:
        return self._each(lambda x: x.to(device))

    def padded(self, width: int) -> Noise:
        """Padded on the right to so many tokens."""

        def pad(x: Tensor, value: int) -> Tensor:
            return torch.nn.functional.pad(x, (0, width - x.shape[1]), value=value)

        values = {"masked": 0, "countable": 0, "weight": 0, "no_suffix": 0, "blocks": -1}
        changed: dict[str, Any] = {name: pad(getattr(self, name), value) for name, value in values.items()}
        return replace(self, **changed)

    @staticmethod
    def stacked(noises: Sequence[Noise]) -> Noise:
        """Of several rollouts of one width, read alike, one after another."""
        names = [f.name for f in fields(Noise) if f.name != "view"]
        joined: dict[str, Any] = {name: torch.cat([getattr(n, name) for n in noises]) for name in names}
        return replace(noises[0], **joined)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Noise:
        changed: dict[str, Any] = {f.name: change(getattr(self, f.name)) for f in fields(self) if f.name != "view"}
        return replace(self, **changed)
