"""Weights as a safetensors file that is never in memory as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 24  # of a weight, as it is handed to the socket
_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def safetensors_stream(tensors: Mapping[str, Tensor]) -> tuple[int, Callable[[], Iterator[bytes]]]:
    """Size and chunks of a safetensors file of ``tensors``, which is never in memory as a whole."""
    entries, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _SAFETENSORS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)

    def chunks() -> Iterator[bytes]:
        yield len(header).to_bytes(8, "little") + header
        for tensor in tensors.values():
            raw = tensor.contiguous().reshape(-1).view(torch.uint8)
            for start in range(0, len(raw), CHUNK_BYTES):
                yield raw[start : start + CHUNK_BYTES].numpy().tobytes()

    return 8 + len(header) + end, chunks
