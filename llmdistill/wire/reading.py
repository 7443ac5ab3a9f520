"""Answers with blocks, read while they are being written."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from llmdistill.wire.protocol import FrameReader

T = TypeVar("T")
B = TypeVar("B")


class BlockReader(Generic[B, T]):
    """Blocks out of an answer that is still being written; each is decoded when it is there."""

    def __init__(
        self,
        check_head: Callable[[dict[str, Any]], None],
        check_block: Callable[[B], None],
        parse: Callable[[dict[str, Any], list[B]], T],
        decode: Callable[[bytearray], B],
    ) -> None:
        self.check_head, self.check_block, self.parse, self.decode = check_head, check_block, parse, decode
        self.frames, self.blocks = FrameReader(1 << 32), list[B]()
        self.head: dict[str, Any] | None = None

    def feed(self, part: bytes) -> None:
        for frame in self.frames.feed(part):
            if self.head is None:
                self.head = json.loads(bytes(frame))
                self.check_head(self.head)
            else:
                self.blocks.append(self.decode(frame))
                self.check_block(self.blocks[-1])

    def finish(self) -> T:
        self.frames.end()
        if self.head is None:
            raise ValueError("it has no frames")
        return self.parse(self.head, self.blocks)
