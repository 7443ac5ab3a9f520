"""Checks that try the models out on a handful of tokens, with the experiments of :mod:`probes`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import nn

from llmdistill.errors import UserError
from llmdistill.models.modes import computes_in_16_bits
from llmdistill.preflight import probes
from llmdistill.preflight.finding import Finding, Side, Subject, fail, notice, ok
from llmdistill.ranks import on_every_rank
from llmdistill.teachers.base import is_live
from llmdistill.texts import Rollout
from llmdistill.texts.prompts import completed
from llmdistill.texts.streams import to_measure
from llmdistill.tokenization.compare import encode
from llmdistill.wire.blocks import ScoreBlock

LISTED = 8  # candidates asked of the teacher
STORED_ROWS = 64  # training rows looked up in a store
# nats: a bfloat16 copy is off by 0.05 on average, one with a stale output head by 0.6 and more (measured on vLLM)
STALE = 0.3


def head(s: Subject) -> Iterator[Finding]:
    """Losses are formed from hidden states and the head alone, so nothing else may happen to a model's logits."""
    rollout, _ = probes.forced_rollout(s.prompts or s.heldout, s.trainer.pad_id)
    models: dict[int, Any] = {id(s.student): ("the student's logits", s.student, "student.model", nullcontext)}
    for side in s.sides:
        if side.model is not None:  # two teachers may share one
            whose = f"the logits of teacher {side.name!r}" if len(s.sides) > 1 else "the teacher's logits"
            models.setdefault(id(side.model), (whose, side.model, "teacher.model", side.present))
    for logits, model, setting, present in models.values():
        if model is s.student and s.sharded:
            yield notice("not checked for the student: ZeRO-3 holds it in shards until training starts")
            continue
        with present():
            found = probes.head_error(model, rollout)
        if not found.finite:
            yield fail(f"{logits} are NaN: the weights are damaged", f"another {setting}")
        elif not found.relative <= found.tolerance:
            yield fail(
                f"{logits} are {found.relative:.2g} (relative) away from head(hidden) with the scale and cap of the "
                f"config, {found.tolerance:g} is rounding: the forward does more to logits than we know",
                f"another {setting}, or teach llmdistill.models.heads.head_of the transform",
            )
        else:
            yield ok(f"{logits} are head(hidden) within {found.relative:.1g}")


def stored(s: Subject) -> Iterator[Finding]:
    """A teacher that is read from disk has said everything it will be asked."""
    if s.live:
        yield ok("the teacher answers itself, and need not have stored anything")
        return
    if s.trainer.method.uses != {"dataset"}:
        yield fail(
            "the teacher only replays what is stored, and what will be written is not known yet",
            "objective.sequences dataset, or teacher.model or teacher.url beside teacher.stored",
        )
        return
    first, reasons = s.prompts[:STORED_ROWS], {}
    for prompt in first:
        try:
            probes.evidence_of(s.trainer, completed([prompt], s.trainer.pad_id), [prompt])
        except UserError as error:
            reasons[prompt.row] = str(error).split(" Fix:")[0].rstrip(".")
    if reasons:
        row, reason = next(iter(reasons.items()))
        yield fail(
            f"{len(reasons)} of the first {len(first)} training sequences are not stored as the objective needs them "
            f"(first: row {row}): {reason}",
            "have them scored first, with teacher.model or teacher.url beside teacher.stored",
        )
    if s.heldout and (
        lacking := s.trainer.heldout.lacking(to_measure(s.trainer.eval_dataset, s.args.heldout_sequences))
    ):
        yield notice(f"nothing will be measured on held-out rows: {lacking}")
    yield ok(f"the first {len(first)} training sequences are stored")


def round_trip(s: Subject) -> Iterator[Finding]:
    """What the student writes reaches the teacher token for token, and every counted token is scored."""
    if s.sharded and s.trainer.on_policy:
        yield notice("tried on prompts only: ZeRO-3 holds the student in shards until training starts")
        rollout, prompts = probes.forced_rollout(s.prompts or s.heldout, s.trainer.pad_id)
    else:
        rollout, prompts = probes.sampled_rollout(s, s.prompts or s.heldout)
    rows = rollout.num_rows
    written = rollout.input_ids[rollout.completion_mask]
    if bool((written >= s.info.vocab_size).any()):
        shown = written[written >= s.info.vocab_size].tolist()[:3]
        yield fail(
            f"the student wrote ids {shown}, teacher {s.info.name!r} has {s.info.vocab_size} columns",
            "a teacher with the student's vocabulary",
        )
        return
    # No more candidates than training will ask for: an engine may be set up for that many only.
    asked = s.top_k or s.info.vocab_size
    listed = 0 if s.kind == "sampled" else min(LISTED, asked) if s.live else asked
    blocks = on_every_rank(lambda: s.trainer.teacher.score(rollout, listed))
    if problem := misplaced(rollout, blocks):
        yield fail(f"teacher {s.info.name!r} {problem}", "report it: the teacher's engine breaks its contract")
        return
    for evidence in probes.evidence_of(s.trainer, rollout, prompts):
        if len(evidence) != rows:
            fix = "report it: the teacher's engine breaks its contract"
            yield fail(f"teacher {s.info.name!r} gave {len(evidence)} rows of evidence for {rows} counted tokens", fix)
            return
    gap = None if s.sharded else probes.engine_gap(s.trainer, s.student, rollout)
    if gap is not None and not gap <= STALE:
        yield fail(
            f"the rollout engine's log-probs are {gap:.2g} nats a token off the student's own: it holds other weights",
            "rollouts.engine hf",
        )
    yield ok(f"{rows} tokens of {len(rollout)} rollouts scored, each at its place")
    reader = s.sides[0].tokenizer or s.tokenizer
    changed = sum(
        encode(reader, str(s.tokenizer.decode(row[mask].tolist(), skip_special_tokens=False))) != row[mask].tolist()
        for row, mask in zip(rollout.input_ids, rollout.completion_mask, strict=True)
    )
    if changed:
        yield notice(
            f"{changed} of {len(rollout)} completions become other ids when decoded and encoded again; the teacher "
            "gets the ids, so its scores are of what the student wrote"
        )


def misplaced(rollout: Rollout, blocks: list[ScoreBlock]) -> str | None:
    """What is wrong with a teacher's blocks, or None: one per sequence, one score per counted token, of that token."""
    if len(blocks) != len(rollout):
        return f"returned {len(blocks)} blocks for {len(rollout)} sequences"
    for i, (block, ids, mask) in enumerate(zip(blocks, rollout.input_ids, rollout.completion_mask, strict=True)):
        counted = (mask[1:].nonzero().flatten() + 1).tolist()
        if list(range(len(ids)))[block.positions] != counted or len(block.token_logprobs) != len(counted):
            return f"scored positions {block.positions} of sequence {i}, counted are {counted}"
        if not bool((block.token_logprobs <= 1e-4).all()):  # NaN is not either
            return f"gave log-probs above 0 or NaN in sequence {i}"
        listed = block.topk_ids.cpu() == ids[counted, None].cpu()
        gap = (block.topk_logprobs.cpu() - block.token_logprobs.cpu()[:, None])[listed].abs()
        if len(gap) and float(gap.max()) > 1e-3:  # both numbers come from one softmax
            return f"gave a token of sequence {i} two log-probs {float(gap.max()):.2g} apart: it scored other tokens"
    return None


def self_(s: Subject) -> Iterator[Finding]:
    """A student equal to the teacher has nothing to learn: loss and gradient vanish."""
    if not probes.comparable(s.trainer):
        yield notice("not checked: no term compares the student with a judge, row by row and by itself")
        return
    for side in s.sides:
        if side.model is s.student and s.sharded:
            yield notice(s.says(side, "not checked: ZeRO-3 holds the student in shards until training starts"))
        elif side.model is None:
            where = "runs in another engine" if is_live(side.teacher) else "is read from disk"
            yield notice(s.says(side, f"not checked: the teacher {where} and cannot stand in the student's place"))
        else:
            with side.present():
                found = list(_alone(s, side, side.model))
            yield from (replace(f, message=s.says(side, f.message)) for f in found)


def _alone(s: Subject, side: Side, model: nn.Module) -> Iterator[Finding]:
    """Through the router, so that what it does to rows is in it; an ensemble's average is no member's own word."""
    rollout, prompts = probes.forced_rollout(s.prompts or s.heldout, s.trainer.pad_id)
    if s.router is not None and not side.averaged:
        domain = next((d for d, name in s.router.domains.items() if name == side.route), None)
        rollout = replace(rollout, domain=(domain,) * len(rollout))
    d = probes.self_distance(s.trainer, side.teacher if side.averaged else s.trainer.teacher, model, rollout, prompts)
    wide = not computes_in_16_bits(model)
    # The same sums twice differ in float32 by their order, 1e-6; in 16 bits two forward passes of one text may lie 1 %
    # apart, which a gradient follows linearly. The wrong row, the wrong mask or the wrong cut give about 1.
    limit = 1e-3 if wide else 5e-2
    loss, gradient = d.loss / max(d.disturbed_loss, 1e-12), d.gradient / max(d.disturbed_gradient, 1e-12)
    if d.disturbed_gradient == 0:
        yield fail("the objective has no gradient even where student and teacher differ", "another objective")
    elif kinked(s) and loss <= limit:
        yield ok(f"teacher against itself: loss {d.loss:.1g} (total variation has no gradient to judge there)")
    elif gradient > limit:
        yield fail(
            f"with the teacher as student the gradient is {gradient:.2g} and the loss {loss:.2g} of what a disturbed "
            f"hidden state gives, {limit:g} is rounding: the objective compares different things on the two sides",
            "report it with the objective and both models; or another objective",
        )
    elif loss > limit:
        yield notice(f"with the teacher as student the loss is {d.loss:.3g}, not 0; its gradient is 0: an offset")
    else:
        yield ok(f"teacher against itself: loss {d.loss:.1g}, gradient {gradient:.1g} of a disturbed one's")


def kinked(s: Subject) -> bool:
    """Total variation, whose gradient jumps at the minimum: rounding decides its sign."""
    term = s.method.primary
    loss = term.loss if term is not None else None
    name = getattr(getattr(loss, "func", loss), "__name__", "")
    return "total_variation" in (name, getattr(loss, "keywords", {}).get("name"))
