"""The states that the student wrote its text through: one of every block, drawn from the block's own trace."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmdistill.diffusion.noising import Noised, blocks_of, with_noise
from llmdistill.texts.rollout import Prompt, Rollout, request_seed
from llmdistill.texts.sources import Round


class OwnStates(Noised):
    """The source's text, which is the student's, as it was before one of the steps that revealed each block.

    All tokens that were still masked then are rows (OPDLM, arXiv 2606.06712); earlier blocks are read clean.
    """

    def noised(
        self,
        rollout: Rollout,
        prompts: Sequence[Prompt],
        round_: Round,
        places: Sequence[tuple[int, int]],
        everywhere: int,
    ) -> Rollout:
        assert rollout.step_map is not None  # the engine is one that writes by denoising
        blocks_BT = blocks_of(rollout, prompts, self.denoiser)
        masked_BT = torch.zeros_like(rollout.completion_mask)
        for b, (place, copy) in enumerate(places):
            seed = request_seed(request_seed(round_.seed, round_.step, -1), place, copy)
            generator = torch.Generator().manual_seed(seed)
            for block in range(1, int(blocks_BT[b].max()) + 1):
                here = (blocks_BT[b] == block) & (rollout.step_map[b] >= 0)
                steps = rollout.step_map[b][here].unique()
                u = int(torch.randint(len(steps), (), generator=generator)) if len(steps) else 0
                masked_BT[b] |= here & (rollout.step_map[b] >= (steps[u] if len(steps) else 0))
        rows_BT = masked_BT & rollout.completion_mask
        return with_noise(
            rollout, self.denoiser, masked_BT, rows=rows_BT, countable=rollout.completion_mask, blocks=blocks_BT
        )
