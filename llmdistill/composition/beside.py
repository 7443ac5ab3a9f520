"""What stands beside other terms across tokenizers: tokens that both have, states, labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from llmdistill.composition.classes import ClassLoss
from llmdistill.composition.method import Method
from llmdistill.composition.term import Ask, Hidden, Rows, Term
from llmdistill.objectives.classes import Direction, shared_kl
from llmdistill.objectives.labels import cross_entropy
from llmdistill.objectives.layers import channelwise, mean_square
from llmdistill.texts.sources import Kind, Only


def with_labels(terms: Sequence[Term], sequences: Kind, ce_weight: float) -> Method:
    """A method of terms on the text that ``sequences`` wrote, and the cross-entropy on the dataset's tokens."""
    texts, labels = {"main": Only(sequences)}, list[Term]()
    if ce_weight:
        on = "main" if sequences == "dataset" else "labels"
        texts.setdefault(on, Only("dataset", optional=True))
        labels = [Term("cross_entropy", cross_entropy, (), ("tokens",), on, weight=ce_weight)]
    return Method((*terms, *labels), texts)


def shared_tokens(weight: float, direction: Direction) -> list[Term]:
    """The KL over the tokens that mean the same to both, and their exact tail, where a chunk begins."""
    loss = ClassLoss(partial(shared_kl, direction=direction))
    return [Term("shared", loss, (Ask("teacher", "classes"),), weight=weight)] if weight else []


def chunk_ends(weight: float, layers: Sequence[int], *, projected: bool) -> list[Term]:
    """Hidden states of some layers at the last token of every chunk, ALM's side loss on them."""
    if not weight:
        return []
    scale = ChannelScale(projected)
    hidden = Hidden(scale.loss, tuple(layers), tuple(layers))
    return [Term("hidden", None, (Ask("teacher", "chunks"),), weight=weight, hidden=hidden, survey=scale)]


class ChannelScale:
    """The mean square of every channel of the teacher's states over the global batch, which the survey tells."""

    def __init__(self, projected: bool) -> None:
        self.projected, self.mean_squares = projected, list[Tensor]()

    def measure(self, student_logits: Tensor, /, *evidence: Tensor) -> dict[str, Tensor]:
        return {}

    def derive(self, rows: Rows) -> Mapping[str, Tensor]:
        *states, told_N = (rows.everywhere[f"judge_{k}"] for k in range(len(rows.everywhere)))
        self.mean_squares = [mean_square(states_NH[told_N]) for states_NH in states]
        return {}

    def loss(self, states: Sequence[Tensor], *evidence: Tensor, helpers: Mapping[str, nn.Module]) -> Tensor:
        """The mean over layers, [n]; 0 where no chunk ends."""
        *judged, told_n = evidence
        if self.projected:
            states = [helpers[f"chunk_ends_{k}"](state_nH) for k, state_nH in enumerate(states)]
        losses = [channelwise(s, t, scale) for s, t, scale in zip(states, judged, self.mean_squares, strict=True)]
        return torch.stack(losses).mean(0) * told_n
