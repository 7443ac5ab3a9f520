"""A teacher whose hidden states are kept on disk: its whole distribution, for later epochs, or without it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmdistill.errors import UserError
from llmdistill.objectives.rows import HiddenRows
from llmdistill.teachers.asked import Asked, on_cpu
from llmdistill.teachers.base import Teacher
from llmdistill.teachers.block_store import Kind
from llmdistill.teachers.heads import HeadInUse, keep_head, kept_head
from llmdistill.teachers.listing import blocks_of, refuse_wider
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.remote_hidden import HiddenRemoteTeacher
from llmdistill.teachers.stored import StoredTeacher
from llmdistill.texts import Rollout
from llmdistill.wire.blocks import ScoreBlock
from llmdistill.wire.hidden import Form, HeadWeights, HiddenBlock, HiddenHeader, encode_hidden


class HiddenStoredTeacher(StoredTeacher):
    """Implements :class:`~llmdistill.teachers.base.DenseTeacher` from a store; what is listed is computed of it.

    Args:
        form: of the states that are appended; the other form does not make do.
        device: where rows, and the output head in float32, are put.
        options: of :class:`StoredTeacher`.

    Raises:
        UserError: as :class:`StoredTeacher`; a store of log-probs; a head that is gone, or another teacher's; a teacher
            that gives no hidden states.
    """

    kind: Kind = "hidden"

    def __init__(
        self,
        folder: str | Path,
        teacher: Teacher | None = None,
        *,
        form: Form,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        weights = None if teacher is None else _head_of(teacher)
        super().__init__(folder, teacher, **options)
        self.form: Form = form
        if weights is not None:
            keep_head(self.store.folder, weights)
        self.head = HeadInUse(kept_head(self.store.folder), device)

    @property
    def max_top_k(self) -> int:
        """All tokens."""
        return self._info.vocab_size

    @property
    def scores_chosen(self) -> bool:
        """Any ids can be looked up in a whole distribution."""
        return True

    def dense(self, rollout: Rollout) -> HiddenRows:
        """Rows of the counted tokens.

        Raises:
            UserError: a block is missing or damaged, and there is no teacher; or its head is another one.
        """
        asked = [Asked.of(*row) for row in zip(*on_cpu(rollout), strict=True)]
        found = [self._states(sequence) for sequence in asked]
        if any(block is None for block in found) and self.store.refresh():
            found = [block or self._states(sequence) for block, sequence in zip(found, asked, strict=True)]
        missing = [i for i, block in enumerate(found) if block is None]
        self.hits += sum(sequence.count > 0 for sequence in asked) - len(missing)
        self.misses += len(missing)
        if missing:
            self._append(rollout, {i: asked[i] for i in missing})
            found = [block or self._states(sequence) for block, sequence in zip(found, asked, strict=True)]
        return self.head.rows([block.hidden for block in found if block is not None])

    def score(self, rollout: Rollout, top_k: int, chosen: Tensor | None = None) -> list[ScoreBlock]:
        """One block per sequence, made of the states."""
        refuse_wider(top_k, self._info.vocab_size)
        return blocks_of(self.dense(rollout), rollout, top_k, chosen, self._info)

    def _states(self, sequence: Asked) -> HiddenBlock | None:
        if not sequence.count:
            return HiddenBlock(slice(0, 0), torch.zeros(0, self.head.linear.in_features), self._header())
        key = sequence.key(self.form)
        while True:
            try:
                block = self.store.states(key)
                break
            except UserError as damaged:
                if self.teacher is None:
                    raise
                warnings.warn(f"{damaged} It is scored anew here.", stacklevel=2)
                self.store.forget(key)
        if block is not None:
            self._same(block)
        return block

    def _same(self, block: HiddenBlock) -> None:
        self._check(block.header)
        self.head.check(block, str(self.store.folder))

    def _append(self, rollout: Rollout, missing: dict[int, Asked]) -> None:
        if self.teacher is None:
            i, first = next(iter(missing.items()))
            raise UserError(
                f"{self.store.folder} lacks hidden states in {self.form} of {len(missing)} of {len(rollout)} "
                f"sequences, the first is sequence {i} ({first.count} tokens from {first.positions.start}). "
                "Fix: put the teacher behind the store, or ask for what is stored."
            )
        distinct = {sequence.key(self.form): i for i, sequence in reversed(missing.items())}
        index = sorted(distinct.values())
        for i, hidden in zip(index, _hidden_of(self.teacher, rollout.sequences(index)), strict=True):
            block = HiddenBlock(missing[i].unpadded, hidden, self._header())
            self.store.append(missing[i].key(self.form), encode_hidden(block))

    def _header(self) -> HiddenHeader:
        info, head = self._info, self.head
        width = head.linear.in_features
        return HiddenHeader(info.fingerprint, info.tokenizer, head.fingerprint, width, head.vocab_size, self.form)


def _head_of(teacher: Teacher) -> HeadWeights:
    if isinstance(teacher, HiddenRemoteTeacher):
        return teacher.weights
    if isinstance(teacher, LocalTeacher):
        head = teacher.head
        bias = None if head.linear.bias is None else head.linear.bias.detach()
        return HeadWeights(head.linear.weight.detach(), bias, head.logit_scale, head.softcap)
    raise UserError(
        f"teacher.hidden: {type(teacher).__name__} gives no hidden states to keep. "
        "Fix: teacher.engine hf or a service that does, or leave teacher.hidden out."
    )


def _hidden_of(teacher: Teacher, rollout: Rollout) -> list[Tensor]:
    if isinstance(teacher, HiddenRemoteTeacher):
        return [block.hidden for block in teacher.states(rollout)]
    assert isinstance(teacher, LocalTeacher)
    return list(teacher.dense(rollout).hidden_NH.split(rollout.row_counts))
