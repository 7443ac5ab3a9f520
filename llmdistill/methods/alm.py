"""Approximate likelihood matching: a teacher of any tokenizer (Minixhofer et al., arXiv 2503.20083; METHODS 6.1).

    accelerate launch -m llmdistill.cross_tokenizer --config recipes/alm.yaml

Mean over chunks of D(T(c)^(1/tau), S(c)^(1/tau)), D a divergence of the probabilities of "this chunk or not". Chunks
are the smallest stretches of text that end at a token of both tokenizers; S(c), T(c) are the products of their tokens'.

``debias`` counts in the chunk that a word ends at its end, on both sides: a longer token says something of what comes
next, and a shorter one does not. A chunk whose end the teacher finds unlikely to be a word's (``merge_threshold``) goes
on into the next. Both take the teacher's whole distributions, so a model in this process.

Simplified away: the authors' losses on hidden states, and their weights by gradient norms.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from llmdistill.composition.beside import with_labels
from llmdistill.composition.chunks import ChunkLoss
from llmdistill.composition.method import Method
from llmdistill.composition.term import Ask, Term
from llmdistill.objectives.alm import BinaryDivergence, binary_divergence
from llmdistill.recipe.settings import Conflict, setting
from llmdistill.teachers.chunks import Question


@dataclass
class Settings:
    """Settings of approximate likelihood matching."""

    sequences: Literal["dataset", "student"] = setting("dataset", "who writes the completions")
    divergence: BinaryDivergence = setting("binary_kl", "of the chunk's probabilities; binary_ce: with the entropy")
    chunk_temperature: float = setting(100.0, "tau: divides log-probabilities of chunks", above=0)
    debias: bool = setting(True, "count that a word ends where a chunk does (needs a teacher in this process)")
    merge_threshold: float = setting(
        0.1, "a chunk goes on where the teacher finds a word's end no likelier; 0: never", at_least=0, below=1
    )
    ce_weight: float = setting(0.0, "weight of the cross-entropy on the rows' own completions", at_least=0)

    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict(
            lambda s: s.merge_threshold not in (0.0, 0.1) and not s.debias,
            "objective.merge_threshold is {merge_threshold} and objective.debias false; both hear where words end",
            "--debias true, or leave it out",
        ),
    )


def build(args: Any) -> Method:
    """A term on chunks, and one on the dataset's tokens where it has weight."""
    loss = partial(binary_divergence, temperature=args.chunk_temperature, divergence=args.divergence)
    question = Question(args.debias, args.merge_threshold if args.debias else 0.0)
    vanishes = args.divergence != "binary_ce"
    terms = [Term("chunks", group=ChunkLoss(loss, question), asks=(Ask("teacher", "chunks"),), vanishes=vanishes)]
    return with_labels(terms, args.sequences, args.ce_weight)
