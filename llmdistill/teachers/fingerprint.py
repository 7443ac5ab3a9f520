"""Short names for weights, vocabularies and chat templates: equal content, equal name."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llmdistill.models.weights import base_model, named_weights

SAMPLES = 64  # values hashed of every tensor, evenly spread
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def weights_fingerprint(source: str | Path | nn.Module, revision: str = "") -> str:
    """16 hex digits over name, shape and 64 values (as bfloat16) of every weight.

    A checkpoint folder and the model loaded from it have the same fingerprint, in whatever dtype it was loaded; models
    that differ only by less than bfloat16 resolves, or only between the sampled values, share one. A hub name is read
    from the local cache, at ``revision`` where one is given. A checkpoint without safetensors files is named by its
    path, file sizes and dates.
    """
    if isinstance(source, nn.Module):
        base = base_model(source)
        tied, tensors = _is_tied(getattr(base, "config", None)), named_weights(source)
    else:
        folder = local_folder(str(source), revision)
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.glob("*"))]
            return hashlib.blake2b(repr((str(source), stats)).encode(), digest_size=8).hexdigest()
        tied = is_tied(folder)
        tensors = (pair for file in files for pair in stored_tensors(file))
    found = Fingerprint(tied)
    for name, tensor in tensors:
        found.add(name, tensor)
    return found.name()


class Fingerprint:
    """:func:`weights_fingerprint` of tensors that come one by one, in any order.

    Args:
        tied: whether the output head is the embedding matrix.
    """

    def __init__(self, tied: bool) -> None:
        self.tied, self._entries = tied, dict[str, bytes]()

    def add(self, name: str, tensor: Tensor) -> None:
        self._entries[name] = _entry(name, tensor)

    def name(self) -> str:
        """Of what was added so far."""
        digest = hashlib.blake2b(digest_size=8)
        for name in sorted(self._entries):
            # some checkpoints store the second name of the same matrix, some do not
            if not (self.tied and name == "lm_head.weight"):
                digest.update(self._entries[name])
        return digest.hexdigest()


def stored_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a folder's (or cached hub model's) safetensors files; empty without any."""
    files = sorted(local_folder(str(folder)).glob("*.safetensors"))
    return {name: tuple(tensor.shape) for file in files for name, tensor in stored_tensors(file)}


def stored_dtype(folder: str | Path) -> str | None:
    """Of the first weight in a folder's (or cached hub model's) safetensors files, as "bfloat16"; None without any. It
    is what transformers loads with where the config names no dtype."""
    files = sorted(local_folder(str(folder)).glob("*.safetensors"))
    tensors = (tensor for file in files for _, tensor in stored_tensors(file) if tensor.is_floating_point())
    first = next(tensors, None)
    return None if first is None else str(first.dtype).removeprefix("torch.")


def is_tied(folder: str | Path) -> bool:
    """Whether the checkpoint's output head is its embedding matrix."""
    config = local_folder(str(folder)) / "config.json"
    return bool(json.loads(config.read_text()).get("tie_word_embeddings")) if config.exists() else False


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits over every (token, id) and the special tokens: the same text may still be split otherwise."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    content = json.dumps([vocabulary, special], ensure_ascii=True)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """16 hex digits over the chat template (all of them, where there are several); None without one."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    return hashlib.blake2b(json.dumps(template, sort_keys=True).encode(), digest_size=8).hexdigest()


def _entry(name: str, tensor: Tensor) -> bytes:
    size = tensor.numel()
    index = torch.tensor([i * (size - 1) // (SAMPLES - 1) for i in range(SAMPLES)] if size else [], dtype=torch.long)
    values = tensor.detach().reshape(-1)[index.to(tensor.device)].cpu()
    if values.is_floating_point():
        values = values.to(torch.bfloat16)
    return f"{name}{list(tensor.shape)}".encode() + values.contiguous().view(torch.uint8).numpy().tobytes()


def stored_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a safetensors file, mapped rather than read: only the sampled pages are touched."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(length))
    data = np.memmap(file, dtype=np.uint8, mode="c", offset=8 + length)  # "c": torch wants a writable array
    for name, meta in header.items():
        if name == "__metadata__":
            continue
        start, end = meta["data_offsets"]
        raw = torch.from_numpy(data[start:end])
        dtype = _DTYPES.get(meta["dtype"])
        if dtype is None or not math.prod(meta["shape"]):
            yield name, raw
        elif start % dtype.itemsize == 0:
            yield name, raw.view(dtype).view(meta["shape"])
        else:
            yield name, raw.clone().view(dtype).view(meta["shape"])


def _is_tied(config: Any) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))


def local_folder(source: str, revision: str = "") -> Path:
    """A folder, or where a hub model lies in the local cache."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, revision=revision or None, local_files_only=True))
