"""What client and service agree on beside the score blocks: paths, bodies, framing, errors.

Bodies are JSON, but for two: evidence comes as :data:`BLOCKS_TYPE`, weights go as :data:`TENSORS_TYPE` (a safetensors
file). Nothing is ever unpickled or evaluated. fp is a fingerprint of weights; a request may name the one it expects.

``POST /v1/score``::

    {"sequences": [[id, ...], ...], "positions": [[start, stop], ...],      tokens start..stop-1 of each, start >= 1
     "top_k": 64, "chosen": null | [[[id, ...] per position] per sequence], "temperature": 1.0,
     "dtype": "float16" | "float32", "teacher": fp | null}
    -> frames: {"protocol", "teacher", "tokenizer", "policy_version", "positions"}, then a score block per sequence

``POST /v1/generate``::

    {"prompts": [[id, ...], ...], "rows": [i, ...] | null, "eos_ids": [id, ...] | null, "adapter": name | null,
     "sampling": {"max_new_tokens", "temperature", "top_p", "top_k", "samples_per_prompt", "seed"},
     "teacher": fp | null}
    -> {"teacher", "policy_version", "completions": [[{"ids", "logprobs", "finish"} per sample] per prompt]}

Sample j of prompt i is drawn with ``request_seed(seed, rows[i], j)`` (rows: 0, 1, ... when null), so a call that is
split over requests or replicas draws what the whole call would have drawn.

``POST /v1/score_text``::

    {"items": [{"prompt": text | chat messages, "completion": text, "tools": [schema, ...] | null}, ...],
     "chat_template_kwargs": {name: value} | null, "top_k", "dtype", "teacher"}
    -> frames: {"items": [{"prompt_ids", "ids", "offsets": [[first, last + 1 character of the completion], ...]}], ...}

``POST /v1/weights``: ``{"path": folder, "policy_version": n}``, or :data:`TENSORS_TYPE` with ``?policy_version=n`` and
``&partial=true`` when only some weights are in it -> ``{"teacher", "policy_version"}``.
``POST /v1/adapters``: ``{"name", "path"}``; ``DELETE /v1/adapters/NAME``.

``GET /v1/info``::

    {"protocol", "name", "teacher", "tokenizer", "vocab_size", "eos_ids", "context_length", "template", "engine",
     "dtype", "policy_version", "chosen_ids", "weights", "adapters": [name, ...],
     "limits": {"top_k", "sequence_tokens", "sequences", "positions", "new_tokens", "body_bytes", "in_flight"}}

``GET /health`` (the process lives), ``/ready`` (200 when it takes work, else 503), ``/metrics`` (Prometheus).

Headers: ``Authorization: Bearer TOKEN`` where the service has one; ``X-Request-Id`` makes a POST idempotent: while a
request of that id is in flight or its answer is kept, the same body gets the same answer without being computed again,
and another body gets 409.

Errors: ``{"error": {"type", "field", "message", "limit"}}`` with 400 (a field is wrong), 401 (token), 404, 409 (other
fingerprint, reused id), 413 (body too large), 429 (queue full) and 503 (starting, draining, engine dead), the last two
with ``Retry-After`` in seconds and ``Retry-After-Ms``, 500.

A binary answer is a sequence of frames, each a little-endian uint32 length and that many bytes. The first frame is a
JSON object about the whole answer, the others are score blocks, one per sequence, in the order asked.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

SCORE, GENERATE, SCORE_TEXT = "/v1/score", "/v1/generate", "/v1/score_text"
WEIGHTS, ADAPTERS = "/v1/weights", "/v1/adapters"
INFO, HEALTH, READY, METRICS = "/v1/info", "/health", "/ready", "/metrics"

BLOCKS_TYPE = "application/x-llmdistill-blocks"
TENSORS_TYPE = "application/x-safetensors"

PROTOCOL_VERSION = 1
_LENGTH = struct.Struct("<I")


class FrameError(ValueError):
    """Bytes that are no sequence of frames: cut off, too long, or followed by something else."""


def pack_frames(frames: Sequence[bytes]) -> bytes:
    return b"".join(part for frame in frames for part in (_LENGTH.pack(len(frame)), frame))


def unpack_frames(data: bytes | memoryview, *, max_frames: int = 1 << 16) -> Iterator[memoryview]:
    """The frames of ``data``, without copying them.

    Raises:
        FrameError: a length that runs past the end, or more than ``max_frames``.
    """
    view, at, count = memoryview(data), 0, 0
    while at < len(view):
        if len(view) - at < _LENGTH.size:
            raise FrameError(f"{len(view) - at} bytes after frame {count}; a frame starts with 4 bytes of length")
        (length,) = _LENGTH.unpack_from(view, at)
        at += _LENGTH.size
        if length > len(view) - at:
            raise FrameError(f"frame {count} declares {length} bytes, {len(view) - at} are left")
        if count >= max_frames:
            raise FrameError(f"more than {max_frames} frames")
        yield view[at : at + length]
        at, count = at + length, count + 1
