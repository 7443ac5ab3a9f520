"""Losses on classes of tokens, which student and judge can both tell where they stand at one place of a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from llmdistill.composition.chunks import ChunkLoss, chunk_likelihood
from llmdistill.composition.method import Method
from llmdistill.composition.term import OTHER_TOKENIZER, Ask, Groups, Term
from llmdistill.errors import UserError
from llmdistill.objectives.alm import chunk_sums
from llmdistill.objectives.classes import Classes, given_open, span_kl
from llmdistill.teachers.chunks import Question
from llmdistill.tokenization.numerals import NO_DIGIT

ClassDivergence = Callable[[Tensor, Tensor, Tensor], Tensor]  # (log S [n, K + 1], log T [n, K + 1], same [K]) -> [n]


class InClasses:
    """What is told which class each of the student's tokens is in, and which digit each class begins with.

    Both sides' classes are compared given that no digit comes next which cannot, see
    :mod:`llmdistill.tokenization.numerals`.
    """

    classes: Classes
    same: Tensor
    digit_K: Tensor

    def bind_classes(self, classes: Classes, same: Tensor, first_V: Tensor) -> None:
        """Told by the trainer, see :meth:`llmdistill.texts.retokenized.Retokenizer.classes`; ``first_V`` are the
        student's first digits."""
        self.classes, self.same = classes, same
        self.digit_K = torch.full((classes.count + 1,), NO_DIGIT)
        in_one = classes.of_V < classes.count  # all tokens of a class begin alike
        self.digit_K[classes.of_V[in_one]] = first_V[: len(classes.of_V)][in_one]

    def given_open(self, logp_nK: Tensor, closed_n: Tensor) -> Tensor:
        """Of digits [n, 10] that cannot come next."""
        if not closed_n.any():
            return logp_nK
        return given_open(logp_nK, torch.nn.functional.pad(closed_n, (0, 1))[:, self.digit_K.to(closed_n.device)])


class ClassLoss(InClasses):
    """``loss(log S, log T, same)`` of the classes, as a loss of rows; 0 where the judge does not stand."""

    def __init__(self, loss: ClassDivergence) -> None:
        self.loss = loss

    def __call__(self, student_logits: Tensor, /, *evidence: Tensor) -> Tensor:
        """[n] for logits [n, V], and what :meth:`~llmdistill.teachers.chunks.ChunkTeacher.classes` says."""
        teacher_nK, _, closed_n, told_n = evidence
        student_nK = self.given_open(self.classes.logprobs(student_logits[told_n]), closed_n[told_n])
        losses = self.loss(student_nK, self.given_open(teacher_nK[told_n], closed_n[told_n]), self.same)
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
        """[n, 6]."""
        tokens_n, (teacher_nK, judged_n, closed_n, told_n) = evidence[0], evidence[7:]
        of_tokens = super().values(student_logits, *evidence[:7])
        closed_n = closed_n[told_n]
        student_nK = self.given_open(self.classes.logprobs(student_logits[told_n]), closed_n)
        teacher_nK = self.given_open(teacher_nK[told_n], closed_n)
        own_n = self.classes.of(tokens_n[told_n])
        others_nK = torch.ones_like(student_nK).scatter(1, torch.stack([own_n, judged_n[told_n]], -1), 0.0)
        student_others_nK = student_nK.exp() * others_nK
        gap_n = (student_others_nK * (student_nK - teacher_nK)).sum(-1)
        of_classes = torch.stack([gap_n, student_others_nK.sum(-1), (teacher_nK.exp() * others_nK).sum(-1)], -1)
        placed = of_classes.new_zeros(len(told_n), 3).index_put((told_n,), of_classes)
        return torch.cat([of_tokens, placed], -1)

    def losses(self, values_N: Tensor, groups: Groups) -> Tensor:
        """[C]."""
        student_C, teacher_C = self._chunks(values_N, groups)
        _, place_N, count = self._places(groups)
        gap_C, student_others_C, teacher_others_C = (chunk_sums(x, place_N, count) for x in values_N[:, 3:].unbind(-1))
        student_rest_C = 1.0 - student_others_C - student_C.exp()
        return gap_C + span_kl(student_C, teacher_C, student_rest_C, 1.0 - teacher_others_C - teacher_C.exp())


def in_classes(method: Method, judge: str = "teacher") -> Method:
    """The same method with a judge of another tokenizer: its divergences compare classes instead of tokens.

    They are 0 within chunks, where the judge does not stand, and are means over the rows where it does. Beside them
    stand the likelihoods of the chunks, which train the tokens within: left alone these are soon unlearned (eval/arena,
    track "digits").

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
    texts = dict.fromkeys(term.text for term, before in zip(terms, method.terms, strict=True) if term is not before)
    asks = (Ask(judge, "chunks"),)
    beside = [
        replace(term, name=f"{term.name}_{n}" if n else term.name, text=text, asks=asks)
        for n, text in enumerate(texts)
        for term in chunk_likelihood()
    ]
    return replace(method, terms=(*terms, *beside))


def _of_two(loss: Callable[..., Tensor] | None) -> ClassDivergence:
    assert loss is not None
    return lambda student, teacher, same: loss(student, teacher)
