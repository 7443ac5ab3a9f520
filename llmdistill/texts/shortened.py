"""Prompts over the limit, made to fit (``data.overlong: truncate_prompt``): what is nearest to the answer stays.

A string loses its beginning. A conversation first loses its oldest turns whole (system messages stay), then the
beginning of its last user message. It is shortened before the template writes it, so what the template writes around
messages, the generation prompt included, is always whole, and a judge of another template reads the same words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from llmdistill.texts.messages import Message
from llmdistill.texts.turns import Turn

TRIES = 8  # a suffix tokenised anew may have a token more than it had in the whole


def shortened(turn: Turn, limit: int, length: Callable[[Turn], int], tokenizer: PreTrainedTokenizerBase) -> Turn | None:
    """The turn with a prompt of at most ``limit`` tokens; None where not even its frame fits.

    Args:
        length: tokens of a turn's prompt as it is written.
    """
    if isinstance(turn.prompt, str):
        return _cut(turn.prompt, limit, lambda text: replace(turn, prompt=text), length, tokenizer)
    turn = replace(turn, prompt=_newest(turn, limit, length))
    assert isinstance(turn.prompt, list)
    users = [i for i, message in enumerate(turn.prompt) if message["role"] == "user"]
    at = users[-1] if users else len(turn.prompt) - 1
    content = turn.prompt[at]["content"]

    def with_content(text: str) -> Turn:
        assert isinstance(turn.prompt, list)
        return replace(turn, prompt=[*turn.prompt[:at], {**turn.prompt[at], "content": text}, *turn.prompt[at + 1 :]])

    return turn if length(turn) <= limit else _cut(content, limit, with_content, length, tokenizer)


def _newest(turn: Turn, limit: int, length: Callable[[Turn], int]) -> list[Message]:
    """The system messages, and as many of the last turns as fit, at least the last user message and what follows."""
    assert isinstance(turn.prompt, list)
    system = [m for m in turn.prompt if m["role"] in ("system", "developer")]
    said = [m for m in turn.prompt if m["role"] not in ("system", "developer")]
    starts = [i for i, message in enumerate(said) if message["role"] == "user"] or [0]
    for start in starts[:-1]:
        if length(replace(turn, prompt=[*system, *said[start:]])) <= limit:
            return [*system, *said[start:]]
    return [*system, *said[starts[-1] :]]


def _cut(
    text: str,
    limit: int,
    turn_of: Callable[[str], Turn],
    length: Callable[[Turn], int],
    tokenizer: PreTrainedTokenizerBase,
) -> Turn | None:
    """The turn with the longest end of ``text`` that fits."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    kept = len(ids)
    for _ in range(TRIES):
        kept -= max(length(turn_of(text)) - limit, 1)
        if kept <= 0:
            return None
        decoded = tokenizer.decode(ids[-kept:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text = str(decoded).lstrip("\ufffd")  # half a character is none
        if length(turn_of(text)) <= limit:
            return turn_of(text) if text else None
    return None
