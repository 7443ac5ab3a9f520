"""What an autoregressive teacher may say to a masked diffusion student without a bias.

p(. | x_<i) knows nothing of what stands to the right. Where the student sees some of that, matching it teaches the
student to ignore its right context: on an exact toy the bound is .29 nats worse. Three forms have no such bias:

- ``no_suffix``: only at masked positions to whose right nothing is visible. Writing from left to right inside a block,
  as ``order: sequential`` does, all states are of that kind; in other orders on-policy distillation from an
  autoregressive teacher (OPDLM, arXiv 2606.06712) is biased at the others.
- ``suffix_corrected``: p(v | all others) by Bayes, over the teacher's likeliest tokens.
- sequence level: the teacher writes, and the student is trained on it with its own bound (``weighted_nll``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmdistill.diffusion.losses import shift_right


def without_visible_suffix(
    masked: Tensor, attention_mask: Tensor | None = None, blocks: Tensor | None = None
) -> Tensor:
    """Masked positions [B, L] bool to whose right nothing is visible: no token that is not masked.

    With ``blocks`` [B, L] (block attention) only the token's own block counts: later ones are never seen.
    """
    visible = ~masked if attention_mask is None else ~masked & attention_mask.bool()
    if blocks is None:
        return masked & (visible.flip(-1).cumsum(-1).flip(-1) == 0)
    same = blocks.unsqueeze(-1) == blocks.unsqueeze(-2)
    later = torch.ones(masked.shape[-1], masked.shape[-1], dtype=torch.bool, device=masked.device).triu(1)
    return masked & ~(same & later & visible.unsqueeze(-2)).any(-1)


def next_token_targets(teacher_logits: Tensor) -> Tensor:
    """The teacher's logits [B, L, V] on the clean text as predictions of the token at their own index. The first has
    none and is a stand-in: it must not count."""
    return shift_right(teacher_logits)


@torch.no_grad()
def suffix_corrected(
    teacher: Any, ids: Tensor, row: int, position: int, k: int, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """p(v | all other tokens) over the teacher's k likeliest v at a position, and the token that is there.

    proportional to p(v | x_<i) prod_{j > i} p(x_j | x_<j with v at i); one forward of the teacher over k + 1 copies.

    Args:
        teacher: ids [B, L] -> logits [B, L, V] of the NEXT token. position: at least 1.

    Returns:
        candidates [K] ids (k or k + 1 of them), log-probs [K].
    """
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    clean, here = ids[row : row + 1], mask[row : row + 1]
    first = teacher(clean, attention_mask=here)[0, position - 1].log_softmax(-1)
    candidates = first.topk(min(k, first.shape[-1])).indices
    own = clean[0, position]
    if not bool((candidates == own).any()):
        candidates = torch.cat([candidates, own.unsqueeze(0)])
    copies = clean.repeat(len(candidates), 1)
    copies[:, position] = candidates
    log_probs = teacher(copies, attention_mask=here.expand(len(copies), -1)).log_softmax(-1)
    later = log_probs[:, position:-1].gather(-1, copies[:, position + 1 :].unsqueeze(-1)).squeeze(-1)
    counts = here[:, position + 1 :].bool()
    return candidates, (first[candidates] + later.masked_fill(~counts, 0.0).sum(-1)).log_softmax(-1)
