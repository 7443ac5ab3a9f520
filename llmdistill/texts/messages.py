"""Chat messages as people keep them, in the one form that templates are given.

    {"role": "user", "content": "2+2?"}

What is understood beside it: ShareGPT's ``{"from": "human", "value": ...}``, a struct of lists (how ``datasets`` keeps
a sequence of structs), all of it as JSON text, keys that are None because Parquet gives every message the keys of all,
content as a list of text parts, arguments of tool calls as JSON text. Simplified away: images and sound, which no text
model reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from llmdistill.errors import UserError
from llmdistill.texts.thoughts import named

Message = dict[str, Any]

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
_USUAL = ("system", "developer", "user", "assistant", "tool")
_TEXT_PARTS = ("text", "input_text", "output_text")
_HALF = re.compile("[\ud800-\udfff]")


def is_chat(value: Any) -> bool:
    """Whether a column holds messages, and not text or nothing."""
    return isinstance(value, Mapping) or (isinstance(value, Sequence) and not isinstance(value, str | bytes))


def from_json(value: Any) -> Any:
    """Messages that a file without structs (CSV, a column of strings) keeps as JSON text; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    try:
        read = json.loads(value)
    except json.JSONDecodeError:
        return value
    chat = all(isinstance(m, dict) and ({"role", "content"} <= m.keys() or {"from", "value"} <= m.keys()) for m in read)
    return read if chat else value


def read_messages(value: Any, what: str) -> list[Message]:
    """The messages of a column in the usual form; nothing of ``value`` is changed.

    Args:
        value: messages, as a list or as a struct of lists.
        what: the column or setting they are from, for errors.

    Raises:
        UserError: something that is no message, or content that is not text.
    """
    if isinstance(value, Mapping) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str):
        value = [value]  # one message is a list of one
    if isinstance(value, Mapping):
        value = _transposed(value, what)
    return [_message(entry, f"{what}[{i}]") for i, entry in enumerate(value)]


def read_tools(value: Any, what: str) -> list[Any] | None:
    """Tools for a template: a list of JSON schemas, or such a list as JSON text; None where there is none.

    Raises:
        UserError: neither of them.
    """
    tools = _without_none(value)
    if isinstance(value, str) and value.strip():
        try:
            tools = json.loads(value)
        except json.JSONDecodeError:
            tools = value
    if isinstance(tools, Mapping):
        tools = [tools] if tools else None
    if tools is None or (is_chat(tools) and not len(tools)) or (isinstance(tools, str) and not tools.strip()):
        return None
    if not is_chat(tools) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(
            f"{what} is {str(value)[:80]!r}; it must be a list of tools' JSON schemas, or one as JSON text. Fix: mend "
            "the row, or --data.tools_column '' if the column means something else."
        )
    return list(tools)


def _message(entry: Any, what: str) -> Message:
    if not isinstance(entry, Mapping):
        raise UserError(
            f"{what} is {str(entry)[:80]!r}; it must be a message with role and content. Fix: mend the row."
        )
    message = {key: _without_none(value) for key, value in entry.items() if value is not None}
    for other, usual in (("from", "role"), ("value", "content")):
        if other in message and usual not in message:
            message[usual] = message.pop(other)
    if not isinstance(message.get("role"), str):
        raise UserError(
            f"{what} has the keys {', '.join(map(repr, entry)) or 'nothing'}; it must have role and content (or "
            "ShareGPT's from and value). Fix: mend the row."
        )
    lowered = message["role"].lower()
    message["role"] = ROLES.get(lowered, lowered if lowered in _USUAL else message["role"])
    # A message of tool calls alone: templates ask for the key, and would write "None" where it is None.
    message["content"] = _content(message.get("content", ""), what)
    if isinstance(function := message.pop("function_call", None), Mapping):  # OpenAI's first form
        message.setdefault("tool_calls", [{"type": "function", "function": function}])
    if calls := message.pop("tool_calls", None):  # templates ask for the key: no calls is none at all
        message["tool_calls"] = _calls(calls, what)
    return named(message)


def check_characters(text: str, what: str) -> None:
    """Refuses halves of characters, which JSON can spell (``"\\ud83d"`` alone) and no encoding can.

    Raises:
        UserError: the first of them.
    """
    if half := _HALF.search(text):
        raise UserError(
            f"{what} holds {half[0]!r}, half of a character, which no tokenizer reads. Fix: mend the row, or "
            "--data.bad_rows skip."
        )


def _content(content: Any, what: str) -> str:
    if isinstance(content, str):
        check_characters(content, f"{what}.content")
        return content
    parts = [{"type": "text", "text": p} if isinstance(p, str) else p for p in content] if is_chat(content) else None
    if parts is None or not all(isinstance(p, Mapping) for p in parts):
        raise UserError(f"{what}.content is {str(content)[:80]!r}; it must be text, or parts of it. Fix: mend the row.")
    for part in parts:
        kind = part.get("type", "text")
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise UserError(
                f"{what}.content has a part of type {kind!r}; only text is read here. Fix: remove the part, or the row."
            )
    text = "".join(part["text"] for part in parts)
    check_characters(text, f"{what}.content")
    return text


def _calls(calls: Any, what: str) -> list[Any]:
    """Tool calls as a list, which some keep as JSON text, or as the only one there is."""
    if isinstance(calls, str):
        with suppress(json.JSONDecodeError):
            calls = json.loads(calls)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not is_chat(calls) or not all(isinstance(call, Mapping) for call in calls):
        raise UserError(
            f"{what}.tool_calls is {str(calls)[:80]!r}; it must be a list of tool calls. Fix: mend the row."
        )
    return [_call(call) for call in calls]


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as a mapping: templates write them as JSON, and JSON text would be quoted."""
    function = call.get("function")
    if isinstance(function, Mapping):
        return {**call, "function": _call(function)}
    arguments = call.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            read = json.loads(arguments)
        except json.JSONDecodeError:
            return dict(call)
        return {**call, "arguments": read} if isinstance(read, dict) else dict(call)
    return {**call, "arguments": arguments}


def _transposed(struct: Mapping[str, Any], what: str) -> list[Message]:
    lengths = {len(v) if is_chat(v) else -1 for v in struct.values()}
    if len(lengths) != 1 or lengths == {-1}:
        raise UserError(f"{what} is {str(dict(struct))[:80]!r}; it must be a list of messages. Fix: mend the row.")
    return [dict(zip(struct, values, strict=True)) for values in zip(*struct.values(), strict=True)]


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(v) for key, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_none(v) for v in value]
    return value
