"""Small experiments on the models of a run that has not started: what the preflight's model checks measure.

They run on a handful of tokens, take no gradient of any weight and leave modes, meters and random states as found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmdistill.composition.batch import (
    ROW_READS,
    MicroBatch,
    Text,
    micro_batches,
    row_weights,
    with_evidence,
    with_reads,
)
from llmdistill.composition.judges import RoundEvidence
from llmdistill.composition.loss import loss_on
from llmdistill.composition.term import OTHER_TOKENIZER, Term
from llmdistill.models.heads import head_of, hidden_states
from llmdistill.models.modes import computes_in_16_bits, evaluating, own_precision
from llmdistill.objectives.projection import Projection
from llmdistill.objectives.rows import TeacherRows
from llmdistill.preflight.finding import Run, Subject
from llmdistill.ranks import on_every_rank
from llmdistill.rollouts.choose import sampling_of
from llmdistill.teachers.base import Teacher
from llmdistill.texts import Prompt, Rollout, collate, position_ids, predicting_rows
from llmdistill.texts.facts import facts_of
from llmdistill.texts.prompts import completed

PROMPTS = 2
NEW_TOKENS = 8
FORCED_TOKENS = 24


def forced_rollout(prompts: Sequence[Prompt], pad: int) -> tuple[Rollout, list[Prompt]]:
    """Two sequences of different length cut from prompts, their second halves counted: needs no generation."""
    pieces = [p.ids[-FORCED_TOKENS // (i + 1) :] for i, p in enumerate(prompts[:PROMPTS])]
    pieces = [ids if len(ids) > 1 else ids * 2 for ids in pieces]
    halves = [(len(ids) + 1) // 2 for ids in pieces]
    cut = list(zip(pieces, halves, strict=True))
    domains = [p.domain for p in prompts[:PROMPTS]]
    rollout = collate([ids[:h] for ids, h in cut], [ids[h:] for ids, h in cut], pad_id=pad, domain=domains)
    # Whole weights: those of a row are about its completion, and a row of weight 0 has no distance from anything.
    shown = [replace(p, ids=ids[:h], weight=1.0) for p, (ids, h) in zip(prompts[:PROMPTS], cut, strict=True)]
    return rollout, shown


def sampled_rollout(s: Subject, prompts: Sequence[Prompt]) -> tuple[Rollout, list[Prompt]]:
    """What a round would hold for the shortest prompts of every route to a teacher: drawn by the run's engine, or the
    dataset's completions (whole ones, where only those are stored)."""
    trainer, seen, chosen = s.trainer, Counter[str | None](), list[Prompt]()
    facts = facts_of(prompts)
    routes = [s.router.route(name) if s.router is not None else None for name in facts.names]
    for place in np.lexsort((facts.rows, facts.tokens)).tolist():
        route = routes[facts.domains[place]]
        seen[route] += 1
        if seen[route] <= PROMPTS:
            chosen.append(prompts[place])
        elif all(seen[each] > PROMPTS for each in routes):
            break
    if trainer.method.uses == {"dataset"}:
        if s.live:
            chosen = [replace(p, completion=p.completion[:NEW_TOKENS]) for p in chosen]
        return completed(chosen, trainer.pad_id), chosen
    r = trainer.args.rollouts  # type: ignore[attr-defined]
    few = {"max_new_tokens": min(NEW_TOKENS, r.max_new_tokens), "samples_per_prompt": 1}
    sampling = replace(sampling_of(r, trainer.args.seed), **few)
    trainer.sync_engine()
    return on_every_rank(lambda: trainer.rollout_engine.generate(chosen, sampling)), chosen


def evidence_of(trainer: Run, rollout: Rollout, prompts: Sequence[Prompt]) -> list[TeacherRows]:
    """What the judges of every term would say about the sequences."""
    text = Text(rollout, list(prompts))
    evidence = RoundEvidence(trainer.judges, trainer.likeliest, trainer.args.device, trainer.pad_id)  # type: ignore[arg-type]
    answers = [evidence.of(term, "probe", text) for term in trainer.method.terms if not isinstance(term.text, tuple)]
    return [answer for answer in answers if answer is not None]


def comparable(trainer: Run) -> list[Term]:
    """The terms that a judge in the student's place would make 0: they read logits, and nothing that a survey derives
    from a whole round."""
    every = [t for t in trainer.method.terms if t.asks and t.vanishes and not isinstance(t.text, tuple)]
    every = [t for t in every if all(ask.kind not in OTHER_TOKENIZER for ask in t.asks)]  # those ask about other tokens
    return [t for t in every if t.hidden is None and set(t.reads) <= ROW_READS.keys()]


def comparison(trainer: Run, rollout: Rollout, prompts: Sequence[Prompt], teacher: Teacher) -> MicroBatch:
    """The sequences as a micro-batch of the terms that compare the student with judges; ``teacher`` is all of them.

    Contexts are left out: what is to vanish is the distance of a model from itself on the same text.
    """
    terms = [
        replace(
            t,
            text="main",
            survey=None,
            weight=1.0,
            asks=tuple(replace(a, context="") for a in t.asks),
        )
        for t in comparable(trainer)
    ]
    text = Text(rollout, list(prompts))
    evidence = RoundEvidence(
        dict.fromkeys(trainer.judges, teacher), trainer.likeliest, trainer.args.device, trainer.pad_id
    )
    found, totals = {}, {}
    for term in terms:
        given = row_weights(term, [text], {}, trainer.pad_id)
        rows = with_reads(term, [text], [evidence.of(term, "main", text)], {})
        given = with_evidence(term, given, [text], rows)
        found[term.name], totals[term.name] = given, given.count
    (batch,) = micro_batches({"main": text}, terms, found, totals, {"main": [(0, len(text))]}, trainer.pad_id)
    return batch.to(trainer.args.device)


@torch.no_grad()
def engine_gap(trainer: Run, student: nn.Module, rollout: Rollout) -> float | None:
    """Mean difference, in nats, between the log-probs an engine drew with and those of the student itself.

    None where the engine reports none, or where the sampling (greedy, cut, penalised) reshapes them.
    """
    r = trainer.args.rollouts  # type: ignore[attr-defined]
    if rollout.behavior_logprobs is None or r.temperature == 0 or not replace(sampling_of(r), temperature=1.0).plain:
        return None
    rollout = rollout.to(next(student.parameters()).device)
    with evaluating(student), own_precision(student):
        logits_BTV = student(
            input_ids=rollout.input_ids,
            attention_mask=rollout.attention_mask,
            position_ids=position_ids(rollout.attention_mask),
            use_cache=False,
        ).logits
    rows_NV = predicting_rows(logits_BTV, rollout.completion_mask).float() / r.temperature
    own_N = rows_NV.log_softmax(-1).gather(1, rollout.token_rows()[:, None]).squeeze(1)
    assert rollout.behavior_logprobs is not None
    drawn_N = rollout.behavior_logprobs[:, 1:][rollout.completion_mask[:, 1:]]
    return float((own_N - drawn_N).abs().mean())


@dataclass(frozen=True)
class HeadError:
    """How far ``head(hidden)`` is from the model's own logits."""

    relative: float  # largest difference over the largest logit
    finite: bool  # no NaN among the model's logits
    tolerance: float  # what rounding explains


@torch.no_grad()
def head_error(model: nn.Module, rollout: Rollout) -> HeadError:
    """Compares the model's logits with the head, scale and cap that :func:`~llmdistill.models.heads.head_of` found."""
    head, device = head_of(model), next(model.parameters()).device
    rollout = rollout.to(device)
    inputs: dict[str, Tensor] = dict(
        input_ids=rollout.input_ids,
        attention_mask=rollout.attention_mask,
        position_ids=position_ids(rollout.attention_mask),
    )
    with evaluating(model), own_precision(model):
        logits_NV = model(**inputs, use_cache=False).logits[rollout.attention_mask].float()
        hidden_NH = hidden_states(model, rollout)[rollout.attention_mask]
    ours = Projection.of(head.linear, head.linear.weight.dtype, None, head.logit_scale, head.softcap)
    ours_NV = ours.rescale(ours.matmul(hidden_NH.to(head.linear.weight.dtype))).float()
    if ours_NV.shape != logits_NV.shape:
        return HeadError(float("inf"), True, 0.0)
    largest = float(logits_NV.abs().max().clamp(min=1e-6))
    # float32 differs by its summation order; 16 bits keep 8 to 11, and scaling or capping happens in them or not.
    tolerance = 4e-2 if computes_in_16_bits(model) else 1e-3
    return HeadError(float((ours_NV - logits_NV).abs().max()) / largest, not bool(logits_NV.isnan().any()), tolerance)


@dataclass(frozen=True)
class SelfDistance:
    """Loss and gradient norm at the head's input of the teacher against itself, as it is and with noise added to it."""

    loss: float
    gradient: float
    disturbed_loss: float
    disturbed_gradient: float


def self_distance(
    trainer: Run,
    teacher: Teacher,
    teacher_model: nn.Module,
    rollout: Rollout,
    prompts: Sequence[Prompt],
) -> SelfDistance:
    """The run's own loss with the teacher in the student's place, so shift, masks, cut and estimator are all in it.

    The gradient is taken at the head's input: no weight is touched and nothing but the head is differentiated.
    """
    micro, found = comparison(trainer, rollout, prompts, teacher), list[float]()
    for disturbed in (False, True):
        with evaluating(teacher_model), own_precision(teacher_model), head_input(teacher_model, disturbed) as leaf:
            loss = loss_on(
                teacher_model,
                micro,
                head=head_of(teacher_model),
                vocab_size=trainer.vocab_size,
                chunk_tokens=trainer.args.chunk_tokens,  # type: ignore[attr-defined]
            ).loss
            loss.backward()
        gradient = leaf[0].grad
        found += [abs(loss.item()), 0.0 if gradient is None else float(gradient.float().norm())]
    return SelfDistance(*found)


@contextmanager
def head_input(model: nn.Module, disturbed: bool) -> Iterator[list[Tensor]]:
    """The head reads a leaf tensor, handed out, in place of the hidden states; ``disturbed`` adds as much noise."""
    leaf: list[Tensor] = []

    def attach(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0].detach().clone()
        if disturbed:
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(hidden.shape, generator=generator).to(hidden)
            hidden += noise * hidden.float().std().to(hidden.dtype)
        leaf.append(hidden.requires_grad_())
        return (leaf[-1], *inputs[1:])

    handle = head_of(model).linear.register_forward_pre_hook(attach)
    try:
        yield leaf
    finally:
        handle.remove()
