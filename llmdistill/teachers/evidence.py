"""From a teacher and a rollout to the rows an objective reads. One row per counted token, in ``token_rows`` order."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from llmdistill.errors import UserError
from llmdistill.objectives.rows import LogitRows, SparseRows, TeacherRows, TokenRows
from llmdistill.teachers.base import DenseTeacher, Teacher, max_top_k
from llmdistill.teachers.host_rows import host_empty, joined
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

    The rows are on the host, where a round of them may wait: ``to(device)`` brings those that are read.

    Args:
        device: that will read them. For a GPU they are in pinned memory.

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
        return TokenRows(rollout.token_rows().cpu(), joined([b.token_logprobs for b in blocks], device))
    ids, logprobs = [b.topk_ids for b in blocks], [b.topk_logprobs for b in blocks]
    if kind == "full":  # all V are listed: back in the order of their ids they are logits like any others
        counts = list(map(len, ids))
        logits_NV = host_empty((sum(counts), listed), torch.float32, device)
        for rows_nV, ids_nV, logprobs_nV in zip(logits_NV.split(counts), ids, logprobs, strict=True):
            rows_nV.scatter_(1, ids_nV.long(), logprobs_nV.float())
        return LogitRows(logits_NV)
    del blocks
    return SparseRows(joined(ids, device, torch.int64), joined(logprobs, device))
