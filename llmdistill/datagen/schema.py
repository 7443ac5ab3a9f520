"""A trace: one completion that was written for one prompt, and everything that later steps ask about it.

A row of a trace file (JSONL, gzipped JSONL or Parquet) has these columns. Steps add columns and leave the others alone;
rows of other origin need no more than ``prompt`` and ``completion``.

    id           unique in the file: "PROMPT_ID/STYLE/INDEX"
    prompt_id    16 hex digits over the messages of the prompt; splits, pairs and pass rates go by it
    prompt       chat messages the student will be given: never privileged ones, which only a writer saw
    completion   text: thoughts and answer, special tokens that matter (thinking tags) included
    domain       of the prompt, or null
    answer       the right answer, or null
    tests        JSON of a program's tests as llmdistill.verify.code takes them, or null
    style        name of the writer
    index        number of the sample among those of its prompt and style
    finish       "stop": it ended by itself; "length": it was cut off
    seed         of the call that wrote its last part
    sampling     {temperature, top_p, top_k, max_new_tokens} of that call
    teacher      name of the model that wrote the last part, and
    fingerprint  of its weights: 16 hex digits, or "name:NAME" where an endpoint does not tell
    tokenizer    fingerprint of the vocabulary of token_ids, or null
    tokens       of the completion; 0 where that is not known
    prompt_ids   ids that the author of the last part read (a given prefix included), or null
    token_ids    that it sampled behind them, its end of turn included, or null. With one part: the completion
    logprobs     of each of token_ids (float32, nats), or null
    logprobs_of  "model": log-softmax at temperature 1; "sampling": of the distribution that was drawn from; null
    parts        who wrote what, in turn: [{role, model, fingerprint, chars, tokens, temperature, call}]; the role
                 "given" is a prefix that nobody sampled; call names the call in the folder of calls
    meta         JSON of what the writer says besides (a plan, a debate's other side, the prompt row's other columns)

Of verification: ``passed`` (bool, or null where nothing could be judged), ``verdict`` ("right", "wrong", "no_answer",
"timeout", a program's kind), ``extracted``, ``found_by``, ``reason``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

Message = dict[str, str]
Finish = Literal["stop", "length"]
LogprobsOf = Literal["model", "sampling"]


@dataclass(frozen=True)
class Part:
    """A stretch of a completion that one author wrote."""

    role: str
    model: str
    fingerprint: str
    chars: int
    tokens: int
    temperature: float | None = None
    call: str | None = None


@dataclass(frozen=True)
class Trace:
    """A row of a trace file; the module says what its columns mean. Verdicts are added as further columns."""

    id: str
    prompt_id: str
    prompt: list[Message]
    completion: str
    domain: str | None = None
    answer: str | None = None
    tests: str | None = None
    style: str = "plain"
    index: int = 0
    finish: Finish = "stop"
    seed: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)
    teacher: str = ""
    fingerprint: str = ""
    tokenizer: str | None = None
    tokens: int = 0
    prompt_ids: list[int] | None = None
    token_ids: list[int] | None = None
    logprobs: list[float] | None = None
    logprobs_of: LogprobsOf | None = None
    parts: list[Part] = field(default_factory=list)
    meta: str = "{}"

    def row(self) -> dict[str, Any]:
        """For a file, columns in the order of the schema."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**found, "parts": [vars(part) for part in self.parts]}

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Trace:
        """From a row; columns that are no trace's are left out.

        Raises:
            ValueError: no prompt or no completion.
        """
        check_row(row)
        known = {f.name: row[f.name] for f in fields(cls) if row.get(f.name) is not None}
        prompt = as_messages(row["prompt"])
        known |= {"prompt": prompt, "prompt_id": prompt_of(row)}
        known.setdefault("id", f"{known['prompt_id']}/{known.get('style', 'plain')}/{known.get('index', 0)}")
        return cls(**{**known, "parts": [Part(**part) for part in known.get("parts", [])]})


def as_messages(prompt: Any) -> list[Message]:
    """A prompt as messages: a text is a user's."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [dict(message) for message in prompt]


def prompt_id(prompt: Any) -> str:
    """16 hex digits over what a prompt says: a text and the one message with it share theirs."""
    said = [[m["role"], m["content"]] for m in as_messages(prompt)]
    return digest(said)


def prompt_of(row: Mapping[str, Any]) -> str:
    """The id of a row's prompt: its own, or made of what the prompt says."""
    return str(row.get("prompt_id") or prompt_id(row["prompt"]))


def digest(value: Any) -> str:
    """16 hex digits over JSON-like data, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def conversation(row: Mapping[str, Any]) -> list[Message]:
    """Prompt and completion as one conversation."""
    return [*as_messages(row["prompt"]), {"role": "assistant", "content": str(row["completion"])}]


def check_row(row: Mapping[str, Any], columns: Sequence[str] = ("prompt", "completion")) -> None:
    """Raises ValueError, with the reason, where a row is no trace or lacks one of ``columns``."""
    for name in columns:
        if row.get(name) is None:
            raise ValueError(f"no {name}")
    if "completion" in columns and not isinstance(row["completion"], str):
        raise ValueError(f"completion is a {type(row['completion']).__name__}, it must be text")
    if "prompt" in columns:
        check_prompt(row["prompt"])


def check_prompt(prompt: Any) -> None:
    """Raises ValueError where a prompt is neither text nor messages that say something."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError("prompt is empty")
        return
    if not isinstance(prompt, Sequence) or not prompt:
        raise ValueError("prompt is neither text nor a list of messages")
    for message in prompt:
        said = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not said or not isinstance(message.get("content"), str):
            raise ValueError("a message of prompt lacks role or content as text")
    if not any(message["content"].strip() for message in prompt):
        raise ValueError("prompt is empty")
