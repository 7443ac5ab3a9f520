"""DistiLLM-2: skewed KLs of two directions, each on the text of the model that it suits (arXiv 2503.07067).

    accelerate launch -m llmdistill.opd --config recipes/distillm2.yaml

(2 - beta) KL(T || a T + (1 - a) S) on the teacher's completion of a prompt (the dataset's, or sampled anew), beta KL(S
|| (1 - a) T + a sg[S]) on the student's; the mean of each sequence, then over sequences (METHODS 1.4). With
``adaptive_alpha`` a is set per sequence, so that every text teaches the same share of its gap as the texts of the first
round did; in the authors' release that never runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llmdistill.composition.method import Measured, Method, Schedule
from llmdistill.composition.term import Ask, Rows, Term
from llmdistill.objectives import distillm2 as loss
from llmdistill.objectives.sampler import token_logprobs
from llmdistill.recipe.settings import setting
from llmdistill.texts.sources import Only


@dataclass
class Settings:
    """Settings of DistiLLM-2."""

    alpha: float = setting(0.1, "share of the other model in both mixtures", above=0, below=1)
    adaptive_alpha: bool = setting(False, "set it per sequence, at most alpha, from the first round's gap")
    gradual_beta: bool = setting(False, "the student's side weighs 1 + progress, at most 1.5, the teacher's the rest")
    teacher_text: Literal["dataset", "teacher"] = setting("dataset", "its text: stored, or sampled anew")


def build(args: Any) -> Method:
    """Two texts, two terms."""
    beta = Beta(args.gradual_beta)
    on_teacher = Skew(loss.on_teacher_text, 1.0, args.alpha, args.adaptive_alpha)
    on_student = Skew(loss.on_student_text, -1.0, args.alpha, args.adaptive_alpha)
    reads = ("tokens", "alpha") if args.adaptive_alpha else ()

    def term(text: str, side: Skew, weight: Any) -> Term:
        survey: dict[str, Any] = {"survey": side} if args.adaptive_alpha else {}
        return Term(f"on_{text}", side.loss, (Ask("teacher"),), reads, text, weight=weight, mean="sequence", **survey)

    terms = term("teacher", on_teacher, lambda: 2.0 - beta.now), term("student", on_student, lambda: beta.now)
    texts = {"teacher": Only(args.teacher_text), "student": Only("student")}
    return Method(terms, texts, {"beta": beta, "on_teacher": on_teacher, "on_student": on_student})


@dataclass
class Beta(Schedule):
    """Weight of the student's side over training."""

    gradual: bool
    now: float = 1.0
    total_steps: int = 1
    state = ("now",)

    def start(self, total_steps: int) -> None:
        self.total_steps = total_steps

    def update(self, measured: Measured) -> None:
        self.now = loss.gradual_beta(measured.step, self.total_steps) if self.gradual else 1.0


@dataclass
class Skew(Schedule):
    """One side's loss, and with ``adaptive`` its a per sequence: the survey, and the first round's gap as state."""

    divergence: Any
    sign: float  # of the gap e^(mean log T) - e^(mean log S) that this side's text has
    alpha: float
    adaptive: bool
    anchor: float | None = None
    state = ("anchor",)

    def loss(self, student_logits: Tensor, teacher_logits: Tensor, *reads: Tensor) -> Any:
        alpha_n = torch.full(student_logits.shape[:1], self.alpha, device=student_logits.device)
        return self.divergence(student_logits, teacher_logits, reads[1] if self.adaptive else alpha_n)

    def measure(self, student_logits: Tensor, /, *evidence: Tensor) -> dict[str, Tensor]:
        teacher_logits, token_ids = evidence
        return {"s": token_logprobs(student_logits, token_ids), "t": token_logprobs(teacher_logits, token_ids)}

    def derive(self, rows: Rows) -> Mapping[str, Tensor]:
        if self.anchor is None:
            counted = torch.tensor(rows.counts_everywhere) > 0
            gaps = self._gap(rows.everywhere, rows.counts_everywhere)[counted]
            self.anchor = float(gaps.mean()) if len(gaps) else None  # a round without a token is not the first
        alpha_B = loss.adaptive_alpha(self._gap(rows.values, rows.counts), self.anchor or 0.0, base=self.alpha)
        return {"alpha": alpha_B.repeat_interleave(torch.tensor(rows.counts))}

    def _gap(self, values: Mapping[str, Tensor], counts: tuple[int, ...]) -> Tensor:
        return self.sign * loss.probability_gap(*(loss.sequence_means(values[name], counts) for name in "st"))
