"""A teacher behind the service that sends hidden states: its whole distribution, for 2 or 1 bytes a column of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx
import torch
from torch import Tensor

from llmdistill.errors import UserError
from llmdistill.objectives.rows import HiddenRows
from llmdistill.rollouts.asking import pack
from llmdistill.teachers.heads import HeadInUse
from llmdistill.teachers.listing import blocks_of, refuse_wider
from llmdistill.teachers.remote import FRAME_BYTES, HEAD_BYTES, Piece, RemoteTeacher, counted
from llmdistill.texts import Rollout
from llmdistill.wire.blocks import ScoreBlock
from llmdistill.wire.bodies import pack_sequences
from llmdistill.wire.hidden import Form, HeadWeights, HiddenBlock, HiddenHeader, block_bytes, decode_hidden, unpack_head
from llmdistill.wire.protocol import BLOCKS_TYPE, HEAD, IDS_TYPE, INFO, SCORE, TENSORS_TYPE
from llmdistill.wire.reading import BlockReader
from llmdistill.wire.transport import Request, json_object


class HiddenRemoteTeacher(RemoteTeacher):
    """Implements :class:`~llmdistill.teachers.base.DenseTeacher` over the service; what is listed is computed here.

    Args:
        form: of the states on the wire: "bfloat16", or "int8" in groups of 64 columns.
        device: where rows, and the output head in float32, are put.
        options: of :class:`RemoteTeacher`.

    Raises:
        UserError: as :class:`RemoteTeacher`; a service that gives no hidden states.
    """

    def __init__(
        self, url: str | Sequence[str], *, form: Form, device: torch.device | str = "cpu", **options: Any
    ) -> None:
        super().__init__(url, **options)
        self.form: Form = form
        try:
            self.weights = self._fetched()
        except BaseException:
            self.close()
            raise
        self.head = HeadInUse(self.weights, device)
        self.scores_chosen = True

    @property
    def max_top_k(self) -> int:
        """All tokens."""
        return self.info().vocab_size

    def dense(self, rollout: Rollout) -> HiddenRows:
        """Rows of the counted tokens.

        Raises:
            UserError: a sequence that is too long for the service, or other weights than those of the start.
        """
        return self.head.rows([block.hidden for block in self.states(rollout)])

    def states(self, rollout: Rollout) -> list[HiddenBlock]:
        """One block per sequence, in the order of the rollout."""
        rollout = rollout.to("cpu")
        pieces = self._pieces(rollout, None)
        order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i].ids))
        room = self._room(sum(len(piece.ids) for piece in pieces), FRAME_BYTES)
        groups = [[order[j] for j in group] for group in pack([pieces[i].costs() for i in order], room)]
        answers = self._send([self._asking([pieces[i] for i in group]) for group in groups])
        found: dict[int, Tensor] = {}
        for group, blocks in zip(groups, answers, strict=True):
            found |= {i: block.hidden for i, block in zip(group, blocks, strict=True)}
        parts: list[list[Tensor]] = [[] for _ in range(len(rollout))]
        for i, piece in enumerate(pieces):
            parts[piece.sequence].append(found[i])
        made, header = [], self._header()
        for hidden, mask_T in zip(parts, rollout.completion_mask, strict=True):
            at = counted(mask_T).nonzero().flatten()
            rows = torch.cat(hidden)[at - at[0]] if hidden else torch.zeros(0, header.width)
            span = slice(int(at[0]), int(at[-1]) + 1) if hidden else slice(0, 0)
            made.append(HiddenBlock(span, rows, header))
        return made

    def score(self, rollout: Rollout, top_k: int, chosen: Tensor | None = None) -> list[ScoreBlock]:
        """One block per sequence, made here of the states."""
        refuse_wider(top_k, self.info().vocab_size)
        return blocks_of(self.dense(rollout), rollout, top_k, chosen, self.info())

    def _asking(self, pieces: list[Piece]) -> Request[list[HiddenBlock]]:
        settings = {"teacher": self.info().fingerprint, "hidden": self.form}
        spans = [(p.start, p.stop) for p in pieces]
        body = pack_sequences(settings, [p.ids for p in pieces], spans, None, self.info().vocab_size)
        width = self.head.linear.in_features
        most = sum(block_bytes(p.stop - p.start, width, self.form) for p in pieces)

        def parse(head: dict[str, Any], blocks: list[HiddenBlock]) -> list[HiddenBlock]:
            if [(b.positions.start, b.positions.stop) for b in blocks] != spans:
                raise ValueError(f"blocks of {[b.positions for b in blocks[:3]]}..., asked for {spans[:3]}...")
            if any(len(b.hidden) != b.positions.stop - b.positions.start for b in blocks):
                raise ValueError("a block with fewer rows than positions")
            return blocks

        def check(block: HiddenBlock) -> None:
            self._same(block.header.teacher, block.header.tokenizer)
            self.head.check(block, f"teacher {self.transport.urls[0]}")

        return Request(
            SCORE,
            reader=lambda: BlockReader(lambda h: self._same(h["teacher"], h["tokenizer"]), check, parse, decode_hidden),
            body=body,
            body_type=IDS_TYPE,
            answer_type=BLOCKS_TYPE,
            max_bytes=HEAD_BYTES + most,
        )

    def _fetched(self) -> HeadWeights:
        told = self.transport.send(Request(INFO, json_object, method="GET")).get("head")
        if not told:
            raise UserError(
                f"teacher.hidden is {self.form}; the service at {self.transport.urls[0]} gives no hidden states. Fix: "
                "serve it with --engine hf, or with vllm on a CPU without --updatable; or leave teacher.hidden out."
            )

        def parse(response: httpx.Response) -> HeadWeights:
            return unpack_head(response.content)

        most = int(told["bytes"]) + (1 << 16)
        return self.transport.send(Request(HEAD, parse, method="GET", answer_type=TENSORS_TYPE, max_bytes=most))

    def _header(self) -> HiddenHeader:
        info, head = self.info(), self.head
        width = head.linear.in_features
        return HiddenHeader(info.fingerprint, info.tokenizer, head.fingerprint, width, head.vocab_size, self.form)
