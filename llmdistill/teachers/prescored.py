"""A judge that is asked about sequences as they are finished, and answers from that when the round is trained on."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmdistill.teachers.asked import Asked, on_cpu
from llmdistill.teachers.base import Teacher
from llmdistill.texts import Rollout
from llmdistill.wire.blocks import ScoreBlock, decode, encode

Key = tuple[bytes, str | None, int]  # of the sequence, its domain (by which several teachers share the work), top_k


class Prescored:
    """A :class:`~llmdistill.teachers.base.Teacher` that keeps what ``judge`` scored for one round. In all else it is
    the judge itself. Threads may share it.

    Ids of the caller's choice are not kept: the student chooses them when it is trained.
    """

    def __init__(self, judge: Teacher) -> None:
        self.judge = judge
        self._blocks: dict[Key, ScoreBlock] = {}
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.judge, name)

    def score(self, rollout: Rollout, top_k: int, chosen: Tensor | None = None) -> list[ScoreBlock]:
        """As the judge's own, which is asked about the sequences that it was not asked about before."""
        if chosen is not None:
            return self.judge.score(rollout, top_k, chosen)
        asked = [Asked.of(*row) for row in zip(*on_cpu(rollout), strict=True)]
        domains = rollout.domain or (None,) * len(asked)
        keys = [(a.key(""), domain, top_k) for a, domain in zip(asked, domains, strict=True)]
        with self._lock:
            missing = list({key: i for i, key in reversed(list(enumerate(keys))) if key not in self._blocks}.values())
        if missing:
            scored = self.judge.score(rollout.sequences(missing), top_k)
            with self._lock:
                self._blocks.update((keys[i], block) for i, block in zip(missing, scored, strict=True))
        return [replace(self._blocks[key], positions=a.positions) for key, a in zip(keys, asked, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """The blocks as they go over a wire, every bit of them kept, and what they are filed under."""
        blocks = [encode(block, "float32") for block in self._blocks.values()]
        return {
            "keys": [(sequence.hex(), domain, top_k) for sequence, domain, top_k in self._blocks],
            "lengths": [len(block) for block in blocks],
            "blocks": torch.frombuffer(bytearray(b"".join(blocks) or b"-"), dtype=torch.uint8),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        data, start = state["blocks"].numpy().tobytes(), 0
        for (sequence, domain, top_k), length in zip(state["keys"], state["lengths"], strict=True):
            self._blocks[bytes.fromhex(sequence), domain, top_k] = decode(data[start : start + length])
            start += length
