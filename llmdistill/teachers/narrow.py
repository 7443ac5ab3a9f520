"""Teachers of one tokenizer whose heads differ in width, as if each had only the columns they all have.

Models of one family pad their heads past the tokenizer by different amounts (Qwen2.5: 151,936 and 152,064 columns).
Over the first V columns a teacher's distribution is p(i) / P, where P is the mass of these columns. A teacher in this
process has its logits cut. Of one elsewhere, 1 - P is the mass of the ids from V on among those it lists: all of it
where it lists every column, else at least that; what columns without a token have besides is in practice less than a
log-prob on the wire resolves. With the tokens' own log-probs alone (``top_k`` 0) nothing is listed, and P counts as 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmdistill.teachers.base import DenseTeacher, Teacher
from llmdistill.teachers.listing import blocks_of
from llmdistill.texts import Rollout
from llmdistill.wire.blocks import ScoreBlock

LogMass = Sequence[Tensor]  # of every block, [n]: log P


def score_within(
    teacher: Teacher, vocab_size: int, rollout: Rollout, top_k: int, chosen: Tensor | None = None
) -> tuple[list[ScoreBlock], LogMass | None]:
    """As ``teacher.score``, of its distribution over the first ``vocab_size`` columns.

    ``chosen`` ids are below ``vocab_size``.

    Returns:
        The blocks, and what they were divided by where :func:`cut` has to do it to further answers about these rows.
    """
    info = teacher.info()
    if info.vocab_size == vocab_size:
        return teacher.score(rollout, top_k, chosen), None
    if isinstance(teacher, DenseTeacher):
        narrow = replace(info, vocab_size=vocab_size)
        return blocks_of(teacher.dense(rollout), rollout, top_k, chosen, narrow), None
    # All that are left are asked for: those are not the likeliest ``vocab_size`` of the teacher's own columns.
    blocks = teacher.score(rollout, info.vocab_size if top_k == vocab_size else top_k, chosen)
    log_mass = [_log_mass(block, vocab_size) for block in blocks]
    return cut(blocks, vocab_size, log_mass), log_mass


def cut(blocks: Sequence[ScoreBlock], vocab_size: int, log_mass: LogMass) -> list[ScoreBlock]:
    """The blocks without ids from ``vocab_size`` on, divided by P; rows with fewer ids are padded at their end."""
    return [_cut(block, vocab_size, mass) for block, mass in zip(blocks, log_mass, strict=True)]


def _log_mass(block: ScoreBlock, vocab_size: int) -> Tensor:
    past = block.topk_logprobs.double().masked_fill(block.topk_ids < vocab_size, -torch.inf).exp().sum(1)
    return torch.log1p(-past.clamp(max=1 - 1e-9)).float()


def _cut(block: ScoreBlock, vocab_size: int, log_mass: Tensor) -> ScoreBlock:
    ids, gone = block.topk_ids, (block.topk_ids >= vocab_size) | (block.topk_ids < 0)
    lps = (block.topk_logprobs - log_mass[:, None]).clamp(max=0).masked_fill(gone, -torch.inf)
    # an id of probability 0 is listed too: it comes before the padding
    rank = torch.where(gone, -torch.inf, lps.clamp(min=torch.finfo(lps.dtype).min))
    order = rank.argsort(dim=1, descending=True, stable=True)[:, :vocab_size]
    return replace(
        block,
        token_logprobs=(block.token_logprobs - log_mass).clamp(max=0),
        topk_ids=ids.masked_fill(gone, -1).gather(1, order),
        topk_logprobs=lps.gather(1, order),
        header=replace(block.header, top_k=order.shape[1], vocab_size=vocab_size),
    )
