"""The view of a judge of another family: the same content in its own tokens, behind its own template of the prompt.

What is aligned is the content alone, from the first token behind the generation prompt to the end of the turn, which is
one more token on either side whatever each calls it. The student's ids stay as they were sampled; the judge's are made
from the bytes that they spell. All else that the judge's template writes is read by it and has no loss.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmdistill.texts.chat import PROBE, ChatTemplate
from llmdistill.texts.rollout import Prompt, Reading, Rollout, collate
from llmdistill.texts.seam import behind, inner, text_ids
from llmdistill.tokenization.align import SHOWN, Ends, Spelling, Units, align, behind_front, spell, substituted
from llmdistill.tokenization.classes import shared_classes
from llmdistill.tokenization.compare import special_ids
from llmdistill.tokenization.marks import THINK_TAGS, call_tags, think_tags
from llmdistill.tokenization.token_bytes import (
    CALL,
    END,
    END_CALL,
    END_THINK,
    MARK,
    THINK,
    UNKNOWN,
    TokenTable,
    table_of,
)


@dataclass
class Shares:
    """How much of what was written could be aligned."""

    bytes: int = 0
    aligned_bytes: int = 0  # of content in a chunk that counts
    sequences: int = 0
    aligned_sequences: int = 0
    inexact_sequences: int = 0  # of those: on a form without case, accents and spaces
    chunks: int = 0
    single: int = 0  # of those: one token on either side
    digits: int = 0  # of the bytes
    aligned_digits: int = 0
    tokens: int = 0  # of the student, that the loss trains on
    chunk_tokens: int = 0  # of those: in a chunk that counts
    ends: int = 0  # sequences that end their turn
    aligned_ends: int = 0  # of those: the end is in a chunk
    template_tokens: int = 0  # that the judge reads around the content
    seconds: float = 0.0  # that it took
    reasons: Counter[str] = field(default_factory=Counter)  # why sequences are not aligned, or not exactly

    def add(self, other: Shares) -> None:
        for name, value in vars(other).items():
            if name == "reasons":
                self.reasons.update(value)
            else:
                setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True, eq=False)
class Retokenized:
    """A rollout as the judge reads it. N rows of the student, M of the judge, C chunks, numbered through the batch."""

    rollout: Rollout  # in the judge's tokens; all of the content is marked
    student_chunks: Tensor  # [N] int64: the chunk of every row of the student, -1: none
    judge_chunks: Tensor  # [M] int64
    student_before: Tensor  # [N] int64: the chunk that ends just before each row, -1: none
    judge_before: Tensor  # [M] int64
    lasts: Tensor  # [C] bool: the last chunk of its sequence
    level: Tensor  # [C] bool: where it begins, both sides say what comes next in the same bytes
    shares: Shares


class Retokenizer:
    """Turns rollouts of a student into what a judge of another tokenizer reads.

    Args:
        student: the student's tokenizer; ``student_ends`` are the ids that end its turns.
        judge: the other's, with its template.
    """

    def __init__(
        self,
        student: PreTrainedTokenizerBase,
        student_ends: Collection[int],
        judge: PreTrainedTokenizerBase,
        template: ChatTemplate,
        *,
        pad_id: int,
    ) -> None:
        self.judge, self.template, self.pad_id = judge, template, pad_id
        self.student = student
        self._classes: tuple[TokenTable, tuple[Tensor, Tensor, Tensor]] | None = None
        self.student_ends_at(student_ends)
        self.end = self._end_of_turn()
        ends = [i for i in (self.end, judge.eos_token_id) if i is not None]
        self.judge_table = table_of(judge).marked(dict.fromkeys(ends, END))
        # To a side without tags of its own those of the other are words like any others.
        own_tags, other_tags = think_tags(student), think_tags(judge)
        self.student_tags, self.judge_tags = own_tags or other_tags, other_tags or own_tags
        self.judge_thinks = bool(other_tags)
        self.unwritten = self._never_in_text()
        own_calls, other_calls = call_tags(student), call_tags(judge)
        calls = (own_calls, other_calls) if own_calls and other_calls else ((), ())
        units = (THINK, END_THINK)[: len(self.student_tags)] + (CALL, END_CALL)[: len(calls[0])]
        self.student_marks = dict(zip((*self.student_tags, *calls[0]), units, strict=True))
        self.judge_marks = dict(zip((*self.judge_tags, *calls[1]), units, strict=True))
        pairs = zip(self.student_marks, self.judge_marks, units, strict=True)
        self.unlike = {unit for own, other, unit in pairs if own != other}  # marks that the two spell differently

    def student_ends_at(self, ids: Collection[int]) -> None:
        """Which ids end the student's turns."""
        self.student_table = table_of(self.student).marked(dict.fromkeys(ids, END))
        self.student_unknown = [i for i, units in enumerate(self.student_table.units) if units == (UNKNOWN,)]

    def _end_of_turn(self) -> int | None:
        token = self.template.closing.token if self.template.source else None
        found = self.judge.eos_token_id if token is None else self.judge.convert_tokens_to_ids(token)
        return None if found is None else int(found)  # type: ignore[arg-type]

    def _never_in_text(self) -> re.Pattern[str] | None:
        """The judge's words for what is no text: in a content they are words, and its tokenizer would not think so."""
        added = special_ids(self.judge) | set(self.judge.added_tokens_decoder)
        marked = (i for i in added if any(unit >= MARK for unit in self.judge_table.units[i]))
        words = {str(self.judge.convert_ids_to_tokens(i)) for i in marked} - {""}
        return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True)))) if words else None

    @property
    def classes(self) -> tuple[Tensor, Tensor, Tensor]:
        """What both sides can tell a next token to be (:func:`~llmdistill.tokenization.classes.shared_classes`):
        the class of every id of the student, of the judge, and [K] whether it is the same token."""
        if self._classes is None or self._classes[0] is not self.student_table:
            own = self._with_tags(self.student_table, self.student_marks)
            other = self._with_tags(self.judge_table, self.judge_marks)
            special = special_ids(self.student), special_ids(self.judge)
            self._classes = self.student_table, shared_classes(own, other, special)
        return self._classes[1]

    def _with_tags(self, table: TokenTable, marks: dict[str, int]) -> TokenTable:
        ids = {table.ids_by_units.get(tuple(tag.encode())): unit for tag, unit in marks.items()}
        return table.marked({i: unit for i, unit in ids.items() if i is not None})

    @cached_property
    def lead(self) -> str:
        """What the judge's template writes between its generation prompt and an answer: a space, an empty thought."""
        if not self.template.source:
            return ""
        made = self.template.answered([{"role": "user", "content": "?"}], {"role": "assistant", "content": PROBE})
        return made.completion.partition(PROBE)[0]

    # ---------------------------------------------------------------- a round

    def __call__(self, rollout: Rollout, prompts: Sequence[Prompt], name: str) -> Retokenized:
        """The sequences of a rollout as the judge ``name`` reads them."""
        started = time.perf_counter()
        heads, tails, lasts, level = [], [], list[bool](), list[bool]()
        own, other = list[tuple[Tensor, Tensor]](), list[tuple[Tensor, Tensor]]()
        shares, chunks = Shares(), 0
        before = rollout.attention_mask.long().argmax(1).tolist()
        ends = [a + n for a, n in zip(before, rollout.attention_mask.sum(1).tolist(), strict=True)]
        for ids, mask, prompt, start, stop in zip(
            rollout.input_ids.cpu(), rollout.completion_mask.cpu(), prompts, before, ends, strict=True
        ):
            reading = prompt.readings.get(name)
            first = start + (len(prompt.ids) if reading is not None else 0)  # of a document every token is content
            content, counted = ids[first:stop].numpy(), mask[first:stop].numpy()
            thinking = bool(self.student_tags) and prompt.text.rstrip().endswith(self.student_tags[0])
            written = self.sequence(content, counted, reading, predicted=first > start, thinking=thinking)
            heads.append(written.head)
            tails.append(written.tail)
            numbers = torch.full((len(ids),), -1, dtype=torch.int64)
            numbers[first:stop] = torch.from_numpy(written.student_chunks)
            own.append(_rows(numbers, mask, chunks))
            judged = torch.cat([torch.full((len(written.head),), -1), torch.from_numpy(written.judge_chunks)])
            other.append(_rows(judged, torch.arange(len(judged)) >= len(written.head), chunks))
            chunks += written.count
            lasts += [False] * (written.count - 1) + [True] * (written.count > 0)
            level += written.level
            shares.add(written.shares)
        read = collate(heads, tails, pad_id=self.pad_id, domain=rollout.domain, policy_version=rollout.policy_version)
        (student, student_before), (judge, judge_before) = (map(torch.cat, zip(*x, strict=True)) for x in (own, other))
        lasts_C, level_C = (torch.tensor(flags, dtype=torch.bool) for flags in (lasts, level))
        shares.seconds = time.perf_counter() - started
        return Retokenized(read, student, judge, student_before, judge_before, lasts_C, level_C, shares)

    def sequence(
        self, ids: np.ndarray, counted: np.ndarray, reading: Reading | None, *, predicted: bool, thinking: bool = False
    ) -> Written:
        """One sequence.

        Args:
            counted: which ids the loss trains on.
            predicted: something stands before them.
            thinking: the student's prompt has opened a thought.
        """
        spelled = _known(spell(ids, self.student_table))
        marks = np.flatnonzero(spelled.units >= MARK)
        content = spelled.units[: marks[0]] if len(marks) else spelled.units
        closed = bool(len(marks)) and spelled.units[marks[0]] == END and marks[0] == len(spelled.units) - 1
        raw = content.astype(np.uint8).tobytes()
        shares = _trained_on(spelled, counted)
        if missed := int((counted & np.isin(ids, self.student_unknown)).sum()):  # at least a byte each
            shares.bytes += missed
            shares.reasons[f"the student's tokenizer has no token for what comes after {_shown(raw)}"] += 1
        head, tail, front = self._tokens(self._in_judges_tags(raw), reading, thinking)
        if closed and self.end is not None:
            tail = [*tail, self.end]
        judged = spell(tail, self.judge_table, whole=True)
        astride = front > 0 and 2 * front not in judged.ends  # a token begins in the template and ends in the content
        judged = behind_front(judged, front)
        skip = int((judged.ends <= 0).sum())  # tokens of the template alone
        head, tail = [*head, *tail[:skip]], tail[skip:]
        judged = Spelling(judged.units, judged.ends[skip:])
        if closed and self.end is None:  # what the judge cannot say is in no chunk
            spelled = Spelling(spelled.units[:-1], spelled.ends[:-1])
        marked = self._marked(spelled, self.student_marks)
        found = align(marked, self._marked(judged, self.judge_marks))
        own, other = (np.full(n, -1, dtype=np.int64) for n in (len(ids), len(tail)))
        shares.template_tokens = len(head)
        if len(marks) and not closed and found.reason:
            shares.reasons[f"the student's tokens end the turn, or are no text, within it: after {_shown(raw)}"] += 1
        elif found.reason:
            shares.reasons[found.reason] += 1
        if not found.aligned and len(ids):
            return Written(head, tail, own, other, [], shares)
        shares.aligned_sequences = shares.sequences
        shares.inexact_sequences = shares.sequences * int(not found.exact)
        put_before = len(spell(ids, self.student_table, whole=True).units) > len(spell(ids, self.student_table).units)
        starts = [np.concatenate([[0], stops])[: len(stops)] for stops in (found.student_ends, found.teacher_ends)]
        sizes = found.student_ends - starts[0], found.teacher_ends - starts[1]
        # Neither what the loss leaves out nor what nothing stands before.
        known = _within(counted, starts[0], found.student_ends) == sizes[0]
        known &= ((starts[0] > 0) | predicted) & ((starts[1] > 0) | bool(head))
        numbers = np.where(known, np.cumsum(known) - 1, -1)
        own[: sizes[0].sum()], other[: sizes[1].sum()] = np.repeat(numbers, sizes[0]), np.repeat(numbers, sizes[1])
        stops = np.concatenate([[0], spelled.ends // 2])
        first, last = stops[starts[0][known]], stops[found.student_ends[known]]
        shares.chunks = int(known.sum())
        shares.single = int(((sizes[0] == 1) & (sizes[1] == 1))[known].sum())
        shares.chunk_tokens = int(sizes[0][known].sum())
        shares.aligned_bytes = int(_within(spelled.units < MARK, first, last).sum())
        shares.aligned_digits = int(_within(_are_digits(spelled.units), first, last).sum())
        shares.aligned_ends = int((_within(spelled.units == END, first, last) > 0).sum())
        shifted = (starts[0] == 0) & (put_before or astride)
        level = found.exact & ~shifted & ~self._are_tags(marked, starts[0], found.student_ends)
        return Written(head, tail, own, other, level[known].tolist(), shares)

    # ---------------------------------------------------------------- the judge's tokens

    def _tokens(self, raw: bytes, reading: Reading | None, thinking: bool) -> tuple[list[int], list[int], int]:
        """Ids of the prompt, ids of the content, and how many units of these are the template's."""
        if reading is None:  # a document: it begins with what the tokenizer puts in front
            head, prompt, chat, lead = text_ids(self.judge, "", special=True), "", True, b""
        else:
            head, prompt, chat = list(reading.ids), reading.text, reading.chat
            lead = self._lead(raw, prompt, thinking).encode() if chat else b""
        tail = self._ids(prompt, head, lead + raw, special=not chat)
        units = spell(tail, self.judge_table, whole=True).units
        text = units[units < MARK].astype(np.uint8).tobytes()
        put_before = int(text == b" " + lead + raw and bool(self.judge_table.prefix))
        return head, tail, (len(lead) if text[put_before:].startswith(lead) else 0) + put_before

    def _lead(self, raw: bytes, prompt: str, thinking: bool) -> str:
        """What stands between the judge's generation prompt and the content."""
        opened = any(prompt.rstrip().endswith(tag) for tag, _ in THINK_TAGS)
        if thinking:
            return f"{self.judge_tags[0]}\n" if self.judge_tags and not opened else ""
        if self.judge_thinks and raw.lstrip().startswith(self.judge_tags[0].encode()):
            return ""
        return f"{self.judge_tags[1]}\n\n" if self.judge_tags and opened else self.lead

    def _ids(self, prompt: str, prompt_ids: list[int], raw: bytes, *, special: bool) -> list[int]:
        """Ids of bytes behind a prompt. What is no text goes byte by byte, where the vocabulary has bytes."""
        ids = list[int]()
        for piece in _pieces(raw, self.unwritten):
            if isinstance(piece, bytes):
                ids += self._spelt_out(piece)
            elif prompt and not ids:
                ids += behind(self.judge, prompt, prompt_ids, piece, special=special)[0]
            else:
                ids += inner(self.judge, piece)[1] if ids else text_ids(self.judge, piece, special=False)
        return ids

    def _spelt_out(self, raw: bytes) -> list[int]:
        """Ids of bytes one by one; the unknown token for a byte that the vocabulary has not."""
        unknown = self.judge.unk_token_id
        single = (self.judge_table.byte_ids[b] for b in raw)
        return [i if i is not None else unknown for i in single if i is not None or unknown is not None]

    def _are_tags(self, marked: Spelling, starts: Ends, stops: Ends) -> NDArray[np.bool_]:
        """Of stretches of tokens, which spell a tag that the judge spells in another way, [C]."""
        places = np.concatenate([[0], marked.ends // 2])
        return _within(np.isin(marked.units, sorted(self.unlike)), places[starts], places[stops]) > 0

    def _in_judges_tags(self, raw: bytes) -> bytes:
        for own, other in zip(self.student_marks, self.judge_marks, strict=True):
            raw = raw.replace(own.encode(), other.encode())
        return raw

    def _marked(self, spelling: Spelling, marks: dict[str, int]) -> Spelling:
        unlike = {tag.encode(): unit for tag, unit in marks.items() if unit in self.unlike}
        return substituted(spelling, unlike) if unlike else spelling


@dataclass(frozen=True, eq=False)
class Written:
    """One sequence in the judge's tokens, and its chunks."""

    head: list[int]
    tail: list[int]
    student_chunks: np.ndarray  # [tokens of the student's content]
    judge_chunks: np.ndarray  # [tail]
    level: list[bool]  # of the chunks
    shares: Shares

    @property
    def count(self) -> int:
        return len(self.level)


def _trained_on(spelled: Spelling, counted: np.ndarray) -> Shares:
    """What there is to align of a sequence: of the tokens that the loss trains on. Others are no loss to anybody."""
    stops = spelled.ends // 2
    lengths = np.diff(np.concatenate([[0], stops]))
    units = spelled.units[np.repeat(counted[: len(stops)], lengths)]
    trained = int(counted.sum())
    return Shares(
        bytes=int((units < MARK).sum()),
        sequences=int(trained > 0),
        digits=int(_are_digits(units).sum()),
        tokens=trained,
        ends=int(END in units),
    )


def _are_digits(units: Units) -> NDArray[np.bool_]:
    return (units >= ord("0")) & (units <= ord("9"))


def _within(flags: NDArray[np.bool_], starts: Ends, stops: Ends) -> NDArray[np.int64]:
    """How many flags are up in every stretch, [C]."""
    before = np.concatenate([[0], np.cumsum(flags)])
    return before[stops] - before[starts]


def _known(spelling: Spelling) -> Spelling:
    """Up to the first token that spells nothing known: one that a head has a column for, and a vocabulary no word."""
    unknown = np.flatnonzero(spelling.units == UNKNOWN)
    if not len(unknown):
        return spelling
    tokens = int(np.searchsorted(spelling.ends, 2 * unknown[0], side="right"))
    return Spelling(spelling.units[: unknown[0]], spelling.ends[:tokens])


def _rows(chunks_T: Tensor, counted_T: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Chunks of the counted tokens of a sequence, and those that end just before them, numbered from ``first``."""
    chunks_T = torch.where(chunks_T >= 0, chunks_T + first, -1)
    before_T = torch.where(chunks_T[:-1] == chunks_T[1:], -1, chunks_T[:-1])
    return chunks_T[1:][counted_T[1:]], before_T[counted_T[1:]]


def _pieces(raw: bytes, unwritten: re.Pattern[str] | None) -> list[str | bytes]:
    """Stretches of text, and of bytes that are none or that the judge's tokenizer would not read as text."""
    pieces, text, at = list[str | bytes](), raw.decode("utf-8", "surrogateescape"), 0
    words = f"|{unwritten.pattern}" if unwritten else ""
    for found in re.finditer(f"[\udc80-\udcff]+{words}", text):
        if found.start() > at:
            pieces.append(text[at : found.start()])
        pieces.append(found[0].encode("utf-8", "surrogateescape"))
        at = found.end()
    return [*pieces, text[at:]] if at < len(text) else pieces


def _shown(raw: bytes) -> str:
    return repr(raw[-SHOWN:].decode("utf-8", "replace"))
