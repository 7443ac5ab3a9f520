"""Layer distillation: hidden states of some layers, through a projector, beside the divergence of the outputs.

    accelerate launch -m llmdistill.opd --config recipes/layers.yaml

``cosine`` as in DistilBERT (arXiv 1910.01108), ``mse`` as in TinyBERT (arXiv 1909.10351, eq. 8), each per token and
averaged over the pairs of layers; ``mi_alpha`` as in DISTILLER (METHODS 5.11): minus a lower bound of the mutual
information of student and teacher states, with a bilinear critic over the tokens of the global batch. Row i of its
scores needs the state i of the student and the teacher states of everybody, which are known before the first backward
pass: so it is a mean over rows like any other loss, and does not depend on micro-batches or ranks.

A linear projector for each pair of layers maps the student's width to the teacher's; it is trained with the student, at
its own rate, and is no part of what is saved as the student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmdistill.composition.method import Method
from llmdistill.composition.term import Ask, Hidden, Rows, Term
from llmdistill.objectives.divergences import reverse_kl
from llmdistill.objectives.layers import MIAlphaHead, cosine_distance, mi_alpha_rows, mse
from llmdistill.recipe.settings import Conflict, setting
from llmdistill.texts.sources import Only


@dataclass
class Settings:
    """Settings of layer distillation."""

    distance: Literal["cosine", "mse", "mi_alpha"] = setting("cosine", "what is minimised between hidden states")
    student_layers: list[int] = setting([-1], "the student's layers; negative numbers count from the last")
    teacher_layers: list[int] = setting([-1], "the teacher's, one for each of the student's")
    layer_weight: float = setting(1.0, "weight of the hidden states' loss", above=0)
    output_weight: float = setting(1.0, "weight of the reverse KL of the outputs beside it; 0: none", at_least=0)
    projector_learning_rate: float = setting(1e-3, "learning rate of projectors and critic", above=0)
    sequences: Literal["student", "dataset", "teacher"] = setting("student", "who writes the text")

    conflicts = (
        Conflict(
            lambda s: len(s.student_layers) != len(s.teacher_layers) or not s.student_layers,
            "objective.student_layers is {student_layers}, objective.teacher_layers {teacher_layers}; they are pairs",
            "as many of one as of the other, at least one",
        ),
    )


def build(args: Any) -> Method:
    """A term on hidden states, one on the outputs, and the modules of the first."""
    pairs = range(len(args.student_layers))
    critic = Critic() if args.distance == "mi_alpha" else None
    loss = (
        critic.loss if critic else partial(distances, distance={"cosine": cosine_distance, "mse": mse}[args.distance])
    )
    hidden = Hidden(loss, tuple(args.student_layers), tuple(args.teacher_layers))
    reads = ("index",) if critic else ()
    terms = [Term("layers", None, (Ask("teacher"),), reads, weight=args.layer_weight, hidden=hidden, survey=critic)]
    if args.output_weight:
        terms.append(Term("divergence", reverse_kl, (Ask("teacher"),), weight=args.output_weight))
    make: Any = MIAlphaHead if critic else partial(nn.Linear, bias=False)
    helpers = {f"pair_{k}": make for k in pairs}
    texts = {"main": Only(args.sequences)}
    return Method(tuple(terms), texts, helpers=helpers, helper_learning_rate=args.projector_learning_rate)


def distances(states: Sequence[Tensor], *evidence: Tensor, helpers: Mapping[str, nn.Module], distance: Any) -> Tensor:
    """The mean over pairs of layers, [n]."""
    projected = [helpers[f"pair_{k}"](state) for k, state in enumerate(states)]
    return torch.stack([distance(p, t) for p, t in zip(projected, evidence, strict=True)]).mean(0)


class Critic:
    """MI-alpha over the teacher's states of the global batch, which the survey shows it."""

    def __init__(self) -> None:
        self.teacher_states: list[Tensor] = []

    def measure(self, student_logits: Tensor, /, *evidence: Tensor) -> dict[str, Tensor]:
        return {}

    def derive(self, rows: Rows) -> Mapping[str, Tensor]:
        self.teacher_states = [rows.everywhere[f"judge_{k}"] for k in range(len(rows.everywhere))]
        count = len(next(iter(rows.values.values())))
        return {"index": torch.arange(rows.first, rows.first + count)}

    def loss(self, states: Sequence[Tensor], *evidence: Tensor, helpers: Mapping[str, nn.Module]) -> Tensor:
        index = evidence[-1]
        layer_pairs = zip(states, self.teacher_states, strict=True)
        losses = [mi_alpha_rows(helpers[f"pair_{k}"], s, t.to(s), index) for k, (s, t) in enumerate(layer_pairs)]
        return torch.stack(losses).mean(0)
