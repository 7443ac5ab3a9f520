"""Hybrid KL between vocabularies: a KL over the tokens that both have, L1 over what only one has (X-Token, 2605.21699).

    accelerate launch -m llmdistill.cross_tokenizer --config recipes/h_kl.yaml

Where a chunk begins: the KL over the tokens that mean the same to both, with one bucket for all the others, and the L1
distance of the others, put with the longest token of both that they begin with. The tokens within a chunk are trained
by the chunk's own likelihood (``chunk_weight``), as ALM's at temperature 1.

X-Token compares the others by rank, which knows no token, and has no bucket, so its KL can be negative; its mapping
leaves all groups of digits among the others (METHODS-2026 9.3.2 d). Where two models agree on the text, this is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llmdistill.composition.beside import with_labels
from llmdistill.composition.chunks import chunk_likelihood
from llmdistill.composition.classes import ClassLoss
from llmdistill.composition.method import Method
from llmdistill.composition.term import Ask, Term
from llmdistill.objectives.classes import hybrid_kl
from llmdistill.recipe.settings import setting


@dataclass
class Settings:
    """Settings of the hybrid KL."""

    sequences: Literal["dataset", "student"] = setting("dataset", "who writes the completions")
    chunk_weight: float = setting(1.0, "weight of the chunks' likelihoods beside it; 0: none", at_least=0)
    ce_weight: float = setting(0.0, "weight of the cross-entropy on the rows' own completions", at_least=0)


def build(args: Any) -> Method:
    """A term on classes, one on chunks and one on labels where they have weight."""
    asks = (Ask("teacher", "classes"),)
    terms = [Term("classes", ClassLoss(hybrid_kl), asks), *chunk_likelihood(args.chunk_weight)]
    return with_labels(terms, args.sequences, args.ce_weight)
