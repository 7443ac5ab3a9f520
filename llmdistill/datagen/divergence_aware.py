"""Statistics of traces by sentence: the teacher's side is in the row, the student reads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llmdistill.datagen.sentences import Scale, Statistics, sentence_logprobs, statistics
from llmdistill.datagen.student import Student
from llmdistill.tokenization.token_bytes import MARK, TokenTable, table_of

Row = Mapping[str, Any]


def trace_statistics(
    rows: Iterable[tuple[int, Row]],
    student: Student,
    teacher: PreTrainedTokenizerBase,
    *,
    margin: float = 0.1,
    scale: Scale = "probability",
) -> Iterator[tuple[int, Statistics | str]]:
    """(number, statistics of the trace's sentences, or in a few words why there are none), in some order.

    Args:
        rows: numbered traces with ``token_ids`` and ``logprobs``.
        teacher: the tokenizer of their ``token_ids``.
        margin, scale: as :func:`llmdistill.datagen.sentences.statistics`.
    """
    table = table_of(teacher)
    unread = list[tuple[int, str]]()
    waiting = deque[tuple[int, str, list[float]]]()

    def readable() -> Iterator[Row]:
        for number, row in rows:
            side = _teacher_side(row, table)
            if isinstance(side, str):
                unread.append((number, side))
            else:
                waiting.append((number, str(row["completion"]), side))
                yield row

    for read in student.read(readable()):
        number, text, theirs = waiting.popleft()
        ours = sentence_logprobs(text, read.offsets, read.logprobs)
        yield number, statistics(theirs, ours, margin=margin, scale=scale)
    yield from unread


def _teacher_side(row: Row, table: TokenTable) -> list[float] | str:
    """The teacher's mean log-prob of each sentence, or why it is not known."""
    ids, logprobs, text = row.get("token_ids"), row.get("logprobs"), str(row["completion"])
    if not ids or not logprobs:
        return "no log-probs of its tokens"
    sampling = row.get("sampling") or {}
    drawn_from_model = (sampling.get("temperature"), sampling.get("top_p"), sampling.get("top_k")) == (1.0, 1.0, 0)
    if row.get("logprobs_of") != "model" and not drawn_from_model:
        return "log-probs of another distribution than the model's"
    if max(ids) >= len(table.units):
        return "tokens of another vocabulary"
    units = [table.units[i] for i in ids]
    spelled = bytes(u for token in units for u in token if u < MARK)
    front = len(spelled) - len(spelled.lstrip(b" ")) if table.prefix else 0
    if spelled[front:].strip() != text.encode("utf-8", "replace").strip():
        return "its tokens do not spell its text"
    return sentence_logprobs(text, _characters(text, units, spelled), logprobs)


def _characters(text: str, units: list[tuple[int, ...]], spelled: bytes) -> list[tuple[int, int]]:
    """(start, end) in characters of the text of each token; what is no text is empty."""
    raw = text.encode("utf-8", "replace")
    shift = spelled.index(raw.strip()) - raw.index(raw.strip())  # blanks that only one of the two has
    ends = np.cumsum([sum(u < MARK for u in token) for token in units])
    starts = np.concatenate(([0], ends[:-1]))
    # the character of each byte (it begins with one that is no continuation), and the end
    character = [*(np.cumsum([byte & 0xC0 != 0x80 for byte in raw]) - 1).tolist(), len(text)]
    at = np.clip(np.stack([starts, ends]) - shift, 0, len(raw)).T.tolist()
    return [(character[a], character[b - 1] + 1 if b > a else character[a]) for a, b in at]
