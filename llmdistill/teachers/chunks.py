"""A teacher of another tokenizer: asked how likely chunks of the text are, which both tokenizers have.

It may be any teacher whose tokenizer is at hand: in this process, vLLM, a service, stored, or several of one tokenizer.
It is sent ids of its own (:mod:`llmdistill.texts.retokenized`) and its log-probabilities are summed by chunk. What is
asked of whole distributions (how likely a word is to end there, what else may come next) only models in this process
can say, and hidden states only one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmdistill.errors import UserError
from llmdistill.objectives.alm import chunk_sums, merged
from llmdistill.objectives.classes import Classes, log_open
from llmdistill.objectives.placed_rows import ClassedRows, PlacedRows
from llmdistill.objectives.rows import PairedRows, TeacherRows, TensorRows
from llmdistill.teachers.base import DenseTeacher, HiddenTeacher, Teacher, TeacherInfo, is_live, max_top_k
from llmdistill.teachers.fingerprint import tokenizer_fingerprint
from llmdistill.teachers.mixture import leaves
from llmdistill.texts import Prompt, Rollout
from llmdistill.texts.retokenized import Retokenized, Retokenizer, Shares
from llmdistill.tokenization.numerals import NO_DIGIT, NumeralEnds
from llmdistill.tokenization.special import pad_id

CHUNK_ROWS = 256  # rows whose logits exist at one time
LISTED = 20  # tokens a row that a teacher elsewhere is asked for: the digits, or the likeliest
TOLD = 3  # reasons in a message


@dataclass(frozen=True)
class Question:
    """What a term asks of chunks beside their log-probabilities."""

    word_ends: bool = False  # how likely a word is to end at theirs
    merge_threshold: float = 0.0  # chunks that end where that is not likelier go on into the next


@dataclass(frozen=True)
class ClassQuestion:
    """What comes next, in classes of tokens."""


@dataclass(frozen=True)
class EndQuestion:
    """Hidden states of these layers where chunks end."""

    layers: tuple[int, ...]


class ChunkTeacher:
    """Another teacher in chunks. Implements :class:`~llmdistill.teachers.base.Teacher` as far as it can.

    Args:
        teacher: the one that is asked.
        retokenizer: makes its text of the student's.
        name: of the judge, by which prompts hold what it reads.
        min_aligned: the least share of bytes that must be in a chunk.
    """

    writes = False  # what it wrote would be in its tokens

    def __init__(self, teacher: Teacher, retokenizer: Retokenizer, name: str, *, min_aligned: float = 0.9) -> None:
        self.teacher, self.retokenizer, self.name, self.min_aligned = teacher, retokenizer, name, min_aligned
        self.live = is_live(teacher)
        self.shares = Shares()  # since the beginning
        self.fresh = Shares()  # since they were last logged
        self.student_numerals = NumeralEnds.of(retokenizer.student)
        self.judge_numerals = NumeralEnds.of(retokenizer.judge)
        self.student_digits = Classes(self.student_numerals.first_V, NO_DIGIT)
        self.judge_digits = Classes(self.judge_numerals.first_V, NO_DIGIT)
        self._last: tuple[Rollout, Retokenized] | None = None
        self._rows: tuple[Retokenized, TeacherRows] | None = None

    def info(self) -> TeacherInfo:
        return self.teacher.info()

    def close(self) -> None:
        self.teacher.close()

    def generate(self, prompts: Sequence[Prompt], sampling: Any) -> NoReturn:
        self._refuse("writes text in its own tokens", "sequences student or dataset")

    def score(self, rollout: Rollout, top_k: int, chosen: Tensor | None = None) -> NoReturn:
        self._refuse("has another tokenizer, and no log-probabilities of the student's tokens", "--method alm")

    def _refuse(self, what: str, fix: str) -> NoReturn:
        raise UserError(f"{self.name} {self.info().name!r} {what}. Fix: {fix}.")

    def check(self, question: Question | ClassQuestion | EndQuestion) -> None:
        """Whether it can answer, before a run begins.

        Raises:
            UserError: it is elsewhere, and whole distributions or hidden states are asked for.
        """
        if isinstance(question, EndQuestion):
            if not isinstance(self.teacher, HiddenTeacher):
                raise self._elsewhere("reads hidden states", "one model", "--hidden_weight 0")
        elif not isinstance(self.teacher, DenseTeacher):
            if isinstance(question, ClassQuestion):
                raise self._elsewhere("compares what comes next", "models", "--method chunk_opd")
            if question.word_ends:
                raise self._elsewhere("asks how likely words end", "models", "--debias false")

    def answer(
        self,
        rollout: Rollout,
        prompts: Sequence[Prompt],
        question: Question | ClassQuestion | EndQuestion,
        device: torch.device | str = "cpu",
    ) -> TeacherRows:
        """What it says about a text, by what is asked."""
        if isinstance(question, ClassQuestion):
            return self.classes(rollout, prompts, device)
        if isinstance(question, EndQuestion):
            return self.ends(rollout, prompts, question.layers, device)
        return self.chunks(rollout, prompts, question, device)

    def chunks(
        self, rollout: Rollout, prompts: Sequence[Prompt], question: Question, device: torch.device | str = "cpu"
    ) -> TensorRows:
        """What it says about the chunks of ``rollout``, for each of the N rows of the student.

        Returns:
            Seven tensors [N]: ids of the tokens; the share of the row's chunk in log T (their sum over its rows is the
            chunk's); the chunk's number, -1 in none; the number of the chunk that ends just before the row, -1: none;
            of that one log T(a word ends there), 0 where nothing was asked, and log T(none of the digits follows that
            the student's tokens rule out); and [N, 10] bool the digits that the judge's rule out.

        Raises:
            UserError: word ends of a teacher elsewhere. How little was aligned is for ``refuse_unaligned``, which all
                processes call with what they have aligned together.
        """
        self.check(question)
        read = self._read(rollout, prompts)
        count, own_N, judged_M, before_N = len(read.lasts), read.student_chunks, read.judge_chunks, read.student_before
        tokens_N, tokens_M, before_M = rollout.token_rows().cpu(), read.rollout.token_rows().cpu(), read.judge_before
        by_judge_C, by_student_C = self._closed(read, tokens_N, tokens_M)
        closed_M = cannot_stand(by_student_C, before_M, self.judge_numerals.first_digits(tokens_M))
        closed_N = cannot_stand(by_judge_C, before_N, self.student_numerals.first_digits(tokens_N))
        logps_M, ends_M, open_M = self._asked(read, question, closed_M)
        told_C = torch.zeros(count, dtype=torch.bool)
        ends_C, open_C = torch.zeros(count), torch.zeros(count)
        known_M = before_M >= 0
        told_C[before_M[known_M]], ends_C[before_M[known_M]] = True, ends_M[known_M]
        open_C[before_M[known_M]] = open_M[known_M]
        told_N = (before_N >= 0) & _at(told_C, before_N, absent=False)
        ending_N, open_N = _at(ends_C, before_N), _at(open_C, before_N)
        if question.word_ends:
            ending_C = torch.where(told_C, ends_C, math.nan).exp()
            into_C = merged(ending_C, read.lasts, question.merge_threshold)
            own_N, judged_M, before_N = (_at(into_C, x, absent=-1) for x in (own_N, judged_M, before_N))
            told_N &= before_N != own_N  # no end within a chunk
            count = int(into_C[-1]) + 1 if len(into_C) else 0
        teacher_C = chunk_sums(logps_M, judged_M, count)
        sizes_C = chunk_sums(torch.ones(len(own_N)), own_N, count).clamp(min=1)
        share_N = _at(teacher_C / sizes_C, own_N)
        ended = (torch.where(told_N, before_N, -1), ending_N * told_N, open_N * told_N, closed_N & told_N[:, None])
        return TensorRows(tuple(x.to(device) for x in (tokens_N, share_N, own_N, *ended)), len(own_N))

    def classes(self, rollout: Rollout, prompts: Sequence[Prompt], device: torch.device | str = "cpu") -> TeacherRows:
        """What it says comes next, where a chunk begins: as classes of tokens that both vocabularies can tell.

        Returns:
            Of the N rows of the student, log T of the classes [n, K + 1], the class of its own next token [n] int64,
            and the digits that cannot come next, by what either's tokens say of the end of the chunk before, [n, 10]
            bool. It says nothing of rows within a chunk, and of chunks that begin or spell otherwise than in the same
            bytes.

        Raises:
            UserError: a teacher elsewhere.
        """
        self.check(ClassQuestion())
        read, (_, classes_V, same) = self._read(rollout, prompts), self.retokenizer.classes
        classes = Classes(classes_V, len(same))
        own_C, judged_C = (edge_rows(x, len(read.level), "amin") for x in (read.student_chunks, read.judge_chunks))
        level = read.level & (own_C >= 0) & (judged_C >= 0)
        tokens_M = read.rollout.token_rows().cpu()
        closed_C = torch.stack(self._closed(read, rollout.token_rows().cpu(), tokens_M)).any(0)
        closed_M = cannot_stand(closed_C, read.judge_before, self.judge_numerals.first_digits(tokens_M))
        of_tokens = TensorRows((classes.of(tokens_M).to(device), closed_M.to(device)), len(tokens_M))
        said = PairedRows((ClassedRows(self._dense(read), classes), of_tokens))
        return PlacedRows(said, _placed(len(read.student_chunks), own_C[level], judged_C[level]))

    def ends(
        self, rollout: Rollout, prompts: Sequence[Prompt], layers: Sequence[int], device: torch.device | str = "cpu"
    ) -> TeacherRows:
        """Its hidden states [n, H] of each of these layers at the last token of every chunk.

        They are at the student's rows that follow a chunk: of those the state is that of the chunk's last token too. Of
        other rows, and of the end of a text, it says nothing.

        Raises:
            UserError: a teacher elsewhere.
        """
        self.check(EndQuestion(tuple(layers)))
        assert isinstance(self.teacher, HiddenTeacher)
        read = self._read(rollout, prompts)
        states = tuple(x.to(device) for x in self.teacher.hidden_layers(read.rollout, layers))
        own_C, judged_C = (edge_rows(x, len(read.lasts), "amin") for x in (read.student_before, read.judge_before))
        known = (own_C >= 0) & (judged_C >= 0)
        said = TensorRows(states, len(read.judge_before))
        return PlacedRows(said, _placed(len(read.student_before), own_C[known], judged_C[known]))

    def _read(self, rollout: Rollout, prompts: Sequence[Prompt]) -> Retokenized:
        """The text in its tokens. What several terms ask of one text is read, and counted, once."""
        if self._last is None or self._last[0] is not rollout:
            read = self.retokenizer(rollout, prompts, self.name)
            self.shares.add(read.shares)
            self.fresh.add(read.shares)
            self._last, self._rows = (rollout, read), None
        return self._last[1]

    def _dense(self, read: Retokenized) -> TeacherRows:
        """Its whole distributions, for all that is asked of one text."""
        assert isinstance(self.teacher, DenseTeacher)
        if self._rows is None or self._rows[0] is not read:
            self._rows = read, self.teacher.dense(read.rollout)
        return self._rows[1]

    def _elsewhere(self, why: str, what: str, instead: str) -> UserError:
        return UserError(
            f"the method {why} of {self.name} {self.info().name!r}, which takes {what} in this process. "
            f"Fix: {instead}, or {self.name}.model with engine hf."
        )

    def _closed(self, read: Retokenized, tokens_N: Tensor, tokens_M: Tensor) -> tuple[Tensor, Tensor]:
        """The digits that cannot follow a chunk, as its last token of the judge says, and of the student, [C, 10]."""
        sides = (
            (self.judge_numerals, tokens_M, read.judge_chunks),
            (self.student_numerals, tokens_N, read.student_chunks),
        )
        return tuple(
            side.closed(_at(tokens, edge_rows(at, len(read.lasts), "amax"), absent=-1)) for side, tokens, at in sides
        )  # type: ignore[return-value]

    def _asked(self, read: Retokenized, question: Question, closed_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log T of every token of the judge, of a word's end just before it, and of none of the closed digits there,
        [M] float32 on the CPU each."""
        tokens_M = read.rollout.token_rows()
        if not question.word_ends and not (closed_M.any() and isinstance(self.teacher, DenseTeacher)):
            logps_M, open_M = self._scored(read.rollout, closed_M)
            return logps_M, torch.zeros_like(logps_M), open_M
        rows, told = self._dense(read), [(torch.zeros(0),) * 3]
        for start in range(0, len(rows), CHUNK_ROWS):
            part = slice(start, min(start + CHUNK_ROWS, len(rows)))
            (logits_nV,) = rows.chunk(part, None)
            logp_nV = logits_nV.float().log_softmax(-1)
            picked = logp_nV.gather(1, tokens_M[part, None].to(logp_nV.device)).squeeze(1)
            ends = torch.zeros_like(picked)
            if question.word_ends:
                words_V = self.retokenizer.judge_table.begins_word(logp_nV.shape[-1]).to(logp_nV.device)
                ends = logp_nV.masked_fill(~words_V, -torch.inf).logsumexp(-1)
            opened = log_open(logp_nV, self.judge_digits, closed_M[part].to(logp_nV.device))
            told.append((picked.cpu(), ends.cpu(), opened.float().cpu()))
        return tuple(map(torch.cat, zip(*told, strict=True)))  # type: ignore[return-value]

    def _scored(self, rollout: Rollout, closed_M: Tensor) -> tuple[Tensor, Tensor]:
        """The same of a teacher elsewhere, which is asked for the closed digits where there are any."""
        chosen, listed = None, 0
        if closed_M.any():
            ids = (self.judge_numerals.first_V < NO_DIGIT).nonzero().flatten()
            most = min(LISTED, max_top_k(self.teacher))
            if len(ids) <= most and getattr(self.teacher, "scores_chosen", True):
                chosen = torch.where(closed_M.any(-1, keepdim=True), ids, -1)
            else:
                listed = most
        blocks = self.teacher.score(rollout, listed, chosen)
        if not blocks:
            return torch.zeros(0), torch.zeros(0)
        logps_M = torch.cat([block.token_logprobs for block in blocks]).float().cpu()
        open_M = torch.zeros_like(logps_M)
        if chosen is not None or listed:
            ids_MK = torch.cat([block.topk_ids for block in blocks]).long().cpu()
            listed_MK = torch.cat([block.topk_logprobs for block in blocks]).float().cpu()
            digit_MK = self.judge_numerals.first_digits(ids_MK)
            counted_MK = torch.nn.functional.pad(closed_M, (0, 1)).gather(1, digit_MK)
            taken_M = (listed_MK.exp() * counted_MK).sum(-1)
            # never less than the token that did follow, which is none of them
            open_M = torch.maximum(torch.log1p(-taken_M.clamp(max=1 - 1e-7)), logps_M) * closed_M.any(-1)
        return logps_M, open_M

    def too_little(self, aligned_bytes: float, all_bytes: float) -> bool:
        """Whether so many bytes in chunks, of so many, are less than ``min_aligned``."""
        return all_bytes > 0 and aligned_bytes < self.min_aligned * all_bytes

    def refuse_unaligned(self, shares: Shares) -> None:
        """Refuses what was aligned since the beginning.

        Raises:
            UserError: it is less than ``min_aligned``.
        """
        if self.too_little(shares.aligned_bytes, shares.bytes):
            reasons = "; ".join(reason for reason, _ in shares.reasons.most_common(TOLD))
            raise UserError(
                f"teacher.min_aligned is {self.min_aligned:g}, and {shares.aligned_bytes / shares.bytes:.3f} of the "
                f"bytes are in chunks of both tokenizers ({shares.aligned_sequences} of {shares.sequences} sequences)"
                f"{': ' + reasons if reasons else ''}. Fix: a teacher whose tokenizer keeps the text, or a lower one."
            )

    def numbers(self) -> dict[str, tuple[float, float]]:
        """What was aligned since this was last asked: name -> (sum, count)."""
        s, self.fresh = self.fresh, Shares()
        self._last = self._rows = None  # the round is asked about
        return {
            "aligned_bytes": (s.aligned_bytes, s.bytes),
            "aligned_rows": (s.aligned_sequences, s.sequences),
            "inexact_rows": (s.inexact_sequences, s.sequences),
            "aligned_digits": (s.aligned_digits, s.digits),
            "aligned_ends": (s.aligned_ends, s.ends),
            "tokens_in_chunks": (s.chunk_tokens, s.tokens),
            "single_chunks": (s.single, s.chunks),
            "template_tokens": (s.template_tokens, s.sequences),
            "align_seconds": (s.seconds, 1.0),
        }


def edge_rows(chunks_N: Tensor, chunks: int, edge: Literal["amin", "amax"]) -> Tensor:
    """The first row of every chunk, or the last, [C] int64; -1: it has none. Of [N] that are -1, or the number of a
    row's chunk."""
    rows = torch.arange(len(chunks_N))
    known_N = chunks_N >= 0
    return torch.full((chunks,), -1).scatter_reduce(0, chunks_N[known_N], rows[known_N], edge, include_self=False)


def cannot_stand(closed_C: Tensor, before_R: Tensor, digit_R: Tensor) -> Tensor:
    """The digits that cannot stand at a row, by the chunk that ends before it, -1: none -> [R, 10] bool.

    Where one of them does stand there, ``digit_R``, the token does not say what it was believed to: then none.
    """
    closed_R = _at(closed_C, before_R, absent=False)
    stands_R = torch.nn.functional.pad(closed_R, (0, 1)).gather(1, digit_R[:, None])
    return closed_R & ~stands_R


def _at(values_C: Tensor, index: Tensor, absent: float = 0.0) -> Tensor:
    """``values_C[index]``, and ``absent`` where that is -1."""
    found = values_C.new_full((len(index), *values_C.shape[1:]), absent)
    found[index >= 0] = values_C[index[index >= 0]]
    return found


def _placed(count: int, rows: Tensor, places: Tensor) -> Tensor:
    """[count] int64: ``places`` at these rows, -1 elsewhere."""
    return torch.full((count,), -1).index_put((rows,), places)


def tokenizer_of(teacher: Teacher, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a teacher, or of several, whose ids it is sent.

    Raises:
        UserError: it is not here, or another one.
    """
    info = teacher.info()
    behind = [getattr(leaf, "teacher", None) or leaf for _, leaf in leaves(teacher)]  # what a cache keeps answers of
    known = (getattr(leaf, "tokenizer", None) for leaf in behind)  # of several, which have one and the same
    tokenizer = next((t for t in known if isinstance(t, PreTrainedTokenizerBase)), None)
    if tokenizer is None:
        raise UserError(
            f"{name} {info.name!r} is a {type(teacher).__name__} without its tokenizer, in whose ids it is asked. "
            f"Fix: --{name}.tokenizer FOLDER_OR_HUB_NAME."
        )
    if tokenizer_fingerprint(tokenizer) != info.tokenizer:
        raise UserError(
            f"{name}.tokenizer {tokenizer.name_or_path!r} is not that of {info.name!r} ({info.tokenizer}). "
            "Fix: the folder or hub name that the teacher was loaded from."
        )
    return tokenizer


def in_chunks(
    teacher: Teacher,
    name: str,
    student: PreTrainedTokenizerBase,
    student_ends: Collection[int],
    template: Any,
    *,
    min_aligned: float,
) -> ChunkTeacher:
    """``teacher`` as a judge in chunks; ``template`` is that of its tokenizer."""
    tokenizer = tokenizer_of(teacher, name)
    convert = Retokenizer(student, student_ends, tokenizer, template, pad_id=pad_id(tokenizer))
    return ChunkTeacher(teacher, convert, name, min_aligned=min_aligned)
