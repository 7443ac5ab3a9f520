"""What writers have in common: a trace out of what was given and what models said."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping
from importlib import import_module
from typing import Any

from llmdistill.datagen.asking import Ask
from llmdistill.datagen.calls import Reply
from llmdistill.datagen.schema import Message, Part, Trace
from llmdistill.errors import UserError

Row = Mapping[str, Any]
Writer = Callable[[Row, Ask], Awaitable[list[Trace]]]
GIVEN = "given"  # the role of a part that nobody sampled


def find_writer(name: str | Writer) -> Writer:
    """A writer by its module in llmdistill.datagen.writers, or as package.module:function.

    Raises:
        UserError: none there.
    """
    if not isinstance(name, str):
        return name
    module, _, function = name.partition(":")
    where = module if function else f"llmdistill.datagen.writers.{name}"
    try:
        found = getattr(import_module(where), function or "write")
    except (ImportError, AttributeError) as error:
        raise UserError(f"writer {name!r} is not there: {error}. Fix: plain, or package.module:function.") from error
    return found  # type: ignore[no-any-return]


Piece = str | Reply | tuple[str, Reply]


def trace(row: Row, ask: Ask, style: str, *parts: Piece, meta: Mapping[str, Any] | None = None) -> Trace:
    """The trace of one completion.

    Args:
        parts: what it is made of, in turn: a given text, a reply, or the beginning of a reply, (text, reply), whose
            tokens are then counted by its share of characters. The last one is a reply.
        row: of the prompts; what it holds besides goes into ``meta``.
        style: name of the writer.
        meta: what else is to be kept.
    """
    last = parts[-1]
    assert isinstance(last, Reply), "a completion ends with what a model wrote"
    told = [part for piece in parts if piece for part in _parts(piece)]
    drawn = last.drawn
    return Trace(
        id=f"{row['prompt_id']}/{style}/{ask.sample}",
        prompt_id=row["prompt_id"],
        prompt=list(row["prompt"]),
        completion="".join(map(_text, parts)),
        domain=row.get("domain"),
        answer=row.get("answer"),
        tests=row.get("tests"),
        style=style,
        index=ask.sample,
        finish=drawn.finish,
        seed=last.call.sampling.seed,
        sampling=last.call.drawn,
        teacher=last.model,
        fingerprint=last.fingerprint,
        tokenizer=last.tokenizer if drawn.ids is not None else None,
        tokens=sum(part.tokens for part in told),
        prompt_ids=None if drawn.prompt_ids is None else list(drawn.prompt_ids),
        token_ids=None if drawn.ids is None else list(drawn.ids),
        logprobs=None if drawn.logprobs is None else [round(x, 6) for x in drawn.logprobs],
        logprobs_of=drawn.logprobs_of,
        parts=told,
        meta=json.dumps({**row.get("more", {}), **(meta or {})}, sort_keys=True, ensure_ascii=False, default=str),
    )


def with_hint(messages: list[Message], hint: str) -> list[Message]:
    """The chat with a text added to its last user message, behind a blank line."""
    at = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=len(messages) - 1)
    changed = {**messages[at], "content": f"{messages[at]['content']}\n\n{hint}"}
    return [*messages[:at], changed, *messages[at + 1 :]]


def chance(*what: Any) -> float:
    """A number in [0, 1) that is a function of what it is for: writers are asked twice, and must do the same."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64


def _text(piece: Piece) -> str:
    return piece if isinstance(piece, str) else piece[0] if isinstance(piece, tuple) else piece.text


def _parts(piece: Piece) -> list[Part]:
    if isinstance(piece, str):
        return [Part(GIVEN, "", "", len(piece), 0)]
    reply, text = (piece[1], piece[0]) if isinstance(piece, tuple) else (piece, piece.text)
    opened = min(reply.drawn.opened, len(text))
    given = [Part(GIVEN, "", "", opened, 0)] if opened else []
    tokens = round(reply.drawn.tokens * len(text) / max(len(reply.text), 1))
    written, temperature = len(text) - opened, reply.call.sampling.temperature
    return [*given, Part(reply.role, reply.model, reply.fingerprint, written, tokens, temperature, reply.name)]
