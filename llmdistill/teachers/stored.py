"""A teacher whose answers are kept on disk: for later epochs, for other runs, or without the teacher at all."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmdistill.errors import UserError
from llmdistill.teachers.asked import Asked, on_cpu
from llmdistill.teachers.base import Teacher, TeacherInfo, max_top_k
from llmdistill.teachers.block_store import BlockStore, Kind
from llmdistill.texts import Prompt, Rollout, Sampling
from llmdistill.wire.blocks import BlockHeader, ScoreBlock, encode
from llmdistill.wire.hidden import HiddenHeader


class StoredTeacher:
    """Implements :class:`~llmdistill.teachers.base.Teacher` from a store of its answers, and asks it for the others.

    What is asked anew is answered as it will be read back later, so that every epoch sees the same numbers.

    Args:
        folder: of the :class:`BlockStore`.
        teacher: scores what is not stored, and generates; closed with this one. None: what is not there is an error.
        dtype: of the log-probs that are appended, as in :func:`~llmdistill.wire.blocks.encode`. "float32" does not
            make do with blocks stored as "float16".
        tokenizer: the teacher's, for a student of another one where there is no ``teacher``, which has its own.

    Raises:
        UserError: no store in ``folder`` and no teacher, the store is another teacher's, or it is damaged.
    """

    kind: Kind = "logprobs"  # of the blocks in its store

    def __init__(
        self,
        folder: str | Path,
        teacher: Teacher | None = None,
        dtype: str = "float16",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if dtype not in ("float16", "float32"):
            raise UserError(f"dtype of the stored log-probs is {dtype!r}. Fix: 'float16' or 'float32'.")
        self.store = BlockStore(folder, skip_damaged=teacher is not None)
        self.teacher, self.tokenizer = teacher, tokenizer
        self.dtype = dtype
        self.hits = self.misses = 0  # sequences read from the store, and not found there
        if teacher is None:
            self.store.check_kind(self.kind)
        info = self.store.info() if teacher is None else self.store.claim(teacher.info(), self.kind)
        if info is None:
            raise UserError(f"{folder} holds no stored teacher (no info.json). Fix: the folder it was stored in.")
        self._info = info

    @property
    def live(self) -> bool:
        """Whether there is a teacher behind the store."""
        return self.teacher is not None

    @property
    def max_top_k(self) -> int:
        """What the teacher behind the store lists; without one as many as a block of the store (the first) has."""
        if self.teacher is not None:
            return max_top_k(self.teacher)
        first = next(iter(self.store), None)
        block = None if first is None else self.store.get(first)
        return self._info.vocab_size if block is None else block.header.top_k

    @property
    def scores_chosen(self) -> bool:
        """As the teacher behind the store; ids of the caller's choice are not stored."""
        return self.teacher is not None and getattr(self.teacher, "scores_chosen", True)

    def score(self, rollout: Rollout, top_k: int, chosen: Tensor | None = None) -> list[ScoreBlock]:
        """Blocks of ``top_k`` columns, cut from stored ones of as many or more. ``chosen`` ids are never stored.

        Raises:
            UserError: a block is missing or damaged, or ids are ``chosen``, and there is no teacher.
        """
        if chosen is not None:
            return self._behind("score ids of the student's choice").score(rollout, top_k, chosen)
        vocab = self._info.vocab_size
        if top_k > vocab:
            raise UserError(f"objective.top_k is {top_k}; the teacher has {vocab} logit columns. Fix: at most {vocab}.")
        asked = [Asked.of(*row) for row in zip(*on_cpu(rollout), strict=True)]
        blocks = [self._find(sequence, top_k) for sequence in asked]
        if any(block is None for block in blocks) and self.store.refresh():
            blocks = [block or self._find(sequence, top_k) for block, sequence in zip(blocks, asked, strict=True)]
        missing = [i for i, block in enumerate(blocks) if block is None]
        self.hits += sum(sequence.count > 0 for sequence in asked) - len(missing)
        self.misses += len(missing)
        if missing:
            self._fill(rollout, {i: asked[i] for i in missing}, top_k)
        return [block or self._found(sequence, top_k) for block, sequence in zip(blocks, asked, strict=True)]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        """As the teacher behind the store; what it generates is not stored."""
        return self._behind("generate").generate(prompts, sampling)

    def info(self) -> TeacherInfo:
        return self._info

    def close(self) -> None:
        self.store.close()
        if self.teacher is not None:
            self.teacher.close()

    def _find(self, sequence: Asked, top_k: int) -> ScoreBlock | None:
        """The sequence's block, cut to ``top_k``; None if nothing that is stored holds as much."""
        if not sequence.count:
            return self._nothing(top_k)
        for dtype in dict.fromkeys((self.dtype, "float32")):
            block = self._stored(sequence.key(dtype))
            if block is None or block.header.top_k < top_k:
                continue
            self._check(block.header)
            return ScoreBlock(
                sequence.positions,
                block.token_logprobs,
                block.topk_ids[:, :top_k],
                block.topk_logprobs[:, :top_k],
                replace(block.header, top_k=top_k),
            )
        return None

    def _stored(self, key: bytes) -> ScoreBlock | None:
        """A block that can be read. A damaged one is missing where a teacher can score its sequence anew."""
        while True:
            try:
                return self.store.get(key)
            except UserError as damaged:
                if self.teacher is None:
                    raise
                warnings.warn(f"{damaged} It is scored anew here.", stacklevel=2)
                self.store.forget(key)

    def _found(self, sequence: Asked, top_k: int) -> ScoreBlock:
        block = self._find(sequence, top_k)
        assert block is not None, "just appended"
        return block

    def _fill(self, rollout: Rollout, missing: dict[int, Asked], top_k: int) -> None:
        """Has the teacher score the sequences ``missing`` by their index, each distinct one once, and appends that."""
        if self.teacher is None:
            i, first = next(iter(missing.items()))
            what = f"sequence {i} ({first.count} tokens from {first.positions.start}{self._instead(first)})"
            raise UserError(
                f"{self.store.folder} lacks {len(missing)} of {len(rollout)} sequences at top_k {top_k} in "
                f"{self.dtype}, the first is {what}. Fix: put the teacher behind the store, or ask for what is stored."
            )
        distinct = {sequence.key(self.dtype): i for i, sequence in reversed(missing.items())}
        index = sorted(distinct.values())
        for i, block in zip(index, self.teacher.score(rollout.sequences(index), top_k), strict=True):
            self._check(block.header)
            if block.header.top_k != top_k:
                raise ValueError(f"the teacher lists {block.header.top_k} tokens; asked for {top_k}")
            block = replace(block, positions=missing[i].unpadded)
            self.store.append(missing[i].key(self.dtype), encode(block, self.dtype))

    def _instead(self, sequence: Asked) -> str:
        """What there is of a sequence that is missing."""
        stored = [b.header for d in ("float16", "float32") if (b := self.store.get(sequence.key(d)))]
        return "".join(f", stored at top_k {header.top_k} in {header.dtype}" for header in stored)

    def _check(self, header: BlockHeader | HiddenHeader) -> None:
        if (header.teacher, header.tokenizer) != (self._info.fingerprint, self._info.tokenizer):
            raise UserError(
                f"a block of teacher {header.teacher} (tokenizer {header.tokenizer}); {self.store.folder} holds "
                f"evidence of {self._info.fingerprint} (tokenizer {self._info.tokenizer}). The teacher has changed, or "
                "a shard is another store's. Fix: a folder for each teacher."
            )

    def _nothing(self, top_k: int) -> ScoreBlock:
        header = BlockHeader(self._info.fingerprint, self._info.tokenizer, top_k, self._info.vocab_size, self.dtype)
        ids = torch.zeros(0, top_k, dtype=torch.int32)
        return ScoreBlock(slice(0, 0), torch.zeros(0), ids, torch.zeros(0, top_k), header)

    def _behind(self, what: str) -> Teacher:
        if self.teacher is None:
            raise UserError(
                f"a stored teacher cannot {what}: {self.store.folder} has no teacher behind it. "
                "Fix: give it the teacher that scored it."
            )
        return self.teacher
