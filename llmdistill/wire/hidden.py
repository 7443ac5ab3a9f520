"""Blocks of hidden states: with the teacher's output head they are its whole distribution at every position.

A block as bytes is a score block of version 2, everything little-endian::

    "LDSB"                                              magic
    u16 version, u8 form, u8 0                          form: see :data:`FORMS`
    u32 start, stop, n, H, V                            positions, rows, columns, vocabulary
    u8 length + UTF-8, three times                      fingerprints of teacher, tokenizer and head
    bf16 [n, H], or f16 [n, ceil(H / 64)], i8 [n, H]    the states; or scales of groups of 64 columns, and multiples
    u32                                                 CRC-32 of everything before

At H = 4,096 a token takes 8,192 bytes in 16 bits, 4,224 in 8. The states are those that the head is applied to, behind
the last norm. The head itself travels once (:class:`HeadWeights`); its fingerprint ties the two together.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from llmdistill.wire.blocks import BlockError, ScoreBlock, decode, fingerprints

HIDDEN_VERSION = 2
GROUP = 64  # columns that share a scale
Form = Literal["bfloat16", "int8"]
FORMS: tuple[Form, ...] = get_args(Form)  # by the number that stands for it

_MAGIC = b"LDSB"
_START = struct.Struct("<4sHBBIIIII")
_CRC = struct.Struct("<I")
_LEAST_SCALE = 2.0**-14  # the smallest float16 of full precision


@dataclass(frozen=True)
class HiddenHeader:
    """Whose states, and which head makes logits of them."""

    teacher: str  # fingerprint of the teacher's weights
    tokenizer: str  # fingerprint of its vocabulary
    head: str  # fingerprint of the output head
    width: int  # columns, H
    vocab_size: int  # of the head's logits
    form: Form = "bfloat16"


@dataclass(frozen=True)
class HiddenBlock:
    """One sequence's final hidden states, n rows: row i is what the i-th counted token was predicted from."""

    positions: slice  # first to last counted token of the sequence
    hidden: Tensor  # [n, H], float32 or bfloat16; as it was rounded where it was decoded
    header: HiddenHeader


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """An output head: logits = softcap tanh(scale x / softcap) of x = hidden @ weight.T + bias."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    logit_scale: float = 1.0
    softcap: float | None = None
    fingerprint: str = field(default="")

    def __post_init__(self) -> None:
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", head_fingerprint(self))

    def linear(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Linear:
        """The frozen projection."""
        made = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=self.bias is not None, device="meta")
        made.weight = nn.Parameter(self.weight.to(device, dtype), requires_grad=False)
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.to(device, dtype), requires_grad=False)
        return made


def head_fingerprint(head: HeadWeights) -> str:
    """16 hex digits over every value of the head, as bfloat16, and how its logits are scaled."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(json.dumps([list(head.weight.shape), head.bias is not None, head.logit_scale, head.softcap]).encode())
    for tensor in (head.weight, head.bias):
        for rows in () if tensor is None else tensor.detach().split(4096):
            digest.update(rows.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def pack_head(head: HeadWeights) -> bytes:
    """As a safetensors file."""
    tensors = {"weight": head.weight.detach().cpu().contiguous()}
    if head.bias is not None:
        tensors["bias"] = head.bias.detach().cpu().contiguous()
    softcap = "" if head.softcap is None else repr(float(head.softcap))
    about = {"logit_scale": repr(float(head.logit_scale)), "softcap": softcap, "fingerprint": head.fingerprint}
    return safetensors.torch.save(tensors, about)


def unpack_head(data: bytes) -> HeadWeights:
    """The inverse of :func:`pack_head`; its fingerprint is taken of what came.

    Raises:
        BlockError: it is no head, or not the one that it says it is.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        about = json.loads(data[8 : 8 + length])["__metadata__"]
        tensors = safetensors.torch.load(data)
        softcap = float(about["softcap"]) if about["softcap"] else None
        weight, bias = tensors["weight"], tensors.get("bias")
        if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            raise ValueError(f"a weight of shape {list(weight.shape)}")
        head = HeadWeights(weight, bias, float(about["logit_scale"]), softcap)
    except (ValueError, KeyError, TypeError, SafetensorError, RecursionError) as error:
        raise BlockError(f"no output head: {error}") from None
    if about.get("fingerprint") != head.fingerprint:
        raise BlockError(f"an output head that says it is {about.get('fingerprint')} and is {head.fingerprint}")
    return head


def encode_hidden(block: HiddenBlock, form: Form | None = None) -> bytes:
    """The block as bytes.

    Args:
        form: "bfloat16", or "int8": multiples of one float16 for each 64 columns. None: ``block.header.form``.

    Raises:
        ValueError: the block is not as :class:`HiddenBlock` says, or holds what is no number.
    """
    header, form = block.header, form or block.header.form
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(FORMS)}")
    hidden, positions = block.hidden.detach().to("cpu"), block.positions
    if hidden.ndim != 2 or hidden.shape[1] != header.width:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; its header says {header.width} columns")
    n = len(hidden)
    _check(positions.start, positions.stop, n, header.width, header.vocab_size, ValueError)
    names = [name.encode() for name in (header.teacher, header.tokenizer, header.head)]
    if max(map(len, names)) > 255:
        raise ValueError(f"fingerprints of {[len(name) for name in names]} bytes; a block holds at most 255 each")
    if not bool(torch.isfinite(hidden).all()):
        raise ValueError("a hidden state is no number. Fix: the teacher's forward pass")
    fields = (FORMS.index(form), 0, positions.start, positions.stop, n, header.width, header.vocab_size)
    parts = [_START.pack(_MAGIC, HIDDEN_VERSION, *fields), *(bytes([len(name)]) + name for name in names)]
    if form == "bfloat16":
        parts.append(hidden.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    else:
        scales, codes = to_groups(hidden)
        parts += [scales.numpy().tobytes(), codes.numpy().tobytes()]
    body = b"".join(parts)
    return body + _CRC.pack(zlib.crc32(body))


def decode_hidden(
    data: bytes | bytearray | memoryview, *, max_positions: int = 1 << 20, max_bytes: int = 1 << 36
) -> HiddenBlock:
    """The block in ``data``: its states in bfloat16, or float32 where they were sent in 8 bits.

    Raises:
        BlockError: for whatever is wrong with the bytes, before anything is allocated for them.
    """
    view = memoryview(data).cast("B")
    if len(view) < _START.size + 3 + _CRC.size:
        raise BlockError(f"{len(view)} bytes; a block of hidden states has at least {_START.size + 3 + _CRC.size}")
    magic, version, form, rest, start, stop, n, width, vocab = _START.unpack_from(view)
    if magic != _MAGIC:
        raise BlockError(f"starts with {magic!r}; a block starts with {_MAGIC!r}")
    if version != HIDDEN_VERSION:
        what = "holds log-probs" if version < HIDDEN_VERSION else "is of a later version. Fix: update llmdistill"
        raise BlockError(f"block of version {version}; hidden states are version {HIDDEN_VERSION}, this one {what}")
    (crc,) = _CRC.unpack_from(view, len(view) - _CRC.size)
    if zlib.crc32(view[: -_CRC.size]) != crc:
        raise BlockError(f"a block of {len(view)} bytes is damaged: its checksum differs")
    if form >= len(FORMS) or rest:
        raise BlockError(f"form {form} and {rest}; known are forms up to {len(FORMS) - 1}")
    _check(start, stop, n, width, vocab, BlockError)
    end = len(view) - _CRC.size
    names, at = fingerprints(view, _START.size, end, ("teacher", "tokenizer", "head"))
    if n > max_positions or 4 * n * width > max_bytes:
        raise BlockError(f"{n} positions of {4 * width} bytes; accepted are {max_positions}, and {max_bytes} bytes")
    if (size := n * row_bytes(width, FORMS[form])) != end - at:
        raise BlockError(f"n = {n}, H = {width} take {size} bytes of states, there are {end - at}")
    header = HiddenHeader(names[0], names[1], names[2], width, vocab, FORMS[form])
    hidden = _states(view[at:end], n, width, FORMS[form])
    if not bool(torch.isfinite(hidden).all()):
        raise BlockError("a hidden state is no number")
    return HiddenBlock(slice(start, stop), hidden, header)


def decode_any(
    data: bytes | bytearray | memoryview, *, max_positions: int = 1 << 20, max_bytes: int = 1 << 36
) -> ScoreBlock | HiddenBlock:
    """The block in ``data``, of either kind.

    Raises:
        BlockError: for whatever is wrong with the bytes.
    """
    if bytes(data[4:6]) == HIDDEN_VERSION.to_bytes(2, "little"):
        return decode_hidden(data, max_positions=max_positions, max_bytes=max_bytes)
    return decode(data, max_positions=max_positions, max_bytes=max_bytes)


def row_bytes(width: int, form: Form) -> int:
    """Of one row of states."""
    return 2 * width if form == "bfloat16" else width + 2 * -(-width // GROUP)


def block_bytes(rows: int, width: int, form: Form) -> int:
    """The most that a block of so many rows takes."""
    return _START.size + 3 * 256 + _CRC.size + rows * row_bytes(width, form)


def to_groups(hidden_nH: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """Scales [n, ceil(H / group)] float16 and multiples of them [n, H] int8."""
    n, width = hidden_nH.shape
    spread = torch.zeros(n, -(-width // group) * group)
    spread[:, :width] = hidden_nH
    grouped = spread.view(n, -1, group)
    scale = (grouped.abs().amax(-1) / 127).clamp(min=_LEAST_SCALE, max=65504.0).half()
    codes = (grouped / scale.float()[..., None]).round().clamp(-127, 127).to(torch.int8)
    return scale, codes.view(n, -1)[:, :width].contiguous()


def from_groups(scale_nG: Tensor, codes_nH: Tensor, group: int = GROUP) -> Tensor:
    """The inverse of :func:`to_groups` up to its rounding, [n, H] float32."""
    each_nH = scale_nG.float().repeat_interleave(group, 1)[:, : codes_nH.shape[1]]
    return codes_nH.float() * each_nH


def _states(payload: memoryview, n: int, width: int, form: Form) -> Tensor:
    if form == "bfloat16":
        raw = np.frombuffer(payload, "<i2").reshape(n, width).copy()
        return torch.from_numpy(raw).view(torch.bfloat16)
    groups = -(-width // GROUP)
    scale = torch.from_numpy(np.frombuffer(payload[: 2 * n * groups], "<f2").reshape(n, groups).copy())
    codes = torch.from_numpy(np.frombuffer(payload[2 * n * groups :], np.int8).reshape(n, width).copy())
    return from_groups(scale, codes)


def _check(start: int, stop: int, n: int, width: int, vocab: int, error: type[ValueError]) -> None:
    if not 0 <= start <= stop < 1 << 32 or n > stop - start or (n == 0) != (stop == start):
        raise error(f"{n} counted tokens at positions {start} to {stop}; they must fit, and both ends count")
    if not 0 < width < 1 << 24 or not 0 < vocab < 1 << 31:
        raise error(f"{width} columns and a vocabulary of {vocab}; both must be there")
    if not math.isfinite(n * width):
        raise error(f"{n} rows of {width}")
