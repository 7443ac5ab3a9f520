"""Judges: the named models of a run, and what each term hears from them about the texts of a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llmdistill.composition.batch import Text
from llmdistill.composition.chunks import asked_of_chunks
from llmdistill.composition.term import OTHER_TOKENIZER, Ask, Term
from llmdistill.objectives.rows import PairedRows, SparseRows, TeacherRows, TensorRows
from llmdistill.ranks import on_every_rank
from llmdistill.teachers.base import HiddenTeacher, Teacher
from llmdistill.teachers.chunks import ChunkTeacher
from llmdistill.teachers.evidence import gather
from llmdistill.texts import Rollout

Likeliest = Callable[[Rollout, int], Tensor]  # the student's so many likeliest ids at every row, [N, K]


@dataclass
class RoundEvidence:
    """What the judges say about the texts of one round. What several terms ask alike is asked once.

    Every rank asks the same in the same order, and waits until all have their answers: outside of any collective, for
    a judge may be a service that is down for an hour, to one rank or to all of them.
    """

    judges: Mapping[str, Teacher]
    likeliest: Likeliest
    device: torch.device | str  # that reads what they say, a micro-batch at a time; until then it is on the host
    pad_id: int

    def __post_init__(self) -> None:
        self._evidence: dict[object, TeacherRows] = {}
        self._likeliest_ids: dict[object, Tensor] = {}

    def of(self, term: Term, name: str, text: Text) -> TeacherRows | None:
        """What the judges of ``term`` say about a text, in the order of its asks; None where it asks none."""
        if not term.asks:
            return None
        evidence = [self._answer(term, ask, name, text) for ask in term.asks]
        return evidence[0] if len(evidence) == 1 else PairedRows(tuple(evidence))

    def _answer(self, term: Term, ask: Ask, name: str, text: Text) -> TeacherRows:
        if ask.kind in OTHER_TOKENIZER:
            return self._chunks(term, ask, name, text)
        lists_tokens = ask.kind == "top_k"
        first_ask = next((a for a in term.asks if a.kind == "top_k"), ask)  # whose list the others are asked about
        key = (
            name,
            ask,
            (term.top_k, term.support, first_ask) if lists_tokens else None,
            term.hidden and term.hidden.judge,
        )
        if key not in self._evidence:
            judge, rollout = self.judges[ask.judge], text.view(ask.context, self.pad_id).rollout
            if term.hidden is not None:
                assert isinstance(judge, HiddenTeacher)  # others are refused before the first step
                layers = term.hidden.judge
                states = on_every_rank(lambda: judge.hidden_layers(rollout, layers))
                self._evidence[key] = TensorRows(tuple(states), rollout.num_rows)
            elif not lists_tokens:
                kind = ask.kind
                assert kind == "full" or kind == "sampled"
                self._evidence[key] = on_every_rank(lambda: gather(judge, rollout, kind, 0, self.device))
            elif ask == first_ask:
                own_top_k = 0 if term.support == "student" else term.top_k
                chosen = self._chosen(term, name, text)
                self._evidence[key] = on_every_rank(
                    lambda: gather(judge, rollout, "top_k", own_top_k, self.device, chosen)
                )
            else:
                first_evidence = self._answer(term, first_ask, name, text)
                assert isinstance(first_evidence, SparseRows)
                listed = first_evidence.topk_ids_NK
                evidence = on_every_rank(lambda: gather(judge, rollout, "top_k", 0, self.device, listed))
                assert isinstance(evidence, SparseRows)
                self._evidence[key] = in_order(evidence, first_evidence.topk_ids_NK)
        return self._evidence[key]

    def _chunks(self, term: Term, ask: Ask, name: str, text: Text) -> TeacherRows:
        judge, question = self.judges[ask.judge], asked_of_chunks(term, ask)
        assert isinstance(judge, ChunkTeacher)
        key = (name, ask, question)
        if key not in self._evidence:
            ask_judge = partial(judge.answer, text.rollout, text.prompts, question)
            self._evidence[key] = on_every_rank(ask_judge)
        return self._evidence[key]

    def _chosen(self, term: Term, name: str, text: Text) -> Tensor | None:
        if term.support == "teacher":
            return None
        key = (name, term.top_k)
        if key not in self._likeliest_ids:
            self._likeliest_ids[key] = self.likeliest(text.rollout, term.top_k)
        return self._likeliest_ids[key]


def in_order(rows: SparseRows, ids_NK: Tensor) -> SparseRows:
    """The same log-probs in the order of ``ids_NK``, which names all of them; -1 pads."""
    if rows.topk_ids_NK.shape == ids_NK.shape and bool((rows.topk_ids_NK == ids_NK).all()):
        return rows
    column_NK = (rows.topk_ids_NK[:, None, :] == ids_NK[:, :, None]).long().argmax(-1)
    logprobs_NK = rows.topk_logprobs_NK.gather(1, column_NK)
    return SparseRows(ids_NK, logprobs_NK.masked_fill(ids_NK < 0, -torch.inf))
