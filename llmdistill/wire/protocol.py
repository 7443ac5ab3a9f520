"""What client and service agree on beside the score blocks: paths, bodies, framing, errors.

What is large is bytes: token ids go as :data:`IDS_TYPE` and come as :data:`COMPLETIONS_TYPE`
(:mod:`llmdistill.wire.bodies`), evidence comes as :data:`BLOCKS_TYPE`, weights go as :data:`TENSORS_TYPE` (a
safetensors file). Everything else is JSON, which small requests for scores and completions may be as well
(``limits.json_bytes``). Nothing is ever unpickled or evaluated. fp is a fingerprint of weights; a request may name the
one it expects. Below are the JSON forms; as bytes the same fields that are no ids are the settings.

``POST /v1/score``::

    {"sequences": [[id, ...], ...], "positions": [[start, stop], ...],      tokens start..stop-1 of each, start >= 1
     "top_k": 64, "chosen": null | [[[id, ...] per position] per sequence], "temperature": 1.0,
     "dtype": "float16" | "float32", "teacher": fp | null, "hidden": "" | "bfloat16" | "int8"}
    -> frames: {"protocol", "teacher", "tokenizer", "policy_version", "positions"}, then a score block per sequence,
    or with "hidden", which goes without top_k and chosen, a block of hidden states (:mod:`llmdistill.wire.hidden`)

``POST /v1/generate``::

    {"prompts": [[id, ...], ...], "rows": [i, ...] | null, "eos_ids": [id, ...] | null, "adapter": name | null,
     "sampling": {"max_new_tokens", "temperature", "top_p", "top_k", "samples_per_prompt", "seed",
                  "min_p", "repetition_penalty", "stop": [text, ...], "ignore_eos", "first_sample"},
     "teacher": fp | null}
    -> {"teacher", "policy_version", "completions": [[{"ids", "logprobs", "finish"} per sample] per prompt]}, or, asked
    in bytes, :data:`COMPLETIONS_TYPE` with the settings {"teacher", "policy_version"}

Sample j of prompt i is drawn with ``request_seed(seed, rows[i], first_sample + j)`` (rows: 0, 1, ... when null), so a
call that is split over requests or replicas draws what the whole call would have drawn.

``POST /v1/score_text``::

    {"items": [{"prompt": text | chat messages, "completion": text, "tools": [schema, ...] | null}, ...],
     "chat_template_kwargs": {name: value} | null, "top_k", "dtype", "teacher"}
    -> frames: {"items": [{"prompt_ids", "ids", "offsets": [[first, last + 1 character of the completion], ...]}], ...}

``POST /v1/weights``: ``{"path": folder, "policy_version": n, "digest": d}``, or :data:`TENSORS_TYPE` with
``?policy_version=n``, ``&digest=d`` and ``&partial=true`` when only some weights are in it -> ``{"teacher",
"policy_version"}``. d is any word that names these weights: whoever pushes the same ones gives the same word.
``POST /v1/weights/offer``: ``{"digest": d, "policy_version": n}`` -> ``{"needed": true}`` to the one who is to push
them now, ``{"needed": false, "teacher", "policy_version"}`` where they are. It waits while another one pushes.
``POST /v1/weights/join``: ``{"group", "backend", "replica": i, "init": {...}, "shapes": {name: [n, ...]}}`` ->
``{"group"}`` and ``POST /v1/weights/receive``: ``{"group", "digest", "policy_version", "update": {...}}`` ->
``{"teacher", "policy_version"}``, after one with ``"update": null``, which waits until nothing is at work. Where
``transfer`` of the info is not null: the engine joins a trainer, by vLLM's weight-transfer API, and takes what that
sends to it beside this protocol. ``group`` is any word for that trainer and all that joined it.
``POST /v1/adapters``: ``{"name", "path"}``; ``DELETE /v1/adapters/NAME``.

``GET /v1/info``::

    {"protocol", "name", "teacher", "tokenizer", "vocab_size", "eos_ids", "context_length", "template", "engine",
     "dtype", "policy_version", "chosen_ids", "weights", "partial_weights", "adapters": [name, ...],
     "head": {"fingerprint", "width", "bytes"} | null, "transfer": {"backend", "workers", "group": word | null} | null,
     "limits": {"top_k", "sequence_tokens", "sequences", "positions", "new_tokens", "body_bytes", "json_bytes",
                "in_flight", "adapters"}}

``GET /v1/head``: the output head that goes with hidden states, as :data:`TENSORS_TYPE`, where ``head`` of the info is
not null.

``GET /health`` (the process lives), ``/ready`` (200 when it takes work, else 503), ``/metrics`` (Prometheus).

Headers: ``Authorization: Bearer TOKEN`` where the service has one; ``X-Request-Id`` makes a POST idempotent: while a
request of that id is in flight or its answer is kept, the same body gets the same answer without being computed again,
and another body gets 409. ``X-Request-Done: ID,ID`` lets go of what was kept for these, and gives up what is in
flight: their caller has the answer, or does not want it any more. A caller that hangs up without a word may come back
for its answer for a while. ``X-Client-Id`` names the client among whom the engine is shared out (without one: the
address it asks from). Every answer has ``X-Policy-Version`` and ``X-Teacher``: the weights that are there when it is
sent.

Errors: ``{"error": {"type", "field", "message", "limit"}}`` with 400 (a field is wrong), 401 (token), 404, 409 (other
fingerprint, reused id), 413 (body too large), 415 (content type), 421 (Host, where there is no token), 429 (queue full)
and 503 (starting, draining, engine dead), the last two with ``Retry-After`` in seconds and ``Retry-After-Ms``, 500, 507
(no room for an upload).

A binary answer is a sequence of frames, each a little-endian uint32 length and that many bytes. The first frame is a
JSON object about the whole answer, the others are score blocks, one per sequence, in the order asked.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

SCORE, GENERATE, SCORE_TEXT = "/v1/score", "/v1/generate", "/v1/score_text"
WEIGHTS, OFFER, ADAPTERS = "/v1/weights", "/v1/weights/offer", "/v1/adapters"
JOIN, RECEIVE = "/v1/weights/join", "/v1/weights/receive"
HEAD = "/v1/head"
INFO, HEALTH, READY, METRICS = "/v1/info", "/health", "/ready", "/metrics"

VERSION_HEADER, TEACHER_HEADER = b"x-policy-version", b"x-teacher"

BLOCKS_TYPE = "application/x-llmdistill-blocks"
IDS_TYPE = "application/x-llmdistill-ids"
COMPLETIONS_TYPE = "application/x-llmdistill-completions"
JSON_TYPE = "application/json"
TENSORS_TYPE = "application/x-safetensors"

PROTOCOL_VERSION = 3
_LENGTH = struct.Struct("<I")


class FrameError(ValueError):
    """Bytes that are no sequence of frames: cut off, too long, or followed by something else."""


def pack_frames(frames: Sequence[bytes]) -> bytes:
    return b"".join(part for frame in frames for part in (_LENGTH.pack(len(frame)), frame))


class FrameReader:
    """Frames out of parts of an answer as they come over the wire, without waiting for its end.

    Args:
        max_bytes: of a frame.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.count = max_bytes, 0
        self._held = bytearray()

    def feed(self, part: bytes) -> Iterator[bytearray]:
        """The frames that ``part`` completes.

        Raises:
            FrameError: a frame that is longer than it may be.
        """
        self._held += part
        at = 0
        while len(self._held) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._held, at)
            if length > self.max_bytes:
                raise FrameError(f"frame {self.count} declares {length} bytes; at most {self.max_bytes} are read")
            if len(self._held) - at - _LENGTH.size < length:
                break
            start = at + _LENGTH.size
            at, self.count = start + length, self.count + 1
            yield self._held[start:at]
        if at:
            del self._held[:at]

    def end(self) -> None:
        """Raises FrameError where the last frame was cut off."""
        if self._held:
            raise FrameError(f"{len(self._held)} bytes after frame {self.count}; it was cut off")


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
