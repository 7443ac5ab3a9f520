"""A judge that tells p(token | all others) of an autoregressive teacher, by Bayes over its likeliest tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from llmdistill.diffusion.ar_teacher import suffix_corrected
from llmdistill.errors import UserError
from llmdistill.teachers.base import TeacherInfo
from llmdistill.teachers.listing import by_sequence
from llmdistill.teachers.local import LocalTeacher
from llmdistill.texts import Prompt, Rollout, Sampling
from llmdistill.wire.blocks import BlockHeader, ScoreBlock


class SuffixCorrected:
    """Implements :class:`~llmdistill.teachers.base.Teacher` over a teacher in this process.

    A row costs a forward pass over top_k + 1 copies of its sequence, so this is for short texts and few rows.

    Raises:
        UserError: the teacher is not a model in this process, or in parts over several.
    """

    def __init__(self, teacher: LocalTeacher) -> None:
        if not isinstance(teacher, LocalTeacher):
            raise UserError(
                f"objective.targets is suffix_corrected, and the teacher is a {type(teacher).__name__}; only a model "
                "in this process can be asked so often. Fix: teacher.model with engine hf, or --targets no_suffix."
            )
        if not teacher.writes:
            raise UserError(
                "objective.targets is suffix_corrected, and teacher.placement sharded: every process asks it as often "
                "as it has rows, and they would wait for each other. Fix: teacher.placement whole or offload, or "
                "--targets no_suffix."
            )
        self.teacher, self.model, self.tokenizer = teacher, teacher.model, teacher.tokenizer

    @torch.no_grad()
    def score(self, rollout: Rollout, top_k: int, chosen: Tensor | None = None) -> list[ScoreBlock]:
        """Blocks of ``top_k`` + 1 tokens: the teacher's likeliest and the row's own, whose mass is 1 together."""
        width, device = top_k + 1, self.teacher.head.linear.weight.device  # where it runs
        count = rollout.num_rows
        ids_NK, lps_NK = torch.full((count, width), -1), torch.full((count, width), -torch.inf)
        own_N = torch.zeros(count)
        row = 0
        with self.present():
            for b, positions in enumerate(rollout.completion_mask):
                length = int(rollout.attention_mask[b].sum())
                clean = rollout.input_ids[b : b + 1, :length].to(device)
                for position in (positions[1:].nonzero().flatten() + 1).tolist():
                    ids, lps = suffix_corrected(self._logits, clean, 0, position, top_k)
                    best = lps.argsort(descending=True)
                    ids_NK[row, : len(ids)], lps_NK[row, : len(ids)] = ids[best].cpu(), lps[best].float().cpu()
                    own_N[row] = lps[ids == clean[0, position]][0].float().cpu()
                    row += 1
        info = self.info()
        header = BlockHeader(info.fingerprint, info.tokenizer, width, info.vocab_size)
        return by_sequence(rollout, own_N, ids_NK.int(), lps_NK.clamp_max(0.0), header)

    def _logits(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=attention_mask).logits.float()  # type: ignore[no-any-return]

    def present(self) -> AbstractContextManager[None]:
        return self.teacher.present()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        return self.teacher.generate(prompts, sampling)

    def info(self) -> TeacherInfo:
        return self.teacher.info()

    def close(self) -> None:
        self.teacher.close()
