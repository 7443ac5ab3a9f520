"""From a teacher and a rollout to the rows an objective reads. One row per counted token, in ``token_rows`` order."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from llmdistill.errors import UserError
from llmdistill.objectives.rows import LogitRows, SparseRows, TeacherRows, TokenRows
from llmdistill.teachers.base import DenseTeacher, Teacher, max_top_k
from llmdistill.texts import Rollout

Kind = Literal["full", "top_k", "sampled"]
Evidence = TeacherRows


def gather(
    teacher: Teacher,
    rollout: Rollout,
    kind: Kind,
    top_k: int,
    device: torch.device | str = "cpu",
    chosen: Tensor | None = None,
) -> Evidence:
    """What ``teacher`` says about the counted tokens of ``rollout``.

    ``full``: the whole distribution, as hidden rows where the teacher lives in this process, else as its log-probs
    [N, V]. ``top_k``: the K likeliest tokens and the ids ``chosen``, [N, C]. ``sampled``: the tokens' own log-probs
    only.

    Raises:
        UserError: ``full`` of a teacher that lists fewer tokens than it has, or whatever the teacher raises.
    """
    if kind == "full" and isinstance(teacher, DenseTeacher):
        return teacher.dense(rollout)
    if kind == "full" and (most := max_top_k(teacher)) < teacher.info().vocab_size:
        info, listing = teacher.info(), f" or --estimator top_k --top_k {most}" if most else ""
        raise UserError(
            f"objective.estimator is full; teacher {info.name!r} lists at most {most} of its {info.vocab_size} tokens "
            f"a position. Fix: --estimator sampled{listing}, or a server that lists them all."
        )
    listed = {"full": teacher.info().vocab_size, "top_k": top_k, "sampled": 0}[kind]
    blocks = teacher.score(rollout, listed, chosen if kind == "top_k" else None)
    if kind == "sampled":
        logprobs_N = torch.cat([b.token_logprobs for b in blocks])
        return TokenRows(rollout.token_rows().to(device), logprobs_N.to(device))
    ids_NK = torch.cat([b.topk_ids for b in blocks]).long().to(device)
    logprobs_NK = torch.cat([b.topk_logprobs for b in blocks]).to(device)
    if kind == "full":  # all V are listed: back in the order of their ids they are logits like any others
        return LogitRows(torch.empty_like(logprobs_NK).scatter_(1, ids_NK, logprobs_NK))
    return SparseRows(ids_NK, logprobs_NK)
