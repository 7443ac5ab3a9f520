"""A term: a loss on the student's rows of a text, and the evidence of its judges that it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from llmdistill.errors import UserError
from llmdistill.objectives.composed import on_samples
from llmdistill.objectives.metrics import chunk_metrics, class_metrics, dense_metrics, sampled_metrics, sparse_metrics

Support = Literal["teacher", "student", "union"]
Mean = Literal["token", "sequence", "batch"]
AskKind = Literal["full", "top_k", "sampled", "chunks", "classes"]
OTHER_TOKENIZER: tuple[AskKind, ...] = ("chunks", "classes")  # what a judge of another tokenizer can say
# Tensors of evidence from one judge.
ARGUMENTS: dict[AskKind, int] = {"full": 1, "top_k": 2, "sampled": 2, "chunks": 7, "classes": 4}
METRICS: dict[AskKind, Callable[..., dict[str, Tensor]]] = {
    "full": dense_metrics,
    "top_k": sparse_metrics,
    "sampled": sampled_metrics,
    "chunks": chunk_metrics,
    "classes": class_metrics,
}


@dataclass(frozen=True)
class Ask:
    """What a term hears from one judge.

    ``full``: logits [n, V]; ``top_k``: ids and log-probs [n, K]; ``sampled``: token ids and their log-probs [n];
    ``chunks`` and ``classes``, of a judge with another tokenizer: what the methods of these names of
    :class:`~llmdistill.teachers.chunks.ChunkTeacher` return; a term on hidden states hears those at the ends of chunks.
    All that a term hears as ``top_k`` is about one list of ids, whoever is asked.
    """

    judge: str = "teacher"
    kind: AskKind = "full"
    context: str = ""  # the judge reads the completion under this one of the row's contexts; empty: the prompt


class HiddenLoss(Protocol):
    """A loss on hidden states of the student's layers, in ordinary autograd: no logits are formed for it."""

    def __call__(self, states: Sequence[Tensor], *evidence: Tensor, helpers: Mapping[str, nn.Module]) -> Tensor:
        """[n] from the student's states [n, H], a tensor for each of ``student_layers``, and the evidence."""
        ...


@dataclass(frozen=True)
class Hidden:
    """Which layers' hidden states a term reads: of the student, and of its judges, who live in this process.

    Numbers count decoder layers from 0, or from the last, -1; a state is what the layer puts out, before the model's
    final norm. The evidence of a judge is a tensor [n, H] for each of ``judge``.
    """

    loss: HiddenLoss
    student: tuple[int, ...]
    judge: tuple[int, ...]


@dataclass(frozen=True)
class Groups:
    """How the rows of a micro-batch fall into sequences, text by text: what a reduction over groups is told."""

    counts: tuple[int, ...]  # counted rows of every sequence, in row order
    sequences: tuple[int, ...]  # sequences of every text, in the order of the term's texts
    evidence: tuple[Tensor, ...] = ()  # what of that which the term hears and reads of the rows is tensors
    weights_N: Tensor | None = None  # of the rows, for a loss that ``weighs`` its groups; None: 1


class GroupLoss(Protocol):
    """A loss of groups of rows, which reaches the logits through a number per row only.

    So its derivative by those numbers makes a weight for every row, and the weighted numbers have its exact gradient:
    two passes over the projection, and [N, V] logits never exist.

    One that reads the rows' weights has an attribute ``weighs`` that is True; others are refused where there are some.
    """

    def values(self, student_logits: Tensor, /, *evidence: Tensor) -> Tensor:
        """The number of every row, [n], or the numbers, [n, D]; differentiable."""
        ...

    def reduce(self, values_N: Tensor, groups: Groups) -> Tensor:
        """The sum of the loss over the groups of a micro-batch, a scalar; differentiable."""
        ...

    def count(self, groups: Groups) -> float:
        """By how much the sum is divided in the end."""
        ...

    def observe(self, values_N: Tensor, groups: Groups) -> Mapping[str, tuple[float, float]]:
        """What is logged: name -> (sum, count)."""
        ...


@dataclass(frozen=True)
class Rows:
    """Numbers of the rows of a whole round, before the first backward pass: those of this process, and of all."""

    values: Mapping[str, Tensor]  # name -> [N] of this process
    everywhere: Mapping[str, Tensor]  # name -> [N of all processes], in rank order
    counts: tuple[int, ...]  # rows of each sequence of this process
    counts_everywhere: tuple[int, ...]  # of all processes, in rank order
    first: int  # of this process's rows among all


class Survey(Protocol):
    """Looks at the global batch before it is trained on: selections, thresholds, a number per sequence."""

    def measure(self, student_logits: Tensor, *evidence: Tensor) -> dict[str, Tensor]:
        """Numbers of every row [n], without gradient. Called as the term's loss is, chunk by chunk."""
        ...

    def derive(self, rows: Rows) -> Mapping[str, Tensor]:
        """Tensors [N] of this process: ``weight`` multiplies the rows' weights, others are read by their names."""
        ...


@dataclass(frozen=True)
class Term:
    """A loss on the student's rows of one text (a group loss: of several), with what it reads.

    ``loss(student_logits [n, V], *evidence) -> [n]``: after the student's logits come the answers of ``asks``, one
    judge after another, then the rows' own tensors that ``reads`` names: ``tokens`` (the ids, int64), ``behavior``
    (log-probs under the policy that drew them, NaN where nobody did), ``advantage`` (of the task reward), ``position``
    (in the completion, 0 is its first token), or what the survey derives. Of a noised text also ``noise_weight`` (of
    the time in the bound) and ``no_suffix`` (nothing that the student reads stands to the right of it).

    The loss of the global batch is weight * sum(w l) / sum(w) over its rows, with ``mean`` sequence the mean over
    sequences of their own weighted means, with batch that of their sums. A group loss divides by its own count. Of a
    noised text sum(w) is over all tokens that might have been masked, so that it does not depend on the draw.
    """

    name: str
    loss: Callable[..., Tensor] | None = None
    asks: tuple[Ask, ...] = ()
    reads: tuple[str, ...] = ()
    text: str | tuple[str, ...] = "main"
    top_k: int = 0
    support: Support = "teacher"  # whose likeliest tokens ``top_k`` lists
    weight: float | Callable[[], float] = 1.0
    mean: Mean = "token"
    group: GroupLoss | None = None
    hidden: Hidden | None = None
    survey: Survey | None = None
    select: Callable[[Mapping[str, Tensor]], Tensor] | None = None  # weights [N] from the rows' own tensors, by name
    watch: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)  # name -> what a schedule hears, [n]
    measures: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)  # name -> what is logged besides, [n]
    vanishes: bool = True  # 0, and its gradient too, where the student says what its judges say
    on_student: bool = False  # its expectation is over tokens the student drew: other text is refused

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.text,) if isinstance(self.text, str) else self.text

    @property
    def weight_now(self) -> float:
        return self.weight() if callable(self.weight) else self.weight

    @property
    def ask(self) -> Ask | None:
        """Of its first judge, whose divergence from the student is what is logged."""
        return self.asks[0] if self.asks else None

    def importance_weighted(self, cap: float, **sampler: Any) -> Term:
        """The same with its loss weighed by min(student/sampler, cap), see
        :func:`~llmdistill.objectives.composed.on_samples`; itself for cap 0."""
        if not cap:
            return self
        assert self.loss is not None
        return replace(self, loss=on_samples(self.loss, cap=cap, **sampler), reads=(*self.reads, "tokens", "behavior"))

    def check_top_k(self, vocab_size: int) -> None:
        """Called before training, with the logit columns that all models have.

        Raises:
            UserError: it asks for more listed tokens than there are, or for none.
        """
        if any(ask.kind == "top_k" for ask in self.asks) and not 1 <= self.top_k <= vocab_size:
            raise UserError(
                f"objective.top_k is {self.top_k}, the vocabulary has {vocab_size} columns. Fix: "
                f"{'at least 1' if self.top_k < 1 else f'at most {vocab_size}'}."
            )

    def metrics(self, student_logits: Tensor, *evidence: Tensor) -> dict[str, Tensor]:
        """How far the student is from the first judge, per row, where there is one; and what the term measures."""
        measured = {name: function(student_logits, *evidence) for name, function in self.measures.items()}
        if self.ask is None or self.hidden is not None:
            return measured
        return METRICS[self.ask.kind](student_logits, *evidence[: ARGUMENTS[self.ask.kind]]) | measured

    def per_row(self, student_logits: Tensor, *evidence: Tensor) -> Tensor:
        """The loss that the streaming engine runs."""
        function = self.group.values if self.group is not None else self.loss
        assert function is not None
        return function(student_logits, *evidence)


def consecutive_slices(lengths: Sequence[int]) -> list[slice]:
    """Slices of these lengths, one after another."""
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]
