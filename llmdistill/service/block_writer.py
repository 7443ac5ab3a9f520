"""Score blocks on their way out: encoded on a thread, a share at a time, while others are still being worked out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from llmdistill.service.engine import Evidence
from llmdistill.service.parts import Parts
from llmdistill.wire.blocks import ScoreBlock, encode
from llmdistill.wire.hidden import encode_hidden
from llmdistill.wire.protocol import pack_frames

SHARE_CELLS = 1 << 18  # of listed tokens that are encoded in one go: some milliseconds, after which the loop has a turn


class BlockWriter:
    """Writes ``count`` blocks into ``parts``, in their order, the head before the first of them.

    Args:
        dtype: of the log-probs, as in :func:`~llmdistill.wire.blocks.encode`.
        head: the first frame; asked for when there is a first block.
    """

    def __init__(self, count: int, dtype: str, head: Callable[[], bytes], parts: Parts) -> None:
        self.count, self.dtype, self.head, self.parts = count, dtype, head, parts
        self._ready: dict[int, Evidence] = {}
        self._next = 0
        self._more = asyncio.Event()

    def add(self, index: int, block: Evidence) -> None:
        """A block is there."""
        self._ready[index] = block
        if index == self._next:
            self._more.set()

    async def write(self) -> None:
        """Until all blocks are written."""
        head: list[bytes] = []
        while self._next < self.count:
            await self._more.wait()
            self._more.clear()
            if not self._next:
                head = [self.head()]
            while share := self._share():
                self.parts.write(await asyncio.to_thread(_encoded, head, share, self.dtype))
                head = []

    def _share(self) -> list[Evidence]:
        share, cells = list[Evidence](), 0
        while self._next in self._ready and cells < SHARE_CELLS:
            share.append(self._ready.pop(self._next))
            cells += (share[-1].topk_ids if isinstance(share[-1], ScoreBlock) else share[-1].hidden).numel()
            self._next += 1
        return share


def _encoded(head: list[bytes], blocks: list[Evidence], dtype: str) -> bytes:
    return pack_frames([*head, *(_bytes(block, dtype) for block in blocks)])


def _bytes(block: Evidence, dtype: str) -> bytes:
    return encode(block, dtype) if isinstance(block, ScoreBlock) else encode_hidden(block)
