"""Entropy-aware OPD: the sampled reverse KL, and a forward KL where the teacher is unsure (arXiv 2603.07079).

    accelerate launch -m llmdistill.opd --config recipes/entropy_aware.yaml

-sg[log T/S] log S(y) on every token, plus sum_{v in T's top K} T (log T - log S) where H(T) > ``threshold`` nats;
added, not switched, and divided by all tokens (METHODS-2026 9.1.5, after an audit of the authors' code). H(T) needs the
whole row, so the teacher lives in this process.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from llmdistill.composition.method import Method
from llmdistill.composition.term import Ask, Term
from llmdistill.objectives.entropy_aware import entropy_aware
from llmdistill.objectives.selection import entropy
from llmdistill.recipe.settings import GREEDY, PENALISED, setting


@dataclass
class Settings:
    """Settings of entropy-aware OPD."""

    threshold: float = setting(0.8, "teacher entropy, in nats, from which the forward KL is added", at_least=0)
    top_k: int = setting(16, "the teacher's likeliest tokens that it is over", at_least=1)
    importance_cap: float = setting(5.0, "weigh tokens by min(student/sampler, cap); 0: no", at_least=0)

    conflicts = (GREEDY, PENALISED)


def build(args: Any) -> Method:
    """One term on the student's own tokens."""
    loss = partial(gated, k=args.top_k, threshold=args.threshold, **args.sampler)
    term = Term("divergence", loss, (Ask("teacher"),), ("tokens",), on_student=True, vanishes=False)
    return Method((term.importance_weighted(args.importance_cap, **args.sampler),))


def gated(student_logits: Tensor, teacher_logits: Tensor, token_ids: Tensor, *, k: int, **options: Any) -> Tensor:
    """:func:`~llmdistill.objectives.entropy_aware.entropy_aware` from the teacher's whole rows [n, V]."""
    log_t = teacher_logits.float().log_softmax(-1)
    listed = log_t.topk(min(k, log_t.shape[-1]), dim=-1)
    teacher_lp = log_t.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return entropy_aware(
        student_logits, token_ids, teacher_lp, listed.indices, listed.values, entropy(teacher_logits), **options
    )
