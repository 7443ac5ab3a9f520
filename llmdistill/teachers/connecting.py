"""Which teacher is behind an address: our service, with log-probs or with hidden states, or a plain vLLM server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmdistill.errors import UserError
from llmdistill.teachers.base import Teacher
from llmdistill.teachers.openai import PlainVLLMTeacher, tokenizer_named
from llmdistill.teachers.remote import RemoteTeacher
from llmdistill.teachers.remote_hidden import HiddenRemoteTeacher
from llmdistill.wire.protocol import INFO
from llmdistill.wire.transport import Get, Refused, Transport


def connect(url: str | Sequence[str], **options: Any) -> Teacher:
    """The teacher at ``url``: our service, or a plain vLLM OpenAI server. Waits until one of them answers.

    Args:
        options: of :class:`RemoteTeacher` or :class:`~llmdistill.teachers.openai.PlainVLLMTeacher`, whichever it is;
            what only the other one has is ignored. With ``hidden``, a form of states, and ``device`` it is a
            :class:`~llmdistill.teachers.remote_hidden.HiddenRemoteTeacher`.

    Raises:
        UserError: neither is there within ``max_outage_s``.
    """
    kinds: list[type[RemoteTeacher] | type[PlainVLLMTeacher]] = []

    def look(get: Get) -> None:
        try:
            get(INFO)
            kinds.append(RemoteTeacher)
        except Refused as refusal:
            if refusal.status != 404:
                raise
            get("/v1/models")
            kinds.append(PlainVLLMTeacher)

    hidden, device = options.pop("hidden", ""), options.pop("device", "cpu")
    own = {name: value for name, value in options.items() if name not in ("lossless", "tokenizer", "model")}
    probe = Transport(url, admit=look, **own)
    try:
        probe.wait_ready()
    finally:
        probe.close()
    if hidden and kinds[0] is PlainVLLMTeacher:
        raise UserError(
            f"teacher.hidden is {hidden}; at {url} is a plain OpenAI server, which has no hidden states to give. "
            "Fix: llmdistill serve, or leave teacher.hidden out."
        )
    if kinds[0] is PlainVLLMTeacher:
        options.pop("lossless", None)  # JSON is
    else:  # this one says what its tokenizer is; whoever sends it ids of its own needs the tokenizer itself
        options.pop("model", None)
        if isinstance(options.get("tokenizer"), str):
            options["tokenizer"] = tokenizer_named(options["tokenizer"])
    if hidden:
        return HiddenRemoteTeacher(url, form=hidden, device=device, **options)
    return kinds[0](url, **options)
