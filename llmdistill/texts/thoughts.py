"""An answer's thoughts: apart from its words or between marks within them, and what a prompt says of them.

    {"role": "assistant", "reasoning_content": "a sum", "content": "4"}
    {"role": "assistant", "content": "<think>\\na sum\\n</think>\\n\\n4"}

Templates read the one, the other, or both; some open the thoughts in the prompt already, some close them there to say
that none follow. Names under which templates keep thoughts apart: ``reasoning_content`` (Qwen, DeepSeek, GLM),
``reasoning`` (Gemma 4), ``thinking`` (gpt-oss).
"""

from __future__ import annotations

import re
from typing import Any

REASONING = "reasoning_content"
NAMES = (REASONING, "reasoning", "thinking")
MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))


def named(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its thoughts under the usual name, whichever of them it has."""
    found = next((message[name] for name in NAMES if isinstance(message.get(name), str)), None)
    if found is None:
        return message
    rest = {key: value for key, value in message.items() if key not in NAMES}
    return {**rest, REASONING: found} if found.strip() else rest


def names_read(source: str) -> list[str]:
    """The names under which a template reads the thoughts of a message."""
    return [name for name in NAMES if re.search(rf"\.{name}\b|['\"]{name}['\"]", source)]


def marks_written(source: str) -> bool:
    """Whether a template knows thoughts between marks."""
    return any(close in source for _, close in MARKS)


def has_thoughts(message: dict[str, Any]) -> bool:
    """Whether a message has thoughts, apart or between marks."""
    return bool(message.get(REASONING)) or any(open in message["content"] for open, _ in MARKS)


def apart(message: dict[str, Any]) -> dict[str, Any] | None:
    """The message with the thoughts taken out of its content; None where there are none between marks, or they have no
    end."""
    content = message["content"]
    for open, close in MARKS:
        before, found, after = content.partition(close)
        if found and not message.get(REASONING) and (before.lstrip().startswith(open) or open not in before):
            thoughts = before.lstrip().removeprefix(open).strip()
            return {**message, "content": after.lstrip(), **({REASONING: thoughts} if thoughts else {})}
    return None


def within(message: dict[str, Any]) -> str:
    """The content with the thoughts in front, between the usual marks."""
    thoughts, (open, close) = message.get(REASONING), MARKS[0]
    return f"{open}\n{thoughts}\n{close}\n\n{message['content']}" if thoughts else str(message["content"])


def opened(prompt: str) -> tuple[str, str] | None:
    """The marks of the thoughts that a prompt opens at its end."""
    return next((marks for marks in MARKS if prompt.rstrip().endswith(marks[0])), None)


def closed(prompt: str) -> bool:
    """Whether a prompt ends with thoughts that are over: the answer is to have none."""
    return any(prompt.rstrip().endswith(close) for _, close in MARKS)


def blocks(text: str) -> int:
    """How often thoughts end in a text."""
    return sum(text.count(close) for _, close in MARKS)
