"""SimCT: a reverse KL in which the chunk that was written stands among the tokens that both have (arXiv 2605.07711).

    accelerate launch -m llmdistill.cross_tokenizer --config recipes/simct.yaml

Mean over chunks of KL(S || T) over the chunk itself, the classes of tokens that both can tell where it begins (see
``p_kl``), and what is left of the classes that it begins in.

As published the classes are softmaxed scores, and a chunk's score is the mean of its tokens' log-probabilities: no
probability, too large for long chunks; the released code takes raw logits, so that adding a constant to them moves the
loss (METHODS-2026 9.3.3). Here the chunk has its own probability and so have all others: they add up to 1, and two
models that agree on the text have a loss of 0. ``debias`` counts in the chunk that a word ends with it, as ALM does;
where words do not end, the tokens within chunks are then not trained, and unlearned (eval/arena, track "digits").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llmdistill.composition.beside import with_labels
from llmdistill.composition.classes import SpanLoss
from llmdistill.composition.method import Method
from llmdistill.composition.term import Ask, Term
from llmdistill.recipe.settings import setting
from llmdistill.teachers.chunks import Question


@dataclass
class Settings:
    """Settings of SimCT."""

    sequences: Literal["dataset", "student"] = setting("student", "who writes the completions")
    debias: bool = setting(False, "the chunk is followed by a word's end, on both sides")
    ce_weight: float = setting(0.0, "weight of the cross-entropy on the rows' own completions", at_least=0)


def build(args: Any) -> Method:
    """A term on chunks among classes, and one on labels where it has weight."""
    asks = Ask("teacher", "chunks"), Ask("teacher", "classes")
    terms = [Term("spans", group=SpanLoss(Question(word_ends=args.debias)), asks=asks)]
    return with_labels(terms, args.sequences, args.ce_weight)
