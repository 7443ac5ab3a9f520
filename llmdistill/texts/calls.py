"""Tool calls in the forms that templates read, and whether a template writes them.

Arguments are a mapping to some templates and JSON text to others; some write the calls of a message only where its
content is None. None says a word about what it leaves out. So a conversation is rendered with other names and results
in the place of its own, and those are looked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from llmdistill.errors import UserError
from llmdistill.texts.messages import Message

Form = Callable[[Message], Message]


class NotWritten(UserError):
    """A template leaves tool calls, or what tools answered, out."""


def uses_tools(messages: Sequence[Message]) -> bool:
    """Whether tools are called, or answer."""
    return any(m.get("tool_calls") or m["role"] == "tool" for m in messages)


def forms() -> tuple[Form, ...]:
    """Ways to put a message with tool calls, the usual one first."""
    return (_as_it_is, _text_arguments, _no_content, lambda message: _no_content(_text_arguments(message)))


def probe(messages: Sequence[Message]) -> tuple[list[Message], list[tuple[str, str]]]:
    """The conversation with other names in the places of the calls', and other results in the places of the tools'; and
    what is to be found in its text then, each with what it is called in an error."""
    changed, sought = list[Message](), list[tuple[str, str]]()
    for i, message in enumerate(messages):
        place = "the answer's" if i == len(messages) - 1 else "the"
        renamed = []
        for call in message.get("tool_calls") or ():
            function, name = _function(call), f"quince_{len(sought)}_"
            renamed.append(_with_function(call, {**function, "name": name}))
            sought.append((name, f"{place} tool call {str(function.get('name', ''))!r}"))
        new = {**message, "tool_calls": renamed} if renamed else message
        if message["role"] == "tool":
            new = {**new, "content": f"Quince {len(sought)}."}
            sought.append((new["content"], "what tools answer (role 'tool')"))
        changed.append(new)
    return changed, sought


def _as_it_is(message: Message) -> Message:
    return message


def _no_content(message: Message) -> Message:
    """A message of calls alone with None as its content."""
    return {**message, "content": None} if message.get("tool_calls") and not message["content"] else message


def _text_arguments(message: Message) -> Message:
    """Arguments as the text that they are in OpenAI's API."""

    def changed(call: Any) -> Any:
        function = _function(call)
        arguments = function.get("arguments")
        if isinstance(arguments, str | None):
            return call
        return _with_function(call, {**function, "arguments": json.dumps(arguments, ensure_ascii=False)})

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [changed(call) for call in calls]} if calls else message


def _function(call: Any) -> dict[str, Any]:
    return dict(call.get("function") or call)


def _with_function(call: Any, function: dict[str, Any]) -> dict[str, Any]:
    return {**call, "function": function} if call.get("function") else {**call, **function}
