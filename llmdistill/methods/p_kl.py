"""Projected KL between vocabularies: what comes next, in classes of tokens that both can tell (X-Token, 2605.21699).

    accelerate launch -m llmdistill.cross_tokenizer --config recipes/p_kl.yaml

Where a chunk begins, both models say how the text goes on; each token counts for the longest token of both vocabularies
that it begins with, and the loss is the KL of the two sums, exact and with all of the mass. The tokens within a chunk
are trained by the chunk's own likelihood (``chunk_weight``), as ALM's at temperature 1.

X-Token's own projection re-tokenizes each student token, so a teacher's token whose pieces the student owns gets no
mass at all (65 % of DeepSeek's vocabulary for SmolLM2, all its numerals), and averages positions of a chunk: a student
that agrees with its teacher has a loss of 18 nats on a numeral (METHODS-2026 9.3.2). Here it has none.
Simplified away: the temperature, since powers of probabilities do not add up over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llmdistill.composition.beside import with_labels
from llmdistill.composition.chunks import chunk_likelihood
from llmdistill.composition.classes import ClassLoss
from llmdistill.composition.method import Method
from llmdistill.composition.term import Ask, Term
from llmdistill.objectives.classes import Direction, class_kl
from llmdistill.recipe.settings import setting


@dataclass
class Settings:
    """Settings of the projected KL."""

    sequences: Literal["dataset", "student"] = setting("dataset", "who writes the completions")
    direction: Direction = setting("forward", "forward: KL(teacher || student); reverse: KL(student || teacher)")
    chunk_weight: float = setting(1.0, "weight of the chunks' likelihoods beside it; 0: none", at_least=0)
    ce_weight: float = setting(0.0, "weight of the cross-entropy on the rows' own completions", at_least=0)


def build(args: Any) -> Method:
    """A term on classes, one on chunks and one on labels where they have weight."""
    loss = ClassLoss(lambda student, teacher, same: class_kl(student, teacher, direction=args.direction))
    terms = [Term("classes", loss, (Ask("teacher", "classes"),)), *chunk_likelihood(args.chunk_weight)]
    return with_labels(terms, args.sequences, args.ce_weight)
