"""Checks of a run whose teacher has another tokenizer: the student's side alone, and what could be aligned."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

from llmdistill.preflight import models, tokens
from llmdistill.preflight.finding import Finding, Subject, fail, notice, ok
from llmdistill.teachers.chunks import ChunkTeacher
from llmdistill.texts import collate
from llmdistill.texts.prompts import completed

LOOKED_AT = 32  # rows whose text is tried
SHOWN = 2  # reasons in a message


def alignment(s: Subject) -> Iterator[Finding]:
    """Both tokenizers spell the same text: the rows' completions, or their prompts where they have none."""
    judge = s.trainer.teacher
    assert isinstance(judge, ChunkTeacher)
    prompts = (s.prompts or s.heldout)[:LOOKED_AT]
    if not prompts:
        yield notice("not checked: there are no rows")
        return
    what, rollout = "completions", completed(prompts, s.trainer.pad_id)
    if not all(p.completion for p in prompts):
        what, rollout = "prompts", collate([[]] * len(prompts), [p.ids for p in prompts], pad_id=s.trainer.pad_id)
        prompts = [replace(p, ids=[], readings={}) for p in prompts]
    found = judge.retokenizer(rollout, prompts, judge.name).shares
    share = found.aligned_bytes / max(found.bytes, 1)
    reasons = "; ".join(reason for reason, _ in found.reasons.most_common(SHOWN))
    message = f"{share:.4f} of the bytes of {len(prompts)} {what} are in {found.chunks} chunks"
    if what == "completions" and share < judge.min_aligned:
        yield fail(f"{message}; teacher.min_aligned is {judge.min_aligned:g}: {reasons}", "a lower one, or other texts")
    elif reasons and share < 1:
        yield notice(f"{message}: {reasons}")
    else:
        single = found.single / max(found.chunks, 1)
        yield ok(f"{message}, {single:.3f} of them one token on either side")


def _alone(check: Callable[[Subject], Iterator[Finding]]) -> Callable[[Subject], Iterator[Finding]]:
    """The check without what it compares the teacher's ids with."""

    def of_the_student(s: Subject) -> Iterator[Finding]:
        student = copy.copy(s)
        student.sides = []
        yield from check(student)

    of_the_student.__name__, of_the_student.__doc__ = check.__name__, check.__doc__
    return of_the_student


eos_pad, head, _own_template = map(_alone, (tokens.eos_pad, models.head, tokens.chat_template))


def chat_template(s: Subject) -> Iterator[Finding]:
    """The student's own template; and what the judges' templates do to the rows."""
    yield from _own_template(s)
    for name, reader in s.trainer.encode.readers.items():
        for message, rows in reader.notes.items():
            yield notice(f"{name}: {message} ({len(rows)} rows; first: row {min(rows)})")
