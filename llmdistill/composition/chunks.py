"""Losses on chunks of text, which student and judge have in common where their tokens differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from llmdistill.composition.term import Ask, Groups, Term
from llmdistill.objectives.alm import binary_divergence, chunk_sums
from llmdistill.objectives.classes import Classes, log_open
from llmdistill.teachers.chunks import ClassQuestion, EndQuestion, Question
from llmdistill.tokenization.token_bytes import TokenTable

ChunkDivergence = Callable[[Tensor, Tensor], Tensor]  # (log S [C], log T [C]) -> [C]


class ChunkLoss:
    """``loss(log S, log T)`` of the chunks that a judge of another tokenizer told of, as a loss of groups of rows.

    A row's numbers are log S of its token, log S(a word ends before it) with ``question.word_ends``, and log S(no digit
    comes next that cannot), by what a token at the end of the chunk before says of it
    (:mod:`llmdistill.tokenization.numerals`). The last goes with the chunk before, on both sides, and not with the
    row's own: so chunks are the steps of one process on either side. In its place there a chunk has, with
    ``word_ends``, that a word ends with it (ALM's outcome debiasing, arXiv 2503.20083 section 3.3). Where rows have
    weights, a chunk's is the mean of its rows'.
    """

    weighs = True

    def __init__(self, loss: ChunkDivergence, question: Question) -> None:
        self.loss, self.question = loss, question
        self.table: TokenTable | None = None  # the student's

    def bind(self, table: TokenTable, digits: Classes) -> None:
        """Told by the trainer which of the student's tokens begin a word, and which digit."""
        self.table, self.digits = table, digits

    def values(self, student_logits: Tensor, /, *evidence: Tensor) -> Tensor:
        """[n, 3]."""
        tokens_n, closed_n = evidence[0], evidence[6]
        logp_nV = student_logits.float().log_softmax(-1)
        picked_n = logp_nV.gather(-1, tokens_n.unsqueeze(-1)).squeeze(-1)
        ended_n = torch.zeros_like(picked_n)
        if self.question.word_ends:
            assert self.table is not None
            words_V = self.table.begins_word(logp_nV.shape[-1]).to(logp_nV.device)
            ended_n = logp_nV.masked_fill(~words_V, -torch.inf).logsumexp(-1)
        return torch.stack([picked_n, ended_n, log_open(logp_nV, self.digits, closed_n)], -1)

    def losses(self, values_N: Tensor, groups: Groups) -> Tensor:
        """Of every chunk, [C]."""
        return self.loss(*self._chunks(values_N, groups))

    def reduce(self, values_N: Tensor, groups: Groups) -> Tensor:
        losses_C = self.losses(values_N, groups)
        return losses_C.sum() if groups.weights_N is None else (losses_C * self._weights(groups).to(losses_C)).sum()

    def count(self, groups: Groups) -> float:
        """Chunks, or the sum of their weights."""
        if groups.weights_N is not None:
            return float(self._weights(groups).sum())
        chunks_N = groups.evidence[2]
        return int(chunks_N[chunks_N >= 0].unique().numel())

    def observe(self, values_N: Tensor, groups: Groups) -> Mapping[str, tuple[float, float]]:
        student_C, teacher_C = self._chunks(values_N, groups)
        count = float(len(student_C))
        return {
            "teacher/chunk_logprob": (float(teacher_C.sum()), count),
            "distill/chunk_logprob": (float(student_C.sum()), count),
            "distill/chunk_tokens": (float((groups.evidence[2] >= 0).sum()), count),
        }

    def _weights(self, groups: Groups) -> Tensor:
        """The mean of the rows' weights in every chunk, [C]."""
        assert groups.weights_N is not None
        _, place_N, count = self._places(groups)
        weights_N = groups.weights_N.to(place_N.device)
        return chunk_sums(weights_N, place_N, count) / chunk_sums(torch.ones_like(weights_N), place_N, count)

    @staticmethod
    def _places(groups: Groups) -> tuple[Tensor, Tensor, int]:
        """The numbers of the chunks of a micro-batch, which of these C each row is in [N], -1: none, and C."""
        numbers, place_N = groups.evidence[2].unique(return_inverse=True)
        absent = int((numbers < 0).sum())  # -1 comes first
        return numbers[absent:], place_N - absent, len(numbers) - absent

    def _chunks(self, values_N: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
        """log S and log T of the chunks of a micro-batch, [C] each; ``values_N`` [N, 3 and more]."""
        _, share_N, _, before_N, ending_N, open_N = groups.evidence[:6]
        numbers, place_N, count = self._places(groups)
        told = (before_N >= 0).nonzero().flatten()
        ended = torch.searchsorted(numbers, before_N[told])
        own = place_N[told]
        found = []
        for of_tokens_N, words_N, opened_N in (values_N[:, :3].unbind(-1), (share_N, ending_N, open_N)):
            sums_C = chunk_sums(of_tokens_N, place_N, count)
            opened = opened_N[told].to(sums_C)
            sums_C = sums_C.index_add(0, ended, words_N[told].to(sums_C) if self.question.word_ends else opened)
            found.append(sums_C.index_add(0, own[own >= 0], -opened[own >= 0]))
        return found[0], found[1].to(found[0])


def chunk_likelihood(weight: float = 1.0) -> list[Term]:
    """The KL of "this chunk or another" in nats, ALM's loss at temperature 1, which trains the tokens within chunks."""
    group = ChunkLoss(partial(binary_divergence, temperature=1.0), Question())
    return [Term("chunks", group=group, asks=(Ask("teacher", "chunks"),), weight=weight)] if weight else []


def asked_of_chunks(term: Term, ask: Ask) -> Question | ClassQuestion | EndQuestion:
    """What a term asks a judge of another tokenizer."""
    if term.hidden is not None:
        return EndQuestion(term.hidden.judge)
    if ask.kind == "classes":
        return ClassQuestion()
    return term.group.question if isinstance(term.group, ChunkLoss) else Question()
