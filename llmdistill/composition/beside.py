"""What stands beside the terms of methods across tokenizers: the chunks' likelihoods, and the dataset's own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from llmdistill.composition.chunks import ChunkLoss
from llmdistill.composition.method import Method
from llmdistill.composition.term import Ask, Term
from llmdistill.objectives.alm import binary_divergence
from llmdistill.objectives.labels import cross_entropy
from llmdistill.teachers.chunks import Question
from llmdistill.texts.sources import Kind, Only

WORDS = Question(word_ends=True, merge_threshold=0.1)  # chunks as ALM has them


def chunk_likelihood(weight: float) -> list[Term]:
    """The KL of "this chunk or another" in nats, ALM's loss at temperature 1, which trains the tokens within chunks."""
    group = ChunkLoss(partial(binary_divergence, temperature=1.0), WORDS)
    return [Term("chunks", group=group, asks=(Ask("teacher", "chunks"),), weight=weight)] if weight else []


def with_labels(terms: Sequence[Term], sequences: Kind, ce_weight: float) -> Method:
    """A method of terms on the text that ``sequences`` wrote, and the cross-entropy on the dataset's tokens."""
    texts, labels = {"main": Only(sequences)}, list[Term]()
    if ce_weight:
        on = "main" if sequences == "dataset" else "labels"
        texts.setdefault(on, Only("dataset", optional=True))
        labels = [Term("cross_entropy", cross_entropy, (), ("tokens",), on, weight=ce_weight)]
    return Method((*terms, *labels), texts)
