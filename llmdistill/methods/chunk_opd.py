"""On-policy distillation from a teacher of any tokenizer: the policy gradient of the chunks that both have.

    accelerate launch -m llmdistill.cross_tokenizer --config recipes/chunk_opd.yaml

The student writes; every token of a chunk gets log T(chunk) - log S(chunk), without gradient: at the cuts that both
tokenizers share this is the estimator of the reverse KL that ``objective.estimator: sampled`` takes token by token
(METHODS-2026 9.3.7). Any teacher will do that gives log-probs of its own tokens: here, vLLM, a service. With a model in
this process ``shared_weight`` adds the exact KL over the tokens that mean the same to both, where a chunk begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from llmdistill.composition.beside import shared_tokens, with_labels
from llmdistill.composition.chunks import ChunkLoss
from llmdistill.composition.method import Method
from llmdistill.composition.term import Ask, Term
from llmdistill.objectives.alm import chunk_credit
from llmdistill.recipe.settings import GREEDY, PENALISED, Conflict, setting
from llmdistill.teachers.chunks import Question


@dataclass
class Settings:
    """Settings of on-policy distillation in chunks."""

    shared_weight: float = setting(
        0.0, "weight of the reverse KL over tokens that both have (needs a teacher in this process)", at_least=0
    )
    ce_weight: float = setting(0.0, "weight of the cross-entropy on the rows' own completions", at_least=0)

    conflicts: ClassVar[tuple[Conflict, ...]] = (
        GREEDY,
        PENALISED,
        Conflict(
            lambda s: s.rollouts.temperature != 1 or s.rollouts.top_p != 1 or s.rollouts.top_k or s.rollouts.min_p,
            "rollouts.temperature is {rollouts.temperature:g}, top_p {rollouts.top_p:g}, top_k {rollouts.top_k}, min_p "
            "{rollouts.min_p:g}; the gradient is that of tokens drawn from the student's own distribution",
            "--rollouts.temperature 1 --rollouts.top_p 1 --rollouts.top_k 0 --rollouts.min_p 0",
        ),
    )


def build(args: Any) -> Method:
    """A term on chunks of the student's text, and one on the dataset's tokens where it has weight."""
    group, asks = ChunkLoss(chunk_credit, Question()), (Ask("teacher", "chunks"),)
    terms = [Term("chunks", group=group, asks=asks, on_student=True), *shared_tokens(args.shared_weight, "reverse")]
    return with_labels(terms, "student", args.ce_weight)
