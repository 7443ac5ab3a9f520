"""Checks of a run that trains a denoiser: text of its teacher's family, and a student that reads both ways."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import torch

from llmdistill.errors import UserError
from llmdistill.models.heads import head_of
from llmdistill.models.modes import evaluating, own_precision
from llmdistill.preflight.finding import Finding, Subject, fail, notice, ok
from llmdistill.texts.prompts import completed
from llmdistill.texts.rollout import position_ids
from llmdistill.tokenization.compare import tokens_by_id

PROBED, TOKENS = 2, 32  # rows that are looked at, and how much of each


def width(s: Subject) -> Iterator[Finding]:
    """Every id that may stand in a text has a logit on all sides; the mask token is none of them."""
    known = tokens_by_id(s.tokenizer)
    last = max((i for i, token in enumerate(known) if token is not None and token != s.tokenizer.mask_token), default=0)
    for who, columns in (("the student", s.columns), *((f"teacher {x.name!r}", x.info.vocab_size) for x in s.sides)):
        if columns <= last:
            yield fail(
                f"{who} has {columns} logit columns, the student's tokenizer ids up to {last} beside the mask token",
                "a tokenizer that belongs to the model",
            )
    yield ok(f"{s.columns} logit columns for ids up to {last}, and the mask token")


@torch.no_grad()
def both_ways(s: Subject) -> Iterator[Finding]:
    """What stands behind a token changes what the student says of it, and what it says are numbers."""
    if s.sharded:
        yield notice("not checked: ZeRO-3 holds the student in shards until training starts")
        return
    rows = list(islice((p for p in s.prompts or s.heldout if p.completion), PROBED))
    if not rows:
        yield notice("not checked: no row has a completion")
        return
    cut = [replace(p, ids=p.ids[-TOKENS:], completion=p.completion[:TOKENS], counts=()) for p in rows]
    rollout = completed(cut, s.trainer.pad_id).to(next(s.student.parameters()).device)
    changed = rollout.input_ids.clone()
    ends = rollout.attention_mask.sum(1) - 1
    changed[range(len(rollout)), ends] = (changed[range(len(rollout)), ends] + 1) % s.ids
    with evaluating(s.student), own_precision(s.student):
        logits = [
            s.student(
                input_ids=ids,
                attention_mask=rollout.attention_mask,
                position_ids=position_ids(rollout.attention_mask),
                use_cache=False,
            ).logits[:, 0]
            for ids in (rollout.input_ids, changed)
        ]
    if not bool(logits[0].isfinite().all()):
        yield fail("the student's logits are no numbers: its weights are damaged", "another student")
    elif bool((logits[0] == logits[1]).all(-1).any()):
        yield fail("the student's first token does not see the last of a row", "attn_implementation sdpa or eager")
    yield ok(f"read both ways; guessing gives {math.log(head_of(s.student).vocab_size):.2f} nats a masked token")


def writing(s: Subject) -> Iterator[Finding]:
    """The settings of the student's own writing go together."""
    sample = getattr(s.trainer.rollout_engine, "check", None)
    try:
        if sample is not None:
            sample(s.args.rollouts.max_new_tokens)
    except UserError as error:
        yield Finding("fail", "", str(error))
    yield ok("settings of the sampler go together")
