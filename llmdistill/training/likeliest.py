"""Which tokens the student finds likeliest: the ids it asks a teacher about.

A reverse KL weighs tokens by the student's probability. What the teacher's own top-k leaves out of it is exactly what a
student does not do right yet (METHODS 2.1: the support of the top-k estimator is the student's).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmdistill.models.heads import Head
from llmdistill.models.passes import metrics_at_head
from llmdistill.objectives.rows import TokenRows
from llmdistill.texts import Rollout
from llmdistill.texts.batches import Passes


def likeliest_ids(
    model: nn.Module, head: Head, rollout: Rollout, k: int, *, vocab_size: int, chunk_tokens: int, passes: Passes
) -> Tensor:
    """The k likeliest tokens below ``vocab_size`` at every counted position, [N, k] int64 on the CPU, in row order.

    Args:
        model: the student as it is called in training, so that sharded weights are gathered.
    """

    def topk(logits_nV: Tensor, token_ids_n: Tensor) -> dict[str, Tensor]:
        return {"ids": logits_nV.topk(k, dim=-1).indices}

    parts = passes.of(rollout, head.linear.weight.device)
    batches = ((part, TokenRows(part.token_rows())) for part in parts)
    metrics = metrics_at_head(model, head, batches, topk, chunk_tokens=chunk_tokens, vocab_size=vocab_size)
    return metrics.get("ids", torch.zeros(0, k, dtype=torch.int64))
