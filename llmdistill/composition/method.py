"""A method: terms, where their texts come from, and what of it has a state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from llmdistill.composition.term import OTHER_TOKENIZER, Ask, Term
from llmdistill.models.helpers import Factory
from llmdistill.texts.sources import Only, Source


@dataclass(frozen=True)
class Measured:
    """What an optimizer step came to, over the global batch. All means are weighted as the loss is."""

    step: int  # 1 is the first
    losses: Mapping[str, float]  # of each term, unweighted
    watched: Mapping[tuple[str, str], float]  # (term, name of its watch) -> mean
    groups: Mapping[tuple[str, str, str], tuple[float, float]]  # (term, axis, label) -> (sum of losses, rows)
    norms: Mapping[str, float] = field(default_factory=dict)  # of each term's gradient, where a schedule hears them

    def by(self, term: str, axis: str) -> dict[str, float]:
        """Mean loss of a term by ``domain``, ``author`` (student, dataset, teacher) or ``teacher``."""
        return {label: s / n for (t, a, label), (s, n) in self.groups.items() if (t, a) == (term, axis) and n}


class Schedule:
    """State that moves with training, once per optimizer step and alike on every rank; kept in checkpoints.

    This one has none and never moves: a method overrides what it needs.
    """

    state: ClassVar[tuple[str, ...]] = ()  # the attributes that are its state: plain data or tensors
    hears_norms: ClassVar[bool] = False  # of each term's gradient, by its unweighted loss at the states that it reads

    def start(self, total_steps: int) -> None:
        """Told by the trainer before the first step, also of a resumed run."""

    def update(self, measured: Measured) -> None:
        """Told of every optimizer step."""

    def numbers(self) -> Mapping[str, float]:
        """What is logged of it."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors."""
        return {name: getattr(self, name) for name in self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave."""
        for name in self.state:
            setattr(self, name, state[name])


@dataclass(frozen=True)
class Method:
    """Terms put together. ``Method(Term("kl", reverse_kl, (Ask("teacher"),)))`` is on-policy distillation."""

    terms: tuple[Term, ...]
    texts: Mapping[str, Source] = field(default_factory=lambda: {"main": Only("student")})
    schedules: Mapping[str, Schedule] = field(default_factory=dict)
    helpers: Mapping[str, Factory] = field(default_factory=dict)  # trained with the student, never saved with it
    helper_learning_rate: float | None = None  # None: the student's

    def __post_init__(self) -> None:
        terms = (self.terms,) if isinstance(self.terms, Term) else tuple(self.terms)
        object.__setattr__(self, "terms", terms)
        names = [term.name for term in terms]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"terms are named {names}; a method has at least one, and every name once")
        for term in terms:
            if missing := [text for text in term.texts if text not in self.texts]:
                raise ValueError(f"term {term.name!r} is on text {missing[0]!r}; the method has {sorted(self.texts)}")
            text_indices = [list(self.texts).index(text) for text in term.texts]
            if text_indices != list(range(text_indices[0], text_indices[0] + len(text_indices))):
                raise ValueError(
                    f"term {term.name!r} reads {term.texts} of {list(self.texts)}; they must be neighbours"
                )
            if sum(loss is not None for loss in (term.loss, term.group, term.hidden)) != 1:
                raise ValueError(f"term {term.name!r} needs one of loss, group and hidden")

    def in_contexts(self, contexts: Mapping[str, str]) -> Method:
        """The same with judges that read the completions in another context: name of the judge -> of the context."""

        def in_context(term: Term) -> Term:
            asks = tuple(replace(a, context=a.context or contexts.get(a.judge, "")) for a in term.asks)
            return replace(term, asks=asks)

        return replace(self, terms=tuple(map(in_context, self.terms))) if contexts else self

    @property
    def judges(self) -> frozenset[str]:
        """Names of the models that are asked."""
        return frozenset(ask.judge for term in self.terms for ask in term.asks)

    @property
    def uses(self) -> frozenset[str]:
        """Who may write the texts: student, dataset, teacher."""
        return frozenset().union(*(source.uses for source in self.texts.values()))

    @property
    def primary(self) -> Term | None:
        """The term whose judge the student is measured against: the first that asks the teacher, else any judge."""
        judged_terms = [term for term in self.terms if term.asks and term.hidden is None]
        return next(
            (t for t in judged_terms if t.asks[0].judge == "teacher"), judged_terms[0] if judged_terms else None
        )

    @property
    def asked(self) -> Ask:
        """What the primary term hears from its judge; of a method without one, the teacher's whole distributions.

        Of a judge with another tokenizer always chunks, by which alone the student can be measured.
        """
        ask = self.primary.asks[0] if self.primary is not None else Ask()
        return replace(ask, kind="chunks") if ask.kind in OTHER_TOKENIZER else ask

    @property
    def top_k(self) -> int:
        """How many tokens the primary term's evidence lists."""
        return self.primary.top_k if self.primary is not None else 0

    def asks_of(self, judge: str) -> list[tuple[Term, Ask]]:
        """The terms that ask a judge, and what."""
        return [(term, ask) for term in self.terms for ask in term.asks if ask.judge == judge]
