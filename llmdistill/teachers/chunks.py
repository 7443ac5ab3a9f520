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
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmdistill.errors import UserError
from llmdistill.objectives.alm import chunk_sums, merged
from llmdistill.objectives.classes import Classes
from llmdistill.objectives.placed_rows import ClassedRows, PlacedRows
from llmdistill.objectives.rows import PairedRows, TeacherRows, TensorRows
from llmdistill.teachers.base import DenseTeacher, HiddenTeacher, Teacher, TeacherInfo, is_live
from llmdistill.teachers.fingerprint import tokenizer_fingerprint
from llmdistill.teachers.mixture import leaves
from llmdistill.texts import Prompt, Rollout
from llmdistill.texts.retokenized import Retokenized, Retokenizer, Shares
from llmdistill.tokenization.special import pad_id

CHUNK_ROWS = 256  # rows whose logits exist at one time
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
            Five tensors [N]: ids of the tokens; the share of the row's chunk in log T (their sum over its rows is the
            chunk's); the chunk's number, -1 in none; the number of the chunk that ends just before the row, -1: none;
            and of that one log T(a word ends there), 0 where nothing was asked.

        Raises:
            UserError: word ends of a teacher elsewhere. How little was aligned is for ``refuse_unaligned``, which all
                processes call with what they have aligned together.
        """
        self.check(question)
        read = self._read(rollout, prompts)
        logps_M, ends_M = self._asked(read, question)
        count, own_N, judged_M, before_N = len(read.lasts), read.student_chunks, read.judge_chunks, read.student_before
        ends_C = torch.full((count,), math.nan)
        if question.word_ends:
            known_M = read.judge_before >= 0
            ends_C[read.judge_before[known_M]] = ends_M[known_M]
            into_C = merged(ends_C.exp(), read.lasts, question.merge_threshold)
            own_N, judged_M, before_N = (_renumbered(x, into_C) for x in (own_N, judged_M, before_N))
            before_N = torch.where(before_N == own_N, -1, before_N)
            ends_C = ends_C[torch.cat([into_C[1:] != into_C[:-1], into_C.new_ones(min(count, 1)).bool()])]
            count = len(ends_C)
        teacher_C = chunk_sums(logps_M, judged_M, count)
        sizes_C = chunk_sums(torch.ones(len(own_N)), own_N, count).clamp(min=1)
        share_N, ending_N = torch.zeros(len(own_N)), torch.zeros(len(own_N))
        share_N[own_N >= 0] = (teacher_C / sizes_C)[own_N[own_N >= 0]]
        told_N = before_N >= 0
        told_N[told_N.clone()] = ends_C[before_N[told_N]].isfinite()
        ending_N[told_N] = ends_C[before_N[told_N]]
        tokens_N = rollout.token_rows().cpu()
        tensors = (tokens_N, share_N, own_N, torch.where(told_N, before_N, -1), ending_N)
        return TensorRows(tuple(x.to(device) for x in tensors), len(own_N))

    def classes(self, rollout: Rollout, prompts: Sequence[Prompt], device: torch.device | str = "cpu") -> TeacherRows:
        """What it says comes next, where a chunk begins: as classes of tokens that both vocabularies can tell.

        Returns:
            Of the N rows of the student, log T of the classes [n, K + 1] and the class of its own next token [n] int64.
            It says nothing of rows within a chunk, and of chunks that begin or spell otherwise than in the same bytes.

        Raises:
            UserError: a teacher elsewhere.
        """
        self.check(ClassQuestion())
        read, (_, classes_V, same) = self._read(rollout, prompts), self.retokenizer.classes
        classes = Classes(classes_V, len(same))
        own_C, judged_C = (first_rows(x, len(read.level)) for x in (read.student_chunks, read.judge_chunks))
        level = read.level & (own_C >= 0) & (judged_C >= 0)
        dense = self._dense(read)
        token_classes_M = classes.of(read.rollout.token_rows()).to(device)
        said = PairedRows((ClassedRows(dense, classes), TensorRows((token_classes_M,), len(token_classes_M))))
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
        own_C, judged_C = (first_rows(x, len(read.lasts)) for x in (read.student_before, read.judge_before))
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

    def _asked(self, read: Retokenized, question: Question) -> tuple[Tensor, Tensor]:
        """log T of every token of the judge, and of a word's end just before it, [M] float32 on the CPU each."""
        if not question.word_ends:
            logps = [block.token_logprobs for block in self.teacher.score(read.rollout, 0)]
            logps_M = torch.cat(logps).float().cpu() if logps else torch.zeros(0)
            return logps_M, torch.zeros_like(logps_M)
        rows, tokens_M = self._dense(read), read.rollout.token_rows()
        logps, ends = [torch.zeros(0)], [torch.zeros(0)]
        for start in range(0, len(rows), CHUNK_ROWS):
            part = slice(start, min(start + CHUNK_ROWS, len(rows)))
            (logits_nV,) = rows.chunk(part, None)
            logp_nV = logits_nV.float().log_softmax(-1)
            words_V = self.retokenizer.judge_table.begins_word(logp_nV.shape[-1]).to(logp_nV.device)
            picked = logp_nV.gather(1, tokens_M[part, None].to(logp_nV.device)).squeeze(1)
            logps.append(picked.cpu())
            ends.append(logp_nV.masked_fill(~words_V, -torch.inf).logsumexp(-1).cpu())
        return torch.cat(logps), torch.cat(ends)

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


def first_rows(chunks_N: Tensor, chunks: int) -> Tensor:
    """The first row of every chunk, [C] int64; -1: it has none. Of [N] that are -1, or the number of a row's chunk."""
    rows = torch.arange(len(chunks_N))
    known_N = chunks_N >= 0
    first_C = torch.full((chunks,), len(chunks_N)).scatter_reduce(0, chunks_N[known_N], rows[known_N], "amin")
    return torch.where(first_C < len(chunks_N), first_C, -1)


def _placed(count: int, rows: Tensor, places: Tensor) -> Tensor:
    """[count] int64: ``places`` at these rows, -1 elsewhere."""
    return torch.full((count,), -1).index_put((rows,), places)


def _renumbered(chunks_N: Tensor, into_C: Tensor) -> Tensor:
    return torch.where(chunks_N >= 0, into_C[chunks_N.clamp(min=0)], -1) if len(into_C) else chunks_N


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
