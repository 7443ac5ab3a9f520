"""How much of a student is in this process's memory at one time while it is saved."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from llmdistill.compat.patching import patched
from llmdistill.models import weight_files
from llmdistill.models.weights import named_weights

FILE_BYTES = 20_000


class Alive:
    """Weights that were handed out by ``named_weights`` and are still there, whoever holds them."""

    def __init__(self) -> None:
        self.storages = list[weakref.ref[Any]]()
        self.most = self.all = self.largest = 0  # bytes: alive at one time; handed out; of one weight

    def weights(self, model: Any, **how: Any) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named_weights(model, **how):
            storage = tensor.untyped_storage()
            self.storages.append(weakref.ref(storage))
            self.all += storage.nbytes()
            self.largest = max(self.largest, storage.nbytes())
            here = {s.data_ptr(): s.nbytes() for ref in self.storages if (s := ref()) is not None}
            self.most = max(self.most, sum(here.values()))
            del storage, here
            yield name, tensor
            del tensor


@contextmanager
def counted() -> Iterator[Alive]:
    """Counts the weights of what is saved inside, in files of ``FILE_BYTES``."""
    alive = Alive()
    with patched(weight_files, "named_weights", alive.weights), patched(weight_files, "FILE_BYTES", FILE_BYTES):
        yield alive
