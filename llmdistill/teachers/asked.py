"""What a teacher is asked about a sequence, whatever batch it is in and however that is padded."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmdistill.teachers.block_store import KEY_BYTES
from llmdistill.texts import Rollout
from llmdistill.texts.rollout import span


@dataclass(frozen=True)
class Asked:
    """One sequence of a rollout up to its last counted token, without padding: what answers are filed under."""

    ids: NDArray[np.int64]
    counted: NDArray[np.bool_]
    positions: slice  # in the rollout's row
    count: int

    @classmethod
    def of(cls, ids_T: Tensor, real_T: Tensor, counted_T: Tensor) -> Asked:
        positions = span(counted_T)
        real = real_T[: positions.stop]
        counted = counted_T[: positions.stop].clone()
        counted[:1] = False  # nothing before it to be predicted from
        return cls(ids_T[: positions.stop][real].numpy(), counted[real].numpy(), positions, int(counted.sum()))

    @property
    def unpadded(self) -> slice:
        """The positions as they are in a row without padding on its left."""
        return slice(int(self.counted.argmax()), len(self.ids))

    def key(self, dtype: str) -> bytes:
        """Equal for equal tokens before and at the same counted ones, however padded, in whatever batch."""
        parts = (struct.pack("<QQ", self.unpadded.start, len(self.ids)), self.ids.astype("<i8").tobytes())
        content = b"".join((*parts, np.packbits(self.counted).tobytes(), dtype.encode()))
        return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


def on_cpu(rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    """Its ids, which of them are real, and which count, [B, T] each."""
    return rollout.input_ids.cpu(), rollout.attention_mask.cpu(), rollout.completion_mask.cpu()
