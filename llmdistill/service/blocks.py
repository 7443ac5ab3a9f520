"""The score block's name that outside code imports; it lives in :mod:`llmdistill.wire.blocks`."""

from llmdistill.wire.blocks import BlockHeader, ScoreBlock, decode, encode

__all__ = ["BlockHeader", "ScoreBlock", "decode", "encode"]
