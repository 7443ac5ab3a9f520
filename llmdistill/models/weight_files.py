"""A student's weights as ``from_pretrained`` reads them, written as they come: no more than one file's share of them is
in memory, however large the student and however it is sharded."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from llmdistill.compat.models import as_stored, not_stored
from llmdistill.files import atomic_write
from llmdistill.models.weights import base_model, named_weights, plain_name

FILE_BYTES = 4 * 2**30  # of one file; a larger weight has one to itself
WHOLE, PART, INDEX = "model.safetensors", "model-{:05d}-of-{:05d}.safetensors", "model.safetensors.index.json"


def write_weights(model: Any, folder: Path, *, main_process: bool = True) -> None:
    """Every process calls it, for ZeRO-3 and FSDP2 put shards together as they come; the main one writes.

    Args:
        folder: is there; weights in it are replaced.

    Raises:
        UserError: the disk is full; of two tied matrices one is adapted.
    """
    files, failed = _Files(folder), None
    for name, tensor in saved_weights(model):
        if not main_process or failed is not None:  # the others wait for this process at every weight
            continue
        try:
            files.add(name, tensor)
        except Exception as error:
            failed = error
    if failed is not None:
        raise failed
    if main_process:
        files.close()


def saved_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all that a checkpoint has: adapters merged, tied matrices once, nothing that is made anew."""
    base = base_model(model)
    left_out = not_stored(base, _shared(base))
    kept = ((name, tensor) for name, tensor in named_weights(model, stored=False) if name not in left_out)
    return as_stored(base, kept)


def _shared(base: Any) -> list[list[str]]:
    """The names of every weight that has several."""
    names = defaultdict[int, list[str]](list)
    for name, parameter in base.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(plain_name(name))
    return [each for each in names.values() if len(each) > 1]


class _Files:
    """Weights that become files of at most ``FILE_BYTES``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pending: dict[str, Tensor] = {}
        self.written: list[list[str]] = []  # the names in each file
        self.bytes = self.parameters = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self.pending and sum(t.nbytes for t in self.pending.values()) + tensor.nbytes > FILE_BYTES:
            self._write()
        # A weight with two names that both are wanted would be refused, as would a part of a larger one.
        own = tensor.detach().cpu().contiguous()
        self.pending[name] = own if own.untyped_storage().nbytes() == own.nbytes and self._is_new(own) else own.clone()
        self.bytes += tensor.nbytes
        self.parameters += tensor.numel()

    def close(self) -> None:
        """Gives the files their names, which say how many there are."""
        if self.pending:
            self._write()
        count = len(self.written)
        for earlier in self.folder.glob("model*.safetensors*"):
            earlier.unlink()
        if count == 1:
            self._place(0).rename(self.folder / WHOLE)
            return
        where = dict[str, str]()
        for i, names in enumerate(self.written):
            file = PART.format(i + 1, count)
            self._place(i).rename(self.folder / file)
            where.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_parameters": self.parameters, "total_size": self.bytes}, "weight_map": where}
        atomic_write(self.folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _is_new(self, tensor: Tensor) -> bool:
        return all(tensor.data_ptr() != other.data_ptr() for other in self.pending.values())

    def _place(self, number: int) -> Path:
        return self.folder / f"model-{number:05d}.unfinished"

    def _write(self) -> None:
        pending = self.pending
        atomic_write(self._place(len(self.written)), lambda place: save_file(pending, place, metadata={"format": "pt"}))
        self.written.append(list(self.pending))
        self.pending = {}
