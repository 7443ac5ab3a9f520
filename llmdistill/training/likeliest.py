"""Which tokens the student finds likeliest: the ids it asks a teacher about.

A reverse KL weighs tokens by the student's probability. What the teacher's own top-k leaves out of it is exactly what a
student does not do right yet (METHODS 2.1: the support of the top-k estimator is the student's).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmdistill.models.heads import Head, forward_to_head
from llmdistill.models.modes import evaluating
from llmdistill.objectives.rows import TokenRows
from llmdistill.objectives.streaming import streamed_metrics
from llmdistill.texts import Rollout
from llmdistill.texts.views import View, plain


@torch.no_grad()
def likeliest_ids(
    model: nn.Module, head: Head, rollout: Rollout, k: int, *, vocab_size: int, chunk_tokens: int, batch_sequences: int
) -> Tensor:
    """The k likeliest tokens below ``vocab_size`` at every counted position, [N, k] int64 on the CPU, in row order.

    Args:
        model: the student as it is called in training, so that sharded weights are gathered.
    """
    device, found = head.linear.weight.device, [torch.zeros(0, k, dtype=torch.int64)]
    with evaluating(model):
        for start in range(0, len(rollout), batch_sequences):
            part = rollout.sequences(range(start, min(start + batch_sequences, len(rollout)))).to(device)

            view = plain(part)

            def at_the_head(hidden_BTH: Tensor, view: View = view) -> Tensor:
                rows_NH = view.rows(hidden_BTH)
                listed = streamed_metrics(
                    lambda logits_nV, ids: {"ids": logits_nV.topk(k, dim=-1).indices},
                    rows_NH,
                    head.linear,
                    TokenRows(view.targets),
                    chunk_tokens=chunk_tokens,
                    logit_scale=head.logit_scale,
                    softcap=head.softcap,
                    vocab_size=vocab_size,
                )
                found.append(listed["ids"].cpu())
                return rows_NH.new_zeros(())

            forward_to_head(model, head.linear, view, at_the_head)
    return torch.cat(found)
