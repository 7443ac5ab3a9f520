"""From rows of whole distributions to score blocks, a chunk at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from llmdistill.errors import UserError
from llmdistill.objectives.rows import TeacherRows
from llmdistill.teachers.base import TeacherInfo
from llmdistill.texts import Rollout, span
from llmdistill.wire.blocks import BlockHeader, ScoreBlock
from llmdistill.wire.listing import columns, listed, support_of

CHUNK_TOKENS = 256  # rows whose whole distribution exists at one time


@torch.no_grad()
def blocks_of(
    rows: TeacherRows,
    rollout: Rollout,
    top_k: int,
    chosen: Tensor | None,
    info: TeacherInfo,
    chunk_tokens: int = CHUNK_TOKENS,
) -> list[ScoreBlock]:
    """One block per sequence of the distributions over the first ``info.vocab_size`` columns of ``rows``.

    Args:
        rows: of logits, one per counted token.
        top_k, chosen: as in :meth:`~llmdistill.teachers.base.Teacher.score`.

    Raises:
        UserError: ``top_k`` above the number of columns.
    """
    vocab = info.vocab_size
    refuse_wider(top_k, vocab)
    tokens_N, width = rollout.token_rows(), columns(top_k, chosen, vocab)
    token_lp = [torch.zeros(0)]
    ids, lps = [torch.zeros(0, width, dtype=torch.int32)], [torch.zeros(0, width)]
    for start in range(0, len(rows), chunk_tokens):
        piece = slice(start, start + chunk_tokens)
        (logits_nV,) = rows.chunk(piece, vocab)
        logprobs_nV = logits_nV.float().log_softmax(-1)
        token_lp.append(logprobs_nV.gather(1, tokens_N[piece, None].to(logprobs_nV.device)).squeeze(1).cpu())
        ids_nK, lps_nK = listed(logprobs_nV, top_k, None if chosen is None else chosen[piece])
        ids.append(ids_nK.cpu())
        lps.append(lps_nK.cpu())
    header = BlockHeader(info.fingerprint, info.tokenizer, width, vocab, support=support_of(top_k, chosen))
    return by_sequence(rollout, torch.cat(token_lp), torch.cat(ids), torch.cat(lps), header)


def by_sequence(rollout: Rollout, token_lp: Tensor, ids: Tensor, lps: Tensor, header: BlockHeader) -> list[ScoreBlock]:
    """Blocks of all counted rows: token log-probs [N], listed ids and log-probs [N, K]."""
    counts = rollout.row_counts
    parts = zip(token_lp.split(counts), ids.split(counts), lps.split(counts), strict=True)
    return [ScoreBlock(span(mask), *part, header) for mask, part in zip(rollout.completion_mask, parts, strict=True)]


def refuse_wider(top_k: int, vocab_size: int) -> None:
    if top_k > vocab_size:
        raise UserError(
            f"objective.top_k is {top_k}; the teacher has {vocab_size} logit columns. Fix: at most {vocab_size}."
        )
