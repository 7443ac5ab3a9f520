"""A teacher behind the service: the same evidence as an embedded one, from another process, machine or several.

The weights that answer first are the teacher of the run. Whenever others answer, the run stops.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmdistill.errors import UserError
from llmdistill.rollouts.asking import pack, sample
from llmdistill.rollouts.remote import service_info
from llmdistill.teachers.base import TeacherInfo
from llmdistill.texts import Prompt, Rollout, Sampling
from llmdistill.tokenization import special
from llmdistill.wire.blocks import BlockHeader, ScoreBlock, decode
from llmdistill.wire.bodies import chosen_bits, chosen_bytes, pack_sequences
from llmdistill.wire.listing import columns, support_of
from llmdistill.wire.protocol import BLOCKS_TYPE, IDS_TYPE, INFO, SCORE, SCORE_TEXT
from llmdistill.wire.reading import BlockReader
from llmdistill.wire.transport import Get, Refused, Request, Transport, json_object

T = TypeVar("T")
REQUESTS_PER_REPLICA = 2  # one is computed while the other is on its way
FRAME_BYTES, PIECE_BYTES = 512, 12  # of a body, beside ids: for the request, and for each sequence
BLOCK_BYTES, ROW_BYTES = 1024, 9  # of an answer, beside what is listed: for each block, and for each of its rows
HEAD_BYTES = 1 << 16  # and for the rest of it
# of an answer to a text, for each of its tokens: its id and its place, as JSON
TEXT_TOKEN_BYTES = 40


@dataclass(frozen=True)
class ScoredText:
    """A completion as the teacher's tokens, and what it says about them."""

    prompt_ids: list[int]
    ids: list[int]
    offsets: list[tuple[int, int]]  # first and last + 1 character of the completion, of every id
    block: ScoreBlock


@dataclass(frozen=True)
class Piece:
    """Counted span of one sequence, or a part of it where it is longer than a request may be."""

    sequence: int
    start: int  # among the real tokens
    stop: int
    ids: NDArray[np.int32]
    chosen: NDArray[np.int32] | None  # [stop - start, C]
    vocab_size: int

    def costs(self) -> tuple[int, int, int, int]:
        """Sequences, positions, bytes and tokens."""
        rows = self.stop - self.start
        listed = 0 if self.chosen is None else chosen_bytes(rows, self.chosen.shape[1], self.vocab_size)
        return 1, rows, 4 * len(self.ids) + listed + PIECE_BYTES, len(self.ids)


class RemoteTeacher:
    """Implements :class:`~llmdistill.teachers.base.Teacher` over one or several replicas of the service.

    Args:
        url: of the service; several replicas, as a list or with commas, have to hold the same weights.
        lossless: log-probs come as float32; else in 16 bits each (:mod:`llmdistill.wire.packing`).
        tokenizer: of the teacher, where its padding id is to be used; any valid id does.
        options: of :class:`~llmdistill.wire.transport.Transport`.

    Raises:
        UserError: no service there within ``max_outage_s``, or replicas with different weights.
    """

    live = True  # answers come from a model, not from what was stored

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        token: str | None = None,
        timeout_s: float = 120.0,
        max_outage_s: float = 3600.0,
        in_flight: int = 8,
        lossless: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ) -> None:
        self.dtype = "float32" if lossless else "float16"
        self.tokenizer = tokenizer
        self._pinned = threading.Lock()
        self._info: TeacherInfo | None = None
        self._limits: dict[str, int] = {}
        self.scores_chosen = True
        self.transport = Transport(
            url,
            token=token,
            admit=self._admit,
            timeout_s=timeout_s,
            max_outage_s=max_outage_s,
            in_flight=in_flight,
            **options,
        )
        try:
            self.transport.wait_ready()
        except BaseException:
            self.close()
            raise

    @property
    def bytes_received(self) -> int:
        """Of evidence and completions so far, as they came over the wire."""
        return self.transport.counters.bytes_received

    @property
    def max_top_k(self) -> int:
        """Tokens a position that every replica lists, those of the caller's choice included."""
        return self._limits["top_k"]

    def info(self) -> TeacherInfo:
        assert self._info is not None
        return self._info

    def score(self, rollout: Rollout, top_k: int, chosen: Tensor | None = None) -> list[ScoreBlock]:
        """One block per sequence, in the order of the rollout.

        Raises:
            UserError: more listed tokens than the service allows, a sequence that is too long for it, ``chosen`` where
                its engine cannot, or other weights than those of the start.
        """
        rollout, width = rollout.to("cpu"), self._width(top_k, chosen)
        pieces = self._pieces(rollout, chosen)
        order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i].ids))  # what is left at the end is short
        tokens = sum(len(piece.ids) for piece in pieces)
        costs = [pieces[i].costs() for i in order]
        groups = [[order[j] for j in group] for group in pack(costs, self._room(tokens, FRAME_BYTES))]
        answers = self._send([self._scoring([pieces[i] for i in g], top_k, width) for g in groups])
        blocks = {i: block for g, found in zip(groups, answers, strict=True) for i, block in zip(g, found, strict=True)}
        parts: list[list[ScoreBlock]] = [[] for _ in range(len(rollout))]
        for i, piece in enumerate(pieces):
            parts[piece.sequence].append(blocks[i])
        info = self.info()
        empty = BlockHeader(
            info.fingerprint,
            info.tokenizer,
            width,
            info.vocab_size,
            dtype=self.dtype,
            support=support_of(top_k, chosen),
        )
        return [_joined(found, mask, empty) for found, mask in zip(parts, rollout.completion_mask, strict=True)]

    def score_text(
        self,
        items: Sequence[tuple[str | list[dict[str, Any]], str]],
        top_k: int,
        *,
        tools: Sequence[list[dict[str, Any]] | None] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[ScoredText]:
        """What the teacher says about texts, in its own tokens: for students with another vocabulary.

        Args:
            items: (prompt, completion); a prompt that is a list of chat messages gets the teacher's template.
            tools: of every item, for the template; None: of none.
            chat_template_kwargs: what the template reads beside them.

        Raises:
            UserError: as :meth:`score`; a text that the service cannot tokenise.
        """
        self._width(top_k, None)
        texts = [
            json.dumps({"prompt": prompt, "completion": completion, **({"tools": given} if given else {})})
            for (prompt, completion), given in zip(items, tools or [None] * len(items), strict=True)
        ]
        # a token is at least a byte of text
        costs = [(1, len(item[1].encode()), len(text) + 2, len(text)) for item, text in zip(items, texts, strict=True)]
        kwargs = {"chat_template_kwargs": dict(chat_template_kwargs)} if chat_template_kwargs else {}
        rest = json.dumps({"top_k": top_k, "dtype": self.dtype, "teacher": self.info().fingerprint, **kwargs})
        room = self._room(sum(map(len, texts)), len(rest) + 16)
        groups = pack(costs, (*room[:2], min(room[2], self._limits["json_bytes"] - len(rest) - 16), room[3]))
        requests = []
        for group in groups:
            body = f'{{"items": [{", ".join(texts[i] for i in group)}], {rest[1:]}'
            completions = [items[i][1] for i in group]
            reader = self._reader(_scored_texts_of(completions, self.info().vocab_size), top_k)
            # a token is at least a byte of text, and special ones beside it
            tokens = len(body.encode()) + 64 * len(group)
            most = HEAD_BYTES + TEXT_TOKEN_BYTES * tokens + self._evidence_bytes(len(group), tokens, top_k)
            asked = Request(SCORE_TEXT, reader=reader, body=body.encode(), answer_type=BLOCKS_TYPE, max_bytes=most)
            requests.append(asked)
        return [text for answer in self._send(requests) for text in answer]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        """Completions of every prompt, drawn as one call would draw them however they are split over replicas.

        Raises:
            UserError: no room for ``max_new_tokens``, or other weights than those of the start.
        """
        info = self.info()
        pad = special.pad_id(self.tokenizer) if self.tokenizer is not None else next(iter(info.eos_ids), 0)
        try:
            return sample(
                self.transport,
                prompts,
                sampling,
                limits=self._limits,
                vocab_size=info.vocab_size,
                pad_id=pad,
                teacher=info.fingerprint,
            )
        except Refused as refusal:
            self._explain(refusal)

    def close(self) -> None:
        self.transport.close()

    def _admit(self, get: Get) -> None:
        """Pins the weights at the first replica and compares every later one with them."""
        found = service_info(get, "teacher")
        limits = {name: int(value) for name, value in found["limits"].items()}
        info = TeacherInfo(
            name=found["name"],
            fingerprint=found["teacher"],
            tokenizer=found["tokenizer"],
            vocab_size=int(found["vocab_size"]),
            eos_ids=tuple(found["eos_ids"]),
            context_length=int(found["context_length"]),
            template=found["template"],
        )
        with self._pinned:
            if self._info is None:
                self._info, self._limits = info, limits
            else:
                self._same(info.fingerprint, info.tokenizer)
                self._limits = {name: min(value, limits[name]) for name, value in self._limits.items()}
            self.scores_chosen = self.scores_chosen and bool(found["chosen_ids"])

    def _same(self, fingerprint: str, tokenizer: str) -> None:
        info = self.info()
        if (fingerprint, tokenizer) != (info.fingerprint, info.tokenizer):
            what, own, other = ("weights", info.fingerprint, fingerprint)
            if fingerprint == info.fingerprint:
                what, own, other = "tokenizer", info.tokenizer, tokenizer
            raise UserError(
                f"teacher {', '.join(self.transport.urls)}: the service restarted with other weights, or its replicas "
                f"differ: {what} {other}, this run began with {own}. "
                f"Fix: serve one checkpoint everywhere, then --resume."
            )

    def _send(self, requests: Sequence[Request[T]]) -> list[T]:
        try:
            return self.transport.send_all(requests)
        except Refused as refusal:
            self._explain(refusal)

    def _explain(self, refusal: Refused) -> NoReturn:
        """A conflict becomes the message that names both fingerprints."""
        if refusal.status == 409:
            found = self.transport.send(Request(INFO, json_object, method="GET"))
            self._same(found["teacher"], found["tokenizer"])
        raise refusal

    def _width(self, top_k: int, chosen: Tensor | None) -> int:
        """Columns of the blocks, if the service lists that many."""
        info, limit = self.info(), self._limits["top_k"]
        if top_k > info.vocab_size:
            raise UserError(
                f"objective.top_k is {top_k}; the teacher has {info.vocab_size} logit columns. "
                f"Fix: at most {info.vocab_size}."
            )
        if chosen is not None and not self.scores_chosen:
            raise UserError(
                "objective.support asks for ids of the student's choice; the teacher's service cannot score them. "
                "Fix: serve it with an engine that can (hf), or use the teacher's own top-k."
            )
        asked = top_k + (0 if chosen is None else chosen.shape[1])
        if asked > limit:
            own = "" if chosen is None else f" and {asked - top_k} ids of the student's choice"
            raise UserError(
                f"objective.top_k is {top_k}{own}; the service at {self.transport.urls[0]} lists at most {limit} "
                f"tokens a position. Fix: lower it, or raise the service's limit."
            )
        return columns(top_k, chosen, info.vocab_size)

    def _pieces(self, rollout: Rollout, chosen: Tensor | None) -> list[Piece]:
        """Spans to ask for. Sequences without counted tokens have none."""
        most, vocab = max(self._limits["positions"], 1), self.info().vocab_size
        rows = chosen.split(rollout.row_counts) if chosen is not None else None
        pieces = []
        for b, (ids_T, real_T, mask_T) in enumerate(
            zip(rollout.input_ids, rollout.attention_mask, rollout.completion_mask, strict=True)
        ):
            ids = ids_T[real_T].numpy().astype(np.int32)
            at = counted(mask_T)[real_T].nonzero().flatten().numpy()
            if not len(at):
                continue
            if len(ids) > self._limits["sequence_tokens"]:
                raise UserError(
                    f"a sequence has {len(ids)} tokens; the service at {self.transport.urls[0]} holds "
                    f"{self._limits['sequence_tokens']}. Fix: lower data.max_prompt_tokens or rollouts.max_new_tokens."
                )
            start, stop, step, table = int(at[0]), int(at[-1]) + 1, most, None
            if rows is not None:  # their part of the body has a bound too
                table = np.full((stop - start, rows[b].shape[1]), -1, np.int32)
                table[at - start] = rows[b].numpy()
                space = self._limits["body_bytes"] - FRAME_BYTES - PIECE_BYTES - 4 * len(ids)
                step = max(1, min(most, 8 * space // max(table.shape[1] * chosen_bits(vocab), 1)))
            for first in range(start, stop, step):
                last = min(first + step, stop)
                own = None if table is None else table[first - start : last - start]
                pieces.append(Piece(b, first, last, ids, own, vocab))
        return pieces

    def _room(self, tokens: int, rest: int) -> tuple[int, int, int, int]:
        """Sequences, positions, bytes and tokens of a request."""
        wanted = min(self.transport.in_flight, REQUESTS_PER_REPLICA * len(self.transport.replicas()))
        limits = self._limits
        return limits["sequences"], limits["positions"], limits["body_bytes"] - rest, -(-tokens // max(wanted, 1))

    def _scoring(self, pieces: list[Piece], top_k: int, width: int) -> Request[list[ScoreBlock]]:
        info = self.info()
        settings = {"top_k": top_k, "dtype": self.dtype, "teacher": info.fingerprint}
        chosen = None if pieces[0].chosen is None else [p.chosen for p in pieces if p.chosen is not None]
        spans = [(p.start, p.stop) for p in pieces]
        body = pack_sequences(settings, [p.ids for p in pieces], spans, chosen, info.vocab_size)
        expected = [slice(*span) for span in spans]

        def parse(head: dict[str, Any], blocks: list[ScoreBlock]) -> list[ScoreBlock]:
            found = [block.positions for block in blocks]
            if found != expected:
                raise ValueError(f"blocks of the positions {found[:3]}..., asked for {expected[:3]}...")
            return blocks

        rows = sum(p.stop - p.start for p in pieces)
        return Request(
            SCORE,
            reader=self._reader(parse, width),
            body=body,
            body_type=IDS_TYPE,
            answer_type=BLOCKS_TYPE,
            max_bytes=HEAD_BYTES + self._evidence_bytes(len(pieces), rows, width),
        )

    def _evidence_bytes(self, blocks: int, rows: int, width: int) -> int:
        """The most that so many rows of so many columns are encoded: 4 bytes an id, 4 a log-prob."""
        return blocks * BLOCK_BYTES + rows * (ROW_BYTES + 8 * width)

    def _reader(
        self, parse: Callable[[dict[str, Any], list[ScoreBlock]], T], width: int
    ) -> Callable[[], BlockReader[ScoreBlock, T]]:
        """Reads blocks of ``width`` columns, and of nothing else than what was asked for."""
        vocab = self.info().vocab_size

        def head(found: dict[str, Any]) -> None:
            self._same(found["teacher"], found["tokenizer"])

        def block(found: ScoreBlock) -> None:
            self._same(found.header.teacher, found.header.tokenizer)
            listed = (found.header.top_k, found.header.vocab_size)
            if listed != (width, vocab):
                raise ValueError(f"a block of K = {listed[0]} and V = {listed[1]}; asked for {width} of {vocab}")
            if len(found.token_logprobs) != found.positions.stop - found.positions.start:
                raise ValueError(f"a block of {len(found.token_logprobs)} rows for {found.positions}")

        return lambda: BlockReader(head, block, parse, lambda frame: decode(frame, max_bytes=4 * len(frame) + 64))


def counted(mask_T: Tensor) -> Tensor:
    """Marks that have a token before them; those of one sequence, as ``Rollout.token_rows`` counts them."""
    counted_T = mask_T.clone()
    counted_T[:1] = False
    return counted_T


def _joined(parts: list[ScoreBlock], mask_T: Tensor, empty: BlockHeader) -> ScoreBlock:
    """The parts of one sequence as one block of its counted rows."""
    at = counted(mask_T).nonzero().flatten()
    if not parts:
        rows = (torch.zeros(0), torch.zeros(0, empty.top_k, dtype=torch.int32), torch.zeros(0, empty.top_k))
        return ScoreBlock(slice(0, 0), *rows, empty)
    positions, names = slice(int(at[0]), int(at[-1]) + 1), ("token_logprobs", "topk_ids", "topk_logprobs")
    columns = [[getattr(part, name) for part in parts] for name in names]
    token, ids, logprobs = (found[0] if len(found) == 1 else torch.cat(found) for found in columns)
    if len(at) < len(token):  # tokens between do not count
        keep = at - at[0]
        token, ids, logprobs = token[keep], ids[keep], logprobs[keep]
    return ScoreBlock(positions, token, ids, logprobs, parts[0].header)


def _scored_texts_of(
    completions: Sequence[str], vocab_size: int
) -> Callable[[dict[str, Any], list[ScoreBlock]], list[ScoredText]]:
    def parse(head: dict[str, Any], blocks: list[ScoreBlock]) -> list[ScoredText]:
        items = head["items"]
        if not len(items) == len(blocks) == len(completions):
            raise ValueError(f"{len(items)} items and {len(blocks)} blocks for {len(completions)} texts")
        made = []
        for text, item, block in zip(completions, items, blocks, strict=True):
            if not len(item["ids"]) == len(item["offsets"]) == len(block.token_logprobs):
                raise ValueError(f"{len(item['ids'])} ids of a text, {len(block.token_logprobs)} scored")
            ids = [*item["prompt_ids"], *item["ids"]]
            if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
                raise ValueError(f"a text has ids outside 0 to {vocab_size - 1}")
            offsets = [(int(a), int(b)) for a, b in item["offsets"]]
            if not all(0 <= a <= b <= len(text) for a, b in offsets):
                raise ValueError(f"a token lies outside its text of {len(text)} characters")
            made.append(ScoredText(item["prompt_ids"], item["ids"], offsets, block))
        return made

    return parse
