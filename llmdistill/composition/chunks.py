"""Losses on chunks of text, which student and judge have in common where their tokens differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from llmdistill.composition.term import Ask, Groups, Term
from llmdistill.objectives.alm import chunk_sums
from llmdistill.teachers.chunks import ClassQuestion, EndQuestion, Question
from llmdistill.tokenization.token_bytes import TokenTable

ChunkDivergence = Callable[[Tensor, Tensor], Tensor]  # (log S [C], log T [C]) -> [C]


class ChunkLoss:
    """``loss(log S, log T)`` of the chunks that a judge of another tokenizer told of, as a loss of groups of rows.

    A row's numbers are log S of its token and, with ``question.word_ends``, log S(a word ends before it), which is
    added to the chunk that does, on both sides (ALM's outcome debiasing, arXiv 2503.20083 section 3.3). Where rows have
    weights, a chunk's is the mean of its rows'.
    """

    weighs = True

    def __init__(self, loss: ChunkDivergence, question: Question) -> None:
        self.loss, self.question = loss, question
        self.table: TokenTable | None = None  # the student's

    def bind(self, table: TokenTable) -> None:
        """Told by the trainer which of the student's tokens begin a word."""
        self.table = table

    def values(self, student_logits: Tensor, /, *evidence: Tensor) -> Tensor:
        """[n], or [n, 2] with word ends."""
        tokens_n = evidence[0]
        logp_nV = student_logits.float().log_softmax(-1)
        picked_n = logp_nV.gather(-1, tokens_n.unsqueeze(-1)).squeeze(-1)
        if not self.question.word_ends:
            return picked_n
        assert self.table is not None
        words_V = self.table.begins_word(logp_nV.shape[-1]).to(logp_nV.device)
        return torch.stack([picked_n, logp_nV.masked_fill(~words_V, -torch.inf).logsumexp(-1)], -1)

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
        """log S and log T of the chunks of a micro-batch, [C] each; ``values_N`` [N], or [N, 2 and more]."""
        _, share_N, _, before_N, ending_N = groups.evidence[:5]
        numbers, place_N, count = self._places(groups)
        tokens_N = values_N if values_N.ndim == 1 else values_N[:, 0]
        student_C = chunk_sums(tokens_N, place_N, count)
        teacher_C = chunk_sums(share_N.to(tokens_N), place_N, count)
        if values_N.ndim == 2:
            rows = (before_N >= 0).nonzero().flatten()
            ended = torch.searchsorted(numbers, before_N[rows])
            student_C = student_C.index_add(0, ended, values_N[rows, 1])
            teacher_C = teacher_C.index_add(0, ended, ending_N[rows].to(teacher_C))
        return student_C, teacher_C


def asked_of_chunks(term: Term, ask: Ask) -> Question | ClassQuestion | EndQuestion:
    """What a term asks a judge of another tokenizer."""
    if term.hidden is not None:
        return EndQuestion(term.hidden.judge)
    if ask.kind == "classes":
        return ClassQuestion()
    return term.group.question if isinstance(term.group, ChunkLoss) else Question()
