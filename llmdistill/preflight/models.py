"""Checks that try the models out on a handful of tokens, with the experiments of :mod:`probes`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llmdistill.preflight import probes
from llmdistill.preflight.finding import Finding, Subject, fail, notice, ok
from llmdistill.rollouts import Rollout
from llmdistill.service.blocks import ScoreBlock
from llmdistill.tokenization.compare import encode

LISTED = 8  # candidates asked of the teacher
# nats: a bfloat16 copy is off by 0.05 on average, one with a stale output head by 0.6 and more (measured on vLLM)
STALE = 0.3


def head(s: Subject) -> Iterator[Finding]:
    """Losses are formed from hidden states and the head alone, so nothing else may happen to a model's logits."""
    rollout = probes.forced_rollout(s.prompts or s.heldout, s.trainer.pad_id)
    for side, model in (("student", s.student), ("teacher", s.teacher)):
        if model is None:
            continue
        if model is s.student and s.sharded:
            yield notice("not checked for the student: ZeRO-3 holds it in shards until training starts")
            continue
        found = probes.head_error(model, rollout)
        if not found.finite:
            yield fail(f"the {side}'s logits are NaN: its weights are damaged", f"another {side}.model")
        elif not found.relative <= found.tolerance:
            yield fail(
                f"the {side}'s logits are {found.relative:.2g} (relative) away from head(hidden) with the scale and "
                f"cap of its config, {found.tolerance:g} is rounding: its forward does more to logits than we know",
                f"another {side}.model, or teach llmdistill.heads.head_of the transform",
            )
        else:
            yield ok(f"the {side}'s logits are head(hidden) within {found.relative:.1g}")


def round_trip(s: Subject) -> Iterator[Finding]:
    """What the student writes reaches the teacher token for token, and every counted token is scored."""
    if s.sharded:
        yield notice("tried on prompts only: ZeRO-3 holds the student in shards until training starts")
        rollout = probes.forced_rollout(s.prompts or s.heldout, s.trainer.pad_id)
    else:
        rollout = probes.sampled_rollout(s.trainer, s.prompts or s.heldout)
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
    listed = 0 if s.objective.evidence == "sampled" else min(LISTED, s.objective.top_k or s.info.vocab_size)
    blocks = s.trainer.teacher.score(rollout, listed)
    if problem := misplaced(rollout, blocks):
        yield fail(f"teacher {s.info.name!r} {problem}", "report it: the teacher's engine breaks its contract")
        return
    evidence = probes.evidence_of(s.trainer, rollout)
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
    reader = s.teacher_tokenizer or s.tokenizer
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
    if s.teacher is None:
        yield notice("not checked: the teacher runs in another engine and cannot stand in the student's place")
        return
    rollout = probes.forced_rollout(s.prompts or s.heldout, s.trainer.pad_id)
    d = probes.self_distance(s.trainer, s.teacher, rollout)
    wide = next(s.teacher.parameters()).dtype in (torch.float32, torch.float64)
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
    loss = s.objective.loss
    name = getattr(getattr(loss, "func", loss), "__name__", "")
    return "total_variation" in (name, getattr(loss, "keywords", {}).get("name"))
