"""Answers of the OpenAI protocols token by token: text as soon as it is certain, its tokens and log-probs with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmdistill.service.engine import Engine, GenerateJob, Sample, ScoreJob, cancelling
from llmdistill.service.parts import Parts
from llmdistill.wire.blocks import ScoreBlock

Row = list[tuple[int, float]]  # listed ids of a position with their log-probs, likeliest first
IMPOSSIBLE = -9999.0  # the log-prob of what cannot be: JSON has no infinity, and this is what others write

PARTIAL = "\ufffd"  # at the end of a text: a character of which a part is still to come


class TextSoFar:
    """The text of a completion while it grows: what :meth:`new` has given out stays as it is.

    Held back are parts of characters, blanks at the end (some tokenizers take them away again), and whatever may turn
    out to be the beginning of a stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.ids: list[int] = []
        self.text = self.given = ""
        self._from = self._read = 0  # ids whose text is decoded again as the context of what follows, and those read

    def new(self, ids: Sequence[int]) -> str:
        """What is certain now that these tokens follow."""
        self.ids += ids
        before, after = (self._decoded(self.ids[self._from : end]) for end in (self._read, None))
        if len(after) > len(before) and not after.endswith(PARTIAL):
            self.text += after[len(before) :]
            self._from, self._read = self._read, len(self.ids)
        return self._give(self.text[: self._certain()])

    def rest(self, text: str) -> str:
        """What is left of the whole ``text``."""
        return self._give(text)

    def _give(self, text: str) -> str:
        if not text.startswith(self.given):
            return ""
        new, self.given = text[len(self.given) :], text
        return new

    def _certain(self) -> int:
        """Characters that nothing to come can change."""
        cut = [at for stop in self.stops if (at := self.text.find(stop)) >= 0]
        if cut:
            return min(cut)
        end = len(self.text.rstrip())
        for stop in self.stops:
            for length in range(min(len(stop) - 1, len(self.text)), 0, -1):
                if self.text.endswith(stop[:length]):
                    end = min(end, len(self.text) - length)
                    break
        return max(end, len(self.given))

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


@dataclass(frozen=True)
class Piece:
    """What a choice has more of: text, and the tokens that came since the last one (not always those of the text)."""

    index: int
    text: str
    ids: list[int]
    logprobs: list[float]
    first: bool
    finish: str | None = None
    rows: list[Row] | None = None


class TokenEvents:
    """Writes server-sent events into ``parts`` as tokens are sampled.

    Args:
        chunks: of the protocol, for a piece.
        whole_text: what a finished sample says, and why it ends.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[str],
        count: int,
        parts: Parts,
        head: dict[str, Any],
        chunks: Callable[[Piece], Iterable[dict[str, Any]]],
        whole_text: Callable[[Sample], tuple[str, str]],
    ) -> None:
        self.parts, self.head, self.chunks, self.whole_text = parts, head, chunks, whole_text
        self._texts = [TextSoFar(tokenizer, stops) for _ in range(count)]
        self._first = [True] * count
        self._sent = [0] * count  # tokens

    def sampled(
        self, index: int, ids: Sequence[int], logprobs: Sequence[float], rows: Sequence[Row] | None = None
    ) -> None:
        """All tokens of a sample so far."""
        known = len(self._texts[index].ids)
        if text := self._texts[index].new(list(ids[known:])):
            self._write(index, text, ids, logprobs, rows, None)

    def finished(self, samples: Sequence[Sample], rows: Sequence[Sequence[Row]] | None = None) -> None:
        """The rest of every choice."""
        for index, sample in enumerate(samples):
            text, finish = self.whole_text(sample)
            listed = None if rows is None else rows[index]
            self._write(index, self._texts[index].rest(text), sample.ids, sample.logprobs, listed, finish)

    def last(self, usage: dict[str, int] | None) -> None:
        if usage is not None:
            self._event({**self.head, "choices": [], "usage": usage})
        self.parts.write(b"data: [DONE]\n\n")

    def _write(
        self,
        index: int,
        text: str,
        ids: Sequence[int],
        logprobs: Sequence[float],
        rows: Sequence[Row] | None,
        finish: str | None,
    ) -> None:
        at, first = self._sent[index], self._first[index]
        self._sent[index], self._first[index] = len(ids), False
        listed = None if rows is None else list(rows[at:])
        piece = Piece(index, text, list(ids[at:]), list(logprobs[at:]), first, finish, listed)
        for choice in self.chunks(piece):
            self._event({**self.head, "choices": [choice]})

    def _event(self, chunk: dict[str, Any]) -> None:
        self.parts.write(f"data: {json.dumps(chunk)}\n\n".encode())


class Listing:
    """Lists of likeliest tokens beside samples that grow: what has come is scored, and what comes meanwhile is next.

    Args:
        listed: tokens at a position.
        events: told of tokens when they have their lists.
    """

    def __init__(self, engine: Engine, job: GenerateJob, listed: int, events: TokenEvents) -> None:
        self.engine, self.listed, self.events = engine, listed, events
        n = job.sampling.samples_per_prompt
        self._prompts = [prompt for prompt in job.prompts for _ in range(n)]
        self._ids: list[list[int]] = [[] for _ in self._prompts]
        self._logprobs: list[list[float]] = [[] for _ in self._prompts]
        self._rows: list[list[Row]] = [[] for _ in self._prompts]
        self._more = asyncio.Event()

    def sampled(self, index: int, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """All tokens of a sample so far; their log-probs are to come with the lists."""
        self._ids[index] = list(ids)
        self._more.set()

    async def beside(self, drawing: Coroutine[Any, Any, list[list[Sample]]]) -> list[list[Sample]]:
        """What ``drawing`` returns, when all of it has been listed and written."""
        async with cancelling() as group:
            task = group.create_task(drawing)
            task.add_done_callback(lambda _: self._more.set())
            while not task.done():
                await self._more.wait()
                self._more.clear()
                if not task.done():
                    await self._list()
            drawn = task.result()
            samples = [sample for of in drawn for sample in of]
            self._ids = [sample.ids for sample in samples]
            await self._list()
            own = (Sample(s.ids, lps, s.finish) for s, lps in zip(samples, self._logprobs, strict=True))
            self.events.finished(list(own), self._rows)
        return drawn

    async def _list(self) -> None:
        ids = list(self._ids)
        new = [i for i, rows in enumerate(self._rows) if len(ids[i]) > len(rows)]
        starts = [len(self._prompts[i]) + len(self._rows[i]) for i in new]
        whole = [self._prompts[i] + ids[i] for i in new]
        jobs = [ScoreJob(all_of, start, len(all_of), self.listed) for all_of, start in zip(whole, starts, strict=True)]
        for i, block in zip(new, await self.engine.score(jobs), strict=True):
            assert isinstance(block, ScoreBlock)
            self._rows[i] += rows_of(block)
            self._logprobs[i] += own_of(block)
            self.events.sampled(i, ids[i], self._logprobs[i], self._rows[i])


def rows_of(block: ScoreBlock) -> list[Row]:
    """The lists of every position."""
    return [
        [(i, finite(p)) for i, p in zip(ids, logprobs, strict=True) if i >= 0]
        for ids, logprobs in zip(block.topk_ids.tolist(), block.topk_logprobs.tolist(), strict=True)
    ]


def own_of(block: ScoreBlock) -> list[float]:
    """The log-probs of the tokens themselves."""
    return [finite(p) for p in block.token_logprobs.tolist()]


def finite(logprob: float) -> float:
    return max(logprob, IMPOSSIBLE)
