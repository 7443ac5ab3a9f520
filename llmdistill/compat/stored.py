"""What a checkpoint has of each trained weight, whatever launch wrote it: its value, and what the optimizer remembers.

transformers writes the optimizer whole (one process, DDP), DeepSpeed in flat parts for each process, FSDP2 as torch's
distributed checkpoint. Here each is read by the names of the weights, one weight at a time: files are mapped into
memory, so that no process holds more than it asks for.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

FSDP_MODEL, FSDP_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"  # accelerate's folders in a checkpoint


@dataclass(frozen=True)
class Moments:
    """What an optimizer remembers of one weight."""

    values: dict[str, Tensor]  # such as exp_avg, each of the weight's number of elements
    step: float | None  # how many updates it has had; None: it does not count them


class Stored(Protocol):
    """A checkpoint, weight by weight."""

    def weight(self, name: str) -> Tensor | None:
        """As precisely as it was stored; None where it has no such weight."""
        ...

    def moments(self, name: str) -> Moments | None:
        """None where the optimizer had none yet."""
        ...


class WeightFiles:
    """Weights as ``save_pretrained`` writes them, of an adapter too, and beside them a method's helpers.

    Args:
        helpers: in the names of weights, what stands before those of ``helpers.safetensors``.
    """

    def __init__(self, checkpoint: Path, helpers: str) -> None:
        self.files: dict[str, Path] = {}
        for index in checkpoint.glob("*.safetensors.index.json"):
            self.files |= {n: checkpoint / f for n, f in json.loads(index.read_text())["weight_map"].items()}
        for file, prefix in (("model", ""), ("adapter_model", ""), ("helpers", f"{helpers}.")):
            path = checkpoint / f"{file}.safetensors"
            self.files |= {prefix + name: path for name in _names_in(path)}

    def weight(self, name: str) -> Tensor | None:
        from safetensors import safe_open

        for known in _spellings(name):
            if (path := self.files.get(known)) is not None:
                with safe_open(path, "pt") as file:
                    key = known if known in set(file.keys()) else known.split(".", 1)[1]  # a helper's
                    found: Tensor = file.get_tensor(key)
                return found
        return None


class WholeFile:
    """``optimizer.pt``: the optimizer's own state dict, which numbers its weights.

    Args:
        order: the names of the weights, as the optimizer has them in its groups.

    Raises:
        ValueError: the file is of another number of weights.
    """

    def __init__(self, checkpoint: Path, order: Sequence[str], weights: WeightFiles) -> None:
        state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", mmap=True, weights_only=True)
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        if len(numbers) != len(order):
            raise ValueError(f"its optimizer is of {len(numbers)} weights, and {len(order)} are trained here")
        self.entries = {name: state["state"].get(number) for name, number in zip(order, numbers, strict=True)}
        self.weights = weights

    def weight(self, name: str) -> Tensor | None:
        return self.weights.weight(name)

    def moments(self, name: str) -> Moments | None:
        return _moments(self.entries.get(name))


class OnlyWeights:
    """A checkpoint whose optimizer is not there, or not wanted."""

    def __init__(self, stored: Any) -> None:
        self.stored = stored

    def weight(self, name: str) -> Tensor | None:
        return self.stored.weight(name)  # type: ignore[no-any-return]

    def moments(self, name: str) -> Moments | None:
        return None


class ZeroFiles:
    """DeepSpeed's parts of ZeRO-1, -2 and -3: a file of flat tensors a process, in which every weight has a piece.

    DeepSpeed itself reads them with pickle; who can write a checkpoint can run code here too.

    Args:
        folder: ``global_stepN`` of a checkpoint.

    Raises:
        ValueError: they are not of ZeRO, or swapped out to a disk.
    """

    def __init__(self, folder: Path) -> None:
        from deepspeed.checkpoint import OPTIMIZER_STATE_DICT, PARAM_SHAPES, PARAM_SLICE_MAPPINGS

        files = sorted(folder.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"), key=_rank_of)
        ranks = [_unpickled(file)[OPTIMIZER_STATE_DICT] for file in files]
        self.pieces: dict[str, list[tuple[int, int, int, int]]] = defaultdict(list)  # rank, group, start, length
        if ranks and "fp32_flat_groups" in ranks[0]:  # ZeRO-3 cuts every weight
            model_states = next(iter(sorted(folder.glob("*zero_pp_rank_0_mp_rank_00_model_states.pt"))))
            self.masters = [rank["fp32_flat_groups"] for rank in ranks]
            self.states = [rank["optimizer_state_dict"]["state"] for rank in ranks]
            for group, shapes in enumerate(_unpickled(model_states)[PARAM_SHAPES]):
                start = 0
                for name, shape in shapes.items():
                    part = -(-shape.numel() // len(ranks))
                    for rank in range(len(ranks)):
                        length = min(part, shape.numel() - rank * part)
                        if length > 0:
                            self.pieces[name].append((rank, group, start, length))
                    start += part
        elif ranks and PARAM_SLICE_MAPPINGS in ranks[0]:  # the lower ones cut the row of all weights
            self.masters = [rank["single_partition_of_fp32_groups"] for rank in ranks]
            self.states = [rank["base_optimizer_state"]["state"] for rank in ranks]
            for rank, state in enumerate(ranks):
                for group, addresses in enumerate(state[PARAM_SLICE_MAPPINGS]):
                    for name, address in addresses.items():
                        self.pieces[name].append((rank, group, address.start, address.numel))
        else:
            raise ValueError("its optimizer is not in ZeRO's parts")
        if any(part is None for rank in self.masters for part in rank):
            raise ValueError("its optimizer was on NVMe, and is not in the checkpoint")

    def weight(self, name: str) -> Tensor | None:
        pieces = [self.masters[rank][group].narrow(0, a, n) for rank, group, a, n in self.pieces.get(name, ())]
        return torch.cat(pieces) if pieces else None

    def moments(self, name: str) -> Moments | None:
        found = self.pieces.get(name, [])
        entries = [self.states[rank].get(group) for rank, group, _, _ in found]
        if not found or entries[0] is None:
            return None
        values = {
            key: torch.cat([entry[key].narrow(0, a, n) for entry, (_, _, a, n) in zip(entries, found, strict=True)])
            for key, value in entries[0].items()
            if key != "step" and torch.is_tensor(value) and value.dim()
        }
        return Moments(values, _step(entries[0]))


class DistributedFolder:
    """What FSDP2 writes: torch's distributed checkpoint, which knows every tensor by its name."""

    def __init__(self, checkpoint: Path, weights: WeightFiles) -> None:
        self.weights = weights
        self.model = _Tensors(checkpoint / FSDP_MODEL, "model.")
        self.optimizer = _Tensors(checkpoint / FSDP_OPTIMIZER, "optimizer.state.")

    def weight(self, name: str) -> Tensor | None:
        for known in _spellings(name):
            if (found := self.model.get(known)) is not None:
                return found
        return self.weights.weight(name)

    def moments(self, name: str) -> Moments | None:
        keys = [key for key in self.optimizer.keys if key.rpartition(".")[0] == name]
        return _moments({key.rpartition(".")[2]: self.optimizer.get(key) for key in keys} or None)


class _Tensors:
    """The tensors of a distributed checkpoint, read one by one."""

    def __init__(self, folder: Path, prefix: str) -> None:
        from torch.distributed.checkpoint import FileSystemReader

        self.folder, self.prefix = folder, prefix
        self.entries = dict[str, Any]()
        if folder.is_dir():
            named = FileSystemReader(folder).read_metadata().state_dict_metadata
            self.entries = {name.removeprefix(prefix): m for name, m in named.items() if name.startswith(prefix)}
        self.keys = list(self.entries)

    def get(self, name: str) -> Tensor | None:
        from torch.distributed.checkpoint import FileSystemReader, load

        entry = self.entries.get(name)
        if entry is None or not hasattr(entry, "size"):
            return None
        into = {self.prefix + name: torch.empty(entry.size, dtype=entry.properties.dtype)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each process reads what it needs
            load(into, storage_reader=FileSystemReader(self.folder), no_dist=True)
        return into[self.prefix + name]


def _moments(entry: dict[str, Any] | None) -> Moments | None:
    if not entry:
        return None
    return Moments({k: v for k, v in entry.items() if k != "step" and torch.is_tensor(v)}, _step(entry))


def _step(entry: dict[str, Any]) -> float | None:
    return float(entry["step"]) if entry.get("step") is not None else None


def _spellings(name: str) -> list[str]:
    """A weight's name in a model, and in the files that are made of one: peft leaves the adapter's name out."""
    return [name, name.replace(".modules_to_save.default", ""), name.replace(".default", "")]


def _rank_of(file: Path) -> int:
    found = re.search(r"zero_pp_rank_(\d+)_", file.name)
    assert found is not None, file
    return int(found[1])


def _unpickled(file: Path) -> Any:
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)


def _names_in(path: Path) -> list[str]:
    from safetensors import safe_open

    if not path.is_file():
        return []
    with safe_open(path, "pt") as file:
        return list(file.keys())
