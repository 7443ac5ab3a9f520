"""Whether what a trainer was given fits together. The preflight looks deeper."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import reduce
from typing import Any, Protocol

import numpy as np
from transformers import IntervalStrategy, TrainingArguments

from llmdistill.composition.method import Method
from llmdistill.errors import UserError
from llmdistill.models.adapters import refuse_changed_base
from llmdistill.models.layers import check_layers, hidden_size
from llmdistill.rollouts.engine import LaterEngine
from llmdistill.teachers.base import HiddenTeacher, Teacher, is_live
from llmdistill.teachers.local import LocalTeacher, UnadaptedTeacher
from llmdistill.teachers.mixture import UNKNOWN_FIX, RoutedTeacher, is_elsewhere
from llmdistill.teachers.student import StudentTeacher
from llmdistill.texts import Prompt
from llmdistill.texts.facts import Facts, facts_of
from llmdistill.texts.streams import at_hand
from llmdistill.tokenization.special import context_length


class Parts(Protocol):
    """What of a trainer is looked at."""

    method: Method
    judges: dict[str, Teacher]
    reward: Any
    model: Any
    args: Any
    data_config: Any
    train_dataset: Any
    vocab_size: int
    rollout_engine: Any


def check_heldout(args: TrainingArguments, heldout: Any) -> None:
    """Asks for held-out rows where something is to be measured on them; before anything is loaded.

    Raises:
        UserError: ``eval_strategy`` names a time, and there is nothing to evaluate on.
    """
    when = IntervalStrategy(args.eval_strategy).value
    setting = ("eval_strategy", repr(when)) if when != "no" else ("eval_on_start", "true")
    if (when != "no" or args.eval_on_start) and not heldout:
        raise UserError(
            f"train.{setting[0]} is {setting[1]}, and data.heldout is empty: there is nothing to evaluate on. "
            f"Fix: --data.heldout FILE (from Python eval_dataset=), or leave {setting[0]} out."
        )


def check_parts(trainer: Parts) -> None:
    """Called by the trainer's constructor.

    Raises:
        UserError: a term whose expectation is over the student's tokens is on text that others wrote, documents are to
            be answered, or the student is to write as its own teacher.
    """
    if trainer.data_config.text_column and (authors := sorted(trainer.method.uses - {"dataset"})):
        raise UserError(
            f"data.text_column is {trainer.data_config.text_column!r}, and the method trains on text of "
            f"{', '.join(authors)}: a document has no prompt to be answered. Fix: --sequences dataset."
        )
    judge = trainer.judges.get("teacher")
    if isinstance(judge, StudentTeacher) and "teacher" in trainer.method.uses:
        raise UserError(
            f"teacher.student is {judge.which}, and the method trains on text of the teacher: the student's own comes "
            "from rollouts.engine. Fix: --sequences student or dataset."
        )
    for term in trainer.method.terms:
        uses = frozenset().union(*(trainer.method.texts[text].uses for text in term.texts))
        if term.on_student and uses != {"student"}:
            text = ", ".join(sorted(uses))
            if "advantage" in term.reads and not term.asks:
                raise UserError(
                    f"reward_weight is {term.weight_now:g} and the text is of {text}: a reward is compared over fresh "
                    "samples of one prompt. Fix: sequences student, or reward_weight 0."
                )
            raise UserError(
                f"term {term.name!r} needs tokens that the student drew, and its text is of {text}. "
                "Fix: sequences student, or a term that hears whole distributions."
            )
    if trainer.args.rollouts.staleness or trainer.args.num_iterations > 1:
        check_old_text(trainer)
    if trainer.args.rollouts.staleness:
        check_ahead(trainer)


def check_ahead(trainer: Parts) -> None:
    """Raises:
    UserError: a part that cannot work while a step trains.
    """
    staleness, uses = trainer.args.rollouts.staleness, trainer.method.uses
    if "student" in uses and not isinstance(trainer.rollout_engine, LaterEngine):
        raise UserError(
            f"rollouts.staleness is {staleness}, and a {type(trainer.rollout_engine).__name__} samples in this "
            "process, from the weights that are being trained. Fix: rollouts.engine remote, or staleness 0."
        )
    if "teacher" in uses and (judge := trainer.judges.get("teacher")) is not None and not is_elsewhere(judge):
        raise UserError(
            f"rollouts.staleness is {staleness}, and teacher {judge.info().name!r} writes text in this process, where "
            "the student is trained. Fix: teacher.url, or staleness 0."
        )


def check_old_text(trainer: Parts) -> None:
    """Raises:
    UserError: a term that takes what the student of some steps ago drew for the student's of now.
    """
    staleness, iterations = trainer.args.rollouts.staleness, trainer.args.num_iterations
    setting = f"rollouts.staleness is {staleness}" if staleness else f"objective.num_iterations is {iterations}"
    for term in trainer.method.terms:
        if term.on_student and "behavior" not in term.reads:
            raise UserError(
                f"{setting}, and term {term.name!r} takes its tokens for ones that the student of now drew: without "
                "their importance weights its gradient is none of a divergence. Fix: --importance_cap 5 where the "
                "method has it, an estimator full or top_k, or staleness 0 and num_iterations 1."
            )


def check_hidden(method: Method, model: Any, judges: Mapping[str, Teacher]) -> tuple[int, int]:
    """Called before helpers are made. The hidden sizes of the student and of the judge whose layers are read.

    Raises:
        UserError: a judge whose hidden states cannot be had, or a layer that a model has not got.
    """
    sizes = (hidden_size(model), 0)
    for term in method.terms:
        if term.hidden is None:
            continue
        check_layers(model, term.hidden.student, f"term {term.name!r}, student's layers,")
        for ask in term.asks:
            judge = judges.get(ask.judge)
            if judge is None:
                continue  # check_ready says so
            judge_model = model if isinstance(judge, StudentTeacher) else getattr(judge, "model", None)
            if not isinstance(judge, HiddenTeacher) or judge_model is None:
                raise UserError(
                    f"term {term.name!r} reads hidden states of {ask.judge} {judge.info().name!r}, a "
                    f"{type(judge).__name__}; only a model in this process has them. Fix: teacher.model, engine hf."
                )
            check_layers(judge_model, term.hidden.judge, f"term {term.name!r}, {ask.judge}'s layers,")
            sizes = (sizes[0], hidden_size(judge_model))
            if sizes[0] != sizes[1] and not method.helpers:
                raise UserError(
                    f"term {term.name!r} compares hidden states, the student's of width {sizes[0]} with those of "
                    f"{ask.judge}, {sizes[1]} wide. Fix: a projector between them (--hidden_projector true)."
                )
    return sizes


def check_contexts(trainer: Parts, facts: Facts) -> None:
    """Called before training.

    Raises:
        UserError: a context that no row has, a live student that judges itself where it stands, a context for a teacher
            that only replays, a text without anything to count, or weights of tokens that
            nothing is trained on.
    """
    built_later = {name for name, source in trainer.data_config.contexts.items() if ":" in source}
    token_weighted = facts.rows[facts.token_weighted]
    if len(token_weighted) and "dataset" not in trainer.method.uses:
        raise UserError(
            f"row {token_weighted[0]} has a weight for each token of its completion, and no term is on the dataset's "
            "completions. Fix: one number for a row, or sequences dataset."
        )
    domain_weights = trainer.args.domain_weights
    for term in trainer.method.terms:
        for ask in term.asks:
            judge = trainer.judges.get(ask.judge)
            if isinstance(judge, StudentTeacher) and judge.which == "live" and not ask.context and term.vanishes:
                raise UserError(
                    f"term {term.name!r} compares the live student with itself on the same text: it is always 0. "
                    "Fix: teacher.context NAME (one of data.contexts), or teacher.student ema or initial."
                )
            if not ask.context:
                continue
            if judge is not None and not is_live(judge):
                raise UserError(
                    f"{ask.judge}.context is {ask.context!r}, and the teacher only replays what was stored under the "
                    "prompt. Fix: teacher.model or teacher.url."
                )
            if ask.context not in built_later and len(facts) and not facts.has(ask.context).any():
                raise UserError(
                    f"{ask.judge}.context is {ask.context!r}, and no row has such a context. "
                    f"Fix: --data.contexts '{{{ask.context}: COLUMN}}'."
                )
        sources = [trainer.method.texts[text] for text in term.texts]
        from_dataset = all(s.uses == {"dataset"} for s in sources)
        if len(facts) and from_dataset and not (facts.completions > 0).any():
            raise UserError(
                f"term {term.name!r} is on the dataset's completions, and no row has one: it would divide by nothing. "
                "Fix: --data.completion_column NAME."
            )
        kept = facts.positive & facts.of_domains(lambda domain: domain_weights.get(domain or "", 1.0) > 0)
        if len(facts) and not kept.any():
            raise UserError(
                f"all rows have weight 0, and term {term.name!r} would divide by nothing. "
                "Fix: data.weight_column or objective.domain_weights."
            )
        needed = {ask.context for ask in term.asks if ask.context} - built_later
        kept = reduce(np.logical_and, (facts.has(context) for context in needed), kept)
        if from_dataset:
            kept = kept & (facts.completions > 0)
        if len(facts) and not kept.any():
            raise UserError(
                f"no row has all that term {term.name!r} needs (a weight above 0"
                f"{', a completion' if from_dataset else ''}{''.join(f', context {c!r}' for c in sorted(needed))}): it "
                "would divide by nothing. Fix: rows with all of them."
            )


def check_ready(trainer: Parts) -> None:
    """Called before training.

    Raises:
        UserError: the student is its own teacher, a term lists more tokens than there are or asks a judge that is not
            there, or a row has no teacher.
    """
    own = set(map(id, trainer.model.parameters()))
    for role, judge in trainer.judges.items():
        if isinstance(judge, UnadaptedTeacher) or getattr(judge, "which", "") == "initial":
            refuse_changed_base(trainer.model, role)
        is_frozen = isinstance(judge, LocalTeacher) and not isinstance(judge, UnadaptedTeacher)
        if is_frozen and not own.isdisjoint(map(id, judge.model.parameters())):  # type: ignore[attr-defined]
            raise UserError(
                f"{role} is the student itself, or shares weights with it, as the model below its adapter: they would "
                f"be frozen, and {role} would move with the student. Fix: {role}=copy.deepcopy(model), or "
                "teacher.student initial (reference initial), which leaves the adapter out."
            )
    for term in trainer.method.terms:
        term.check_top_k(trainer.vocab_size)
    for name in sorted(trainer.method.judges - set(trainer.judges)):
        term, _ = trainer.method.asks_of(name)[0]
        argument = "reference=MODEL" if name == "reference" else f"judges={{{name!r}: MODEL}}"
        raise UserError(f"the objective reads a {name} model (term {term.name!r}), and there is none. Fix: {argument}.")
    examples = at_hand(trainer.train_dataset)
    facts = facts_of(examples if len(examples) and isinstance(examples[0], Prompt) else [])
    for judge in trainer.judges.values():
        if isinstance(judge, RoutedTeacher):
            route = judge.route
            strange = facts.where(facts.of_domains(lambda domain, route=route: route(domain) is None))  # type: ignore[misc]
            if len(strange):
                unknown = judge.unknown(facts.names[strange.domains[0]])
                raise UserError(f"row {strange.rows[0]} {unknown}. Fix: {UNKNOWN_FIX}.")
    check_contexts(trainer, facts)
    _warn_of_length(trainer, facts)


def _warn_of_length(trainer: Parts, facts: Facts) -> None:
    sampled = trainer.args.rollouts.max_new_tokens if trainer.method.uses != {"dataset"} else 0
    contexts = [judge.info().context_length for judge in trainer.judges.values()]
    limit = min([context_length(trainer.model.config), *contexts])
    if not len(facts):
        return
    lengths = np.maximum(facts.tokens, facts.widest) + np.maximum(sampled, facts.completions)
    needed, row = int(lengths.max()), int(facts.rows[lengths.argmax()])
    if needed > limit:
        warnings.warn(
            f"row {row} and its completion may need {needed} positions, and the models have {limit}; past "
            "those they say nothing of worth. Fix: lower rollouts.max_new_tokens or data.max_prompt_tokens.",
            stacklevel=4,
        )
