"""Small experiments on the models of a run that has not started: what the preflight's model checks measure.

They run on a handful of tokens, take no gradient of any weight and leave modes, meters and random states as found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmdistill.models.heads import head_of, hidden_states
from llmdistill.objectives.projection import Projection
from llmdistill.preflight.finding import Subject
from llmdistill.record.meters import Meters
from llmdistill.teachers.base import Teacher
from llmdistill.teachers.evidence import Evidence
from llmdistill.texts import Prompt, Rollout, Sampling, collate, position_ids, predicting_rows
from llmdistill.texts.prompts import completed
from llmdistill.training.method import MicroBatch
from llmdistill.training.trainer import DistillationTrainer

PROMPTS = 2
NEW_TOKENS = 8
FORCED_TOKENS = 24


def forced_rollout(prompts: Sequence[Prompt], pad: int) -> Rollout:
    """Two sequences of different length cut from prompts, their second halves counted: needs no generation."""
    pieces = [p.ids[-FORCED_TOKENS // (i + 1) :] for i, p in enumerate(prompts[:PROMPTS])]
    pieces = [ids if len(ids) > 1 else ids * 2 for ids in pieces]
    halves = [(len(ids) + 1) // 2 for ids in pieces]
    cut = list(zip(pieces, halves, strict=True))
    domains = [p.domain for p in prompts[:PROMPTS]]
    return collate([ids[:h] for ids, h in cut], [ids[h:] for ids, h in cut], pad_id=pad, domain=domains)


def sampled_rollout(s: Subject, prompts: Sequence[Prompt]) -> Rollout:
    """What a round would hold for the shortest prompts of every route to a teacher: drawn by the run's engine, or the
    dataset's completions (whole ones, where only those are stored)."""
    trainer, seen, chosen = s.trainer, Counter[str | None](), list[Prompt]()
    for prompt in sorted(prompts, key=lambda p: (len(p.ids), p.row)):
        route = s.router.route(prompt.domain) if s.router is not None else None
        seen[route] += 1
        if seen[route] <= PROMPTS:
            chosen.append(prompt)
    if trainer.data_policy.uses == {"dataset"}:
        if s.live:
            chosen = [replace(p, completion=p.completion[:NEW_TOKENS]) for p in chosen]
        return completed(chosen, trainer.pad_id)
    r = trainer.args.rollouts  # type: ignore[attr-defined]
    sampling = Sampling(min(NEW_TOKENS, r.max_new_tokens), r.temperature, r.top_p, r.top_k, seed=trainer.args.seed)
    trainer.rollout_engine.sync(trainer.forward_model(), trainer.state.global_step)
    return trainer.rollout_engine.generate(chosen, sampling)


def evidence_of(trainer: DistillationTrainer, rollout: Rollout, teacher: Teacher | None = None) -> Evidence:
    """What the run's objective would read, of its teacher or another one."""
    return trainer.evidence(rollout, trainer.chosen_ids(rollout), teacher)


@torch.no_grad()
def engine_gap(trainer: DistillationTrainer, student: nn.Module, rollout: Rollout) -> float | None:
    """Mean difference, in nats, between the log-probs an engine drew with and those of the student itself.

    None where the engine reports none, or where the sampling (greedy, top-p, top-k) reshapes them.
    """
    r = trainer.args.rollouts  # type: ignore[attr-defined]
    if rollout.behavior_logprobs is None or r.temperature == 0 or r.top_p < 1 or r.top_k > 0:
        return None
    rollout = rollout.to(next(student.parameters()).device)
    with evaluating(student):
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
    with evaluating(model):
        logits_NV = model(**inputs, use_cache=False).logits[rollout.attention_mask].float()
        hidden_NH = hidden_states(model, rollout)[rollout.attention_mask]
    ours = Projection.of(head.linear, head.linear.weight.dtype, None, head.logit_scale, head.softcap)
    ours_NV = ours.rescale(ours.matmul(hidden_NH)).float()
    if ours_NV.shape != logits_NV.shape:
        return HeadError(float("inf"), True, 0.0)
    largest = float(logits_NV.abs().max().clamp(min=1e-6))
    # float32 differs by its summation order; 16 bits keep 8 to 11, and scaling or capping happens in them or not.
    tolerance = 1e-3 if head.linear.weight.dtype in (torch.float32, torch.float64) else 4e-2
    return HeadError(float((ours_NV - logits_NV).abs().max()) / largest, not bool(logits_NV.isnan().any()), tolerance)


@dataclass(frozen=True)
class SelfDistance:
    """Loss and gradient norm at the head's input of the teacher against itself, as it is and with noise added to it."""

    loss: float
    gradient: float
    disturbed_loss: float
    disturbed_gradient: float


def self_distance(
    trainer: DistillationTrainer, teacher: Teacher, teacher_model: nn.Module, rollout: Rollout
) -> SelfDistance:
    """The trainer's own loss with the teacher in the student's place, so shift, masks, cut and estimator are all in it.

    The gradient is taken at the head's input: no weight is touched and nothing but the head is differentiated.
    """
    micro = MicroBatch(rollout.to(trainer.args.device), evidence_of(trainer, rollout, teacher))
    found = []
    for disturbed in (False, True):
        with in_the_students_place(trainer, teacher_model), head_input(teacher_model, disturbed) as leaf:
            loss = trainer.compute_loss(teacher_model, {"micro_batch": micro})
            loss.backward()
        gradient = leaf[0].grad
        found += [abs(loss.item()), 0.0 if gradient is None else float(gradient.float().norm())]
    return SelfDistance(*found)


@contextmanager
def in_the_students_place(trainer: DistillationTrainer, model: nn.Module) -> Iterator[None]:
    """The trainer computes its loss for ``model``; its clocks do not run."""
    student, meters = trainer.model, trainer.meters
    trainer.model, trainer.meters = model, Meters()  # type: ignore[assignment]
    try:
        with evaluating(model):
            yield
    finally:
        trainer.model, trainer.meters = student, meters


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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, put back as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
