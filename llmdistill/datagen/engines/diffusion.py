"""Masked diffusion models in this process: batches of calls, written by denoising."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmdistill.datagen.engines.base import Reader
from llmdistill.datagen.engines.local import HFEngine
from llmdistill.diffusion.backbone import MaskedDiffusionLM
from llmdistill.diffusion.noised_view import Denoiser
from llmdistill.diffusion.rollouts import DiffusionRollouts
from llmdistill.texts.rollout import Prompt, Rollout, Sampling
from llmdistill.tokenization.special import eos_ids, pad_id


class DiffusionEngine(HFEngine):
    """As its base, with :func:`llmdistill.diffusion.sampling.generate`; ``settings`` are those of its config.

    Raises:
        UserError: settings that there are not, or that do not go with the model.
    """

    def __init__(
        self, model: MaskedDiffusionLM, settings: Mapping[str, Any], reader: Reader, batch_size: int = 16
    ) -> None:
        denoiser = Denoiser(model.mask_token_id, model.shift, model.block_size)
        ends, pad = eos_ids(model.model, reader.tokenizer), pad_id(reader.tokenizer)
        self.writer = DiffusionRollouts(denoiser, settings, eos_ids=ends, pad_id=pad)
        self.writer.check(1)
        self.writer.sync(model.model, 0)
        super().__init__(model.model, reader, batch_size)

    def _generated(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> Rollout:
        return self.writer.write(prompts, sampling, seeds)
