"""Losses on classes of tokens, which student and judge can both tell where they stand at one place of a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from llmdistill.composition.chunks import ChunkLoss
from llmdistill.composition.method import Method
from llmdistill.composition.term import OTHER_TOKENIZER, Ask, Groups, Term
from llmdistill.errors import UserError
from llmdistill.objectives.alm import chunk_sums
from llmdistill.objectives.classes import Classes, span_kl
from llmdistill.teachers.chunks import Question

ClassDivergence = Callable[[Tensor, Tensor, Tensor], Tensor]  # (log S [n, K + 1], log T [n, K + 1], same [K]) -> [n]


class InClasses:
    """What is told which class each of the student's tokens is in."""

    classes: Classes
    same: Tensor

    def bind_classes(self, classes: Classes, same: Tensor) -> None:
        """Told by the trainer, see :meth:`llmdistill.texts.retokenized.Retokenizer.classes`."""
        self.classes, self.same = classes, same


class ClassLoss(InClasses):
    """``loss(log S, log T, same)`` of the classes, as a loss of rows; 0 where the judge does not stand."""

    def __init__(self, loss: ClassDivergence) -> None:
        self.loss = loss

    def __call__(self, student_logits: Tensor, /, *evidence: Tensor) -> Tensor:
        """[n] for logits [n, V], and log T of the classes [n, K + 1], the judge's own token's class, told [n] bool."""
        teacher_nK, _, told_n = evidence
        student_nK = self.classes.logprobs(student_logits[told_n])
        losses = self.loss(student_nK, teacher_nK[told_n], self.same)
        return student_nK.new_zeros(len(told_n)).index_put((told_n,), losses)


class SpanLoss(InClasses, ChunkLoss):
    """The reverse KL over the classes where a chunk begins, among which it stands itself: SimCT (arXiv 2605.07711).

    The classes that the chunk's first tokens are in, one of either side, are what is left of them without the chunk. So
    all of a chunk's tokens are trained, and the alternatives at its first. Where the judge does not stand there, the
    classes are the chunk and all else.

    A row's numbers are those of :class:`~llmdistill.composition.chunks.ChunkLoss`, and where a chunk begins, of the
    other classes, the sum of S log(S / T), and their S and T.
    """

    def __init__(self, question: Question) -> None:
        super().__init__(lambda student, teacher: student, question)

    def values(self, student_logits: Tensor, /, *evidence: Tensor) -> Tensor:
        """[n, 5]."""
        tokens_n, (teacher_nK, judged_n, told_n) = evidence[0], evidence[5:]
        of_tokens = super().values(student_logits, *evidence[:5])
        if of_tokens.ndim == 1:
            of_tokens = torch.stack([of_tokens, torch.zeros_like(of_tokens)], -1)
        student_nK, teacher_nK = self.classes.logprobs(student_logits[told_n]), teacher_nK[told_n]
        own_n = self.classes.of(tokens_n[told_n])
        others_nK = torch.ones_like(student_nK).scatter(1, torch.stack([own_n, judged_n[told_n]], -1), 0.0)
        student_others_nK = student_nK.exp() * others_nK
        gap_n = (student_others_nK * (student_nK - teacher_nK)).sum(-1)
        of_classes = torch.stack([gap_n, student_others_nK.sum(-1), (teacher_nK.exp() * others_nK).sum(-1)], -1)
        placed = of_classes.new_zeros(len(told_n), 3).index_put((told_n,), of_classes)
        return torch.cat([of_tokens, placed], -1)

    def losses(self, values_N: Tensor, groups: Groups) -> Tensor:
        """[C]."""
        student_C, teacher_C = self._chunks(values_N[:, :2], groups)
        _, place_N, count = self._places(groups)
        gap_C, student_others_C, teacher_others_C = (chunk_sums(x, place_N, count) for x in values_N[:, 2:].unbind(-1))
        student_rest_C = 1.0 - student_others_C - student_C.exp()
        return gap_C + span_kl(student_C, teacher_C, student_rest_C, 1.0 - teacher_others_C - teacher_C.exp())


def in_classes(method: Method, judge: str = "teacher") -> Method:
    """The same method with a judge of another tokenizer: its divergences compare classes instead of tokens.

    They are 0 within chunks, where the judge does not stand, and are means over the rows where it does.

    Raises:
        UserError: a term hears anything of the judge but whole distributions, or reads more than those; or none does.
    """

    def changed(term: Term) -> Term:
        if all(ask.judge != judge or ask.kind in OTHER_TOKENIZER for ask in term.asks):
            return term
        alone = len(term.asks) == 1 and term.loss is not None and not (term.reads or term.survey)
        if not alone or term.asks[0].kind != "full":
            raise UserError(
                f"{judge}.view is classes, and term {term.name!r} takes more than whole distributions of two models. "
                "Fix: --estimator full without what stands beside it; or llmdistill.cross_tokenizer, whose chunk_opd "
                "weighs sampled tokens."
            )
        compared = [ClassLoss(_of_two(x)) for x in (term.loss, *term.watch.values())]
        watch = dict(zip(term.watch, compared[1:], strict=True))
        return replace(term, loss=compared[0], watch=watch, asks=(Ask(judge, "classes"),))

    terms = tuple(map(changed, method.terms))
    if all(after is before for after, before in zip(terms, method.terms, strict=True)):
        raise UserError(
            f"{judge}.view is classes, and no term compares tokens with {judge}: across tokenizers its methods know "
            "nothing else than chunks and classes. Fix: leave it out."
        )
    return replace(method, terms=terms)


def _of_two(loss: Callable[..., Tensor] | None) -> ClassDivergence:
    assert loss is not None
    return lambda student, teacher, same: loss(student, teacher)
