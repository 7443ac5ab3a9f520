"""The losses of a masked diffusion student on rows: masked tokens with the weight of their time.

Each returns a function of the student's logits [n, V] and a row's evidence, for a
:class:`~llmdistill.composition.term.Term` over a noised text. The mask token is never a prediction: its column is left
out, of the teacher's distribution too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from llmdistill.composition.term import Ask, Mean, Term
from llmdistill.diffusion.losses import without_mask_token
from llmdistill.diffusion.noising import Norm
from llmdistill.objectives import divergences, sparse
from llmdistill.objectives.labels import cross_entropy

Divergence = Literal["forward_kl", "reverse_kl"]
Targets = Literal["all", "no_suffix", "suffix_corrected"]
MEANS: dict[Norm, Mean] = {"token": "token", "masked": "token", "sequence": "sequence", "batch": "batch"}


def masked_ce(mask_id: int) -> Callable[..., Tensor]:
    """-log D(x_i | noised text), [n]; whatever evidence there is besides the tokens is not read."""

    def of(student_logits: Tensor, *evidence: Tensor, tokens: int = 0) -> Tensor:
        return cross_entropy(without_mask_token(student_logits, mask_id), evidence[tokens])

    return of


def denoising(mask_id: int, norm: Norm = "token") -> Term:
    """The weighted cross-entropy of masked tokens: with the bound's weights and norm batch the bound in nats."""
    ce = masked_ce(mask_id)

    def loss(student_logits: Tensor, tokens: Tensor, noise_weight: Tensor) -> Tensor:
        return ce(student_logits, tokens) * noise_weight

    return Term("denoising", loss, (), ("tokens", "noise_weight"), mean=MEANS[norm], measures={"masked_ce": ce})


def towards_ar(
    mask_id: int,
    targets: Targets,
    *,
    divergence: Divergence = "forward_kl",
    top_k: int = 0,
    norm: Norm = "token",
    labels: bool = False,
) -> Term:
    """A divergence from the next-token distribution of an autoregressive teacher, which has read the clean text.

    Args:
        targets: ``all`` masked tokens, as OPDLM (arXiv 2606.06712): biased at those with a visible suffix.
            ``no_suffix``: only those without. ``suffix_corrected``: all, towards p(v | all other tokens), which a
            :class:`~llmdistill.diffusion.suffix_judge.SuffixCorrected` teacher says.
        top_k: tokens that the teacher lists, one bucket for the rest; 0: its whole distribution.
        labels: the text is a sample of the teacher's law, and where the divergence does not count its tokens do.
    """
    ce, dense, listed = masked_ce(mask_id), getattr(divergences, divergence), getattr(sparse, divergence)

    def loss(student_logits: Tensor, *evidence: Tensor) -> Tensor:
        *heard, tokens, noise_weight, no_suffix = evidence
        logits = without_mask_token(student_logits, mask_id)
        if len(heard) == 1:
            values = dense(logits, without_mask_token(heard[0], mask_id))
        else:
            values = listed(logits, heard[0].masked_fill(heard[0] == mask_id, -1), heard[1])
        if targets == "no_suffix":
            elsewhere = ce(student_logits, tokens) if labels else torch.zeros_like(values)
            values = torch.where(no_suffix, values, elsewhere)
        return values * noise_weight

    heard = 2 if top_k else 1

    def of_labels(student_logits: Tensor, *evidence: Tensor) -> Tensor:
        return ce(student_logits, *evidence, tokens=heard)

    return Term(
        "divergence",
        loss,
        (Ask("teacher", "top_k" if top_k else "full"),),
        ("tokens", "noise_weight", "no_suffix"),
        top_k=top_k,
        mean=MEANS[norm],
        measures={"masked_ce": of_labels},
        vanishes=not labels and targets != "suffix_corrected",
    )
