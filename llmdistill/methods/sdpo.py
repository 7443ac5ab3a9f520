"""SDPO: the student's text, judged by the student that has seen a success (lasgroup/SDPO, METHODS 2.3, 2026 9.2.2).

    accelerate launch -m llmdistill.opd --config recipes/sdpo.yaml

Several samples of a prompt are verified (``objective.reward``). The judge is an average of the student
(``teacher.student: ema``, decay .95) that reads, beside the problem, the first *other* sample that succeeded
(:func:`sibling`, as ``data.contexts``); a sample without such a sibling is left out. Generalised JSD over the student's
100 likeliest tokens and one bucket for the rest, times min(S_now(y)/S_then(y), 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from llmdistill.composition.method import Method
from llmdistill.composition.term import Ask, Term
from llmdistill.objectives import sparse
from llmdistill.recipe.settings import GREEDY, PENALISED, Conflict, setting

SUCCESS = 0.5  # a reward from here on is one


@dataclass
class Settings:
    """Settings of SDPO."""

    beta: float = setting(0.5, "weight of the judge in the mixture; the authors' alpha", at_least=0, at_most=1)
    top_k: int = setting(100, "tokens of the student's list; the rest is one bucket", at_least=1)
    importance_cap: float = setting(2.0, "weigh tokens by min(student/sampler, cap); 0: no", at_least=0)
    reward: str = setting(
        "math", "what makes a success: math (verifies data.answer_column), or package.module:function"
    )

    conflicts = (
        Conflict(
            lambda s: s.rollouts.samples_per_prompt < 2,
            "objective.reward compares the samples of a prompt, and rollouts.samples_per_prompt is "
            "{rollouts.samples_per_prompt}",
            "--samples_per_prompt 8",
        ),
        Conflict(lambda s: s.importance_cap and GREEDY.when(s), GREEDY.message, GREEDY.fix),
        Conflict(lambda s: s.importance_cap and PENALISED.when(s), PENALISED.message, PENALISED.fix),
    )


def build(args: Any) -> Method:
    """One term. Judge and context are the recipe's."""
    loss = partial(sparse.jsd, beta=args.beta)
    term = Term("divergence", loss, (Ask("teacher", "top_k"),), top_k=args.top_k, support="student", on_student=True)
    cap = args.importance_cap
    return Method((term.importance_weighted(cap, **args.sampler) if cap else term,))


def successes(completions: list[str], rewards: list[float] | None) -> list[str | None]:
    """For every sample of a prompt the first *other* one that succeeded; else None."""
    right = [i for i, reward in enumerate(rewards or []) if reward >= SUCCESS]
    chosen = [next((j for j in right if j != i), None) for i in range(len(completions))]
    return [None if j is None else completions[j] for j in chosen]


def sibling(row: dict[str, Any], completions: list[str], rewards: list[float] | None) -> list[str | None]:
    """For every sample of a prompt the first other one that succeeded, as a solution to learn from; else None."""
    return [
        None if text is None else f"A correct solution:\n\n{text.strip()}\n\nSolve it yourself."
        for text in successes(completions, rewards)
    ]
