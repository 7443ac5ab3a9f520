"""Approximate likelihood matching: a teacher of any tokenizer (Minixhofer et al., arXiv 2503.20083; METHODS 6.1).

    accelerate launch -m llmdistill.cross_tokenizer --config recipes/alm.yaml

Mean over chunks of tau D(T(c)^(1/tau), S(c)^(1/tau)), D a divergence of the probabilities of "this chunk or not".
Chunks are the smallest stretches of text that end at a token of both tokenizers; S(c), T(c) are the products of their
tokens'.

tau D is in nats whatever tau is: at the default a chunk of surprisal B that the teacher finds A has a gradient of
(1 - A/B), of fine-tuning's 1. The authors leave the factor out. Gradients of a hundredth then come near Adam's epsilon
where there are many weights, and next to them a ``ce_weight`` of .1 is ten times the loss (eval/proof/transfer.md).

``debias`` counts in the chunk that a word ends at its end, on both sides: a longer token says something of what comes
next, and a shorter one does not. A chunk whose end the teacher finds unlikely to be a word's (``merge_threshold``) goes
on into the next. Both take the teacher's whole distributions, so a model in this process.

Beside it, each with its weight: the authors' fine-tuning on labels and their loss on hidden states where chunks end
(for a teacher that the student was; others need a projector, and the authors saw no gain), and a KL over the tokens
that mean the same to both. ``balance: gradients`` weighs all of them by the inverse of their gradients' norms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from llmdistill.composition.balance import balanced
from llmdistill.composition.beside import chunk_ends, shared_tokens, with_labels
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
    hidden_weight: float = setting(0.0, "weight of the loss on hidden states where chunks end", at_least=0)
    hidden_layers: list[int] = setting([-1], "their layers, on both sides; negative numbers count from the last")
    hidden_projector: bool = setting(
        False, "map the student's states to the teacher's width, each layer's by a linear module"
    )
    shared_weight: float = setting(0.0, "weight of the forward KL over tokens that both have", at_least=0)
    balance: Literal["fixed", "gradients"] = setting(
        "fixed", "gradients: weights over the norms of the terms' gradients"
    )

    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict(
            lambda s: s.merge_threshold not in (0.0, 0.1) and not s.debias,
            "objective.merge_threshold is {merge_threshold} and objective.debias false; both hear where words end",
            "--debias true, or leave it out",
        ),
        Conflict(
            lambda s: s.balance == "gradients" and not (s.ce_weight or s.hidden_weight or s.shared_weight),
            "objective.balance is {balance}, and there is one term: nothing is weighed against it",
            "--hidden_weight 1 or --ce_weight 1",
        ),
        Conflict(
            lambda s: not s.hidden_weight and (s.hidden_projector or s.hidden_layers != [-1]),
            "objective.hidden_layers is {hidden_layers}, hidden_projector {hidden_projector}, and hidden_weight 0",
            "--hidden_weight 1, or leave them out",
        ),
        Conflict(
            lambda s: s.hidden_weight and not s.hidden_layers,
            "objective.hidden_weight is {hidden_weight} and hidden_layers empty",
            "--hidden_layers '[-1]'",
        ),
    )


def in_nats(student_C: Tensor, teacher_C: Tensor, *, temperature: float, divergence: BinaryDivergence) -> Tensor:
    """tau D of every chunk -> [C]."""
    return temperature * binary_divergence(student_C, teacher_C, temperature=temperature, divergence=divergence)


def build(args: Any) -> Method:
    """A term on chunks, and those beside it that have weight."""
    loss = partial(in_nats, temperature=args.chunk_temperature, divergence=args.divergence)
    question = Question(args.debias, args.merge_threshold if args.debias else 0.0)
    vanishes = args.divergence != "binary_ce"
    terms = [
        Term("chunks", group=ChunkLoss(loss, question), asks=(Ask("teacher", "chunks"),), vanishes=vanishes),
        *shared_tokens(args.shared_weight, "forward"),
        *chunk_ends(args.hidden_weight, args.hidden_layers, projected=args.hidden_projector),
    ]
    projectors = range(len(args.hidden_layers) if args.hidden_projector else 0)
    helpers = {f"chunk_ends_{k}": nn.Linear for k in projectors}
    method = replace(with_labels(terms, args.sequences, args.ce_weight), helpers=helpers)
    return balanced(method) if args.balance == "gradients" else method
