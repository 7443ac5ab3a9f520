"""Masked diffusion models in this process, by :func:`llmdistill.diffusion.sampling.generate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llmdistill.diffusion.backbone import MaskedDiffusionLM
from llmdistill.diffusion.generation_config import generation_config
from llmdistill.diffusion.sampling import generate
from llmdistill.evals.engines.base import Asked, batches
from llmdistill.evals.engines.local import decoded
from llmdistill.evals.records import Sample
from llmdistill.texts.rollout import Sampling
from llmdistill.tokenization.special import eos_ids, pad_id


class DiffusionEngine:
    """Batch by batch; every sample draws with a generator of its own, so that its company changes nothing."""

    def __init__(
        self,
        model: MaskedDiffusionLM,
        tokenizer: PreTrainedTokenizerBase,
        settings: Mapping[str, Any],
        *,
        batch_size: int = 16,
    ) -> None:
        self.model, self.tokenizer, self.settings, self.batch_size = model, tokenizer, dict(settings), batch_size
        self.eos_ids, self.pad_id = eos_ids(model.model, tokenizer), pad_id(tokenizer)

    def draw(self, asked: Sequence[Asked], sampling: Sampling, stop: Sequence[str]) -> Iterator[Sample]:
        for batch in batches(asked, self.batch_size):
            yield from self._batch(batch, sampling, stop)

    def _batch(self, batch: Sequence[Asked], sampling: Sampling, stop: Sequence[str]) -> Iterator[Sample]:
        width, device = max(len(one.ids) for one in batch), self.model.device
        ids = torch.full((len(batch), width), self.pad_id, device=device)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(batch):
            begin = width - len(one.ids)
            ids[row, begin:], mask[row, begin:] = torch.tensor(one.ids, device=device), 1
        out = generate(
            self.model,
            ids,
            mask,
            generation_config(self.settings, sampling, batch[0].room),
            eos_ids=self.eos_ids,
            generator=[torch.Generator().manual_seed(one.seed % (1 << 63)) for one in batch],
        )
        for one, sequence, counts, finish in zip(batch, out.sequences, out.completion_mask, out.finish, strict=True):
            completion = sequence[counts].tolist()
            yield one.sample(decoded(self.tokenizer, completion), len(completion), finish, stop)

    def close(self) -> None:
        pass
