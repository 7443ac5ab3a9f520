"""Rows to turns: a prompt with its answer, out of all the shapes in which rows have them.

A prompt is a string or a conversation. Its answer is in a column of its own (text, or messages of which the last is it,
with or without the prompt's messages before), or it is the conversation's last message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmdistill.errors import UserError
from llmdistill.recipe.data_config import DataConfig
from llmdistill.texts.columns import Columns
from llmdistill.texts.messages import Message, check_characters, from_json, is_chat, read_messages, read_tools


@dataclass(frozen=True)
class Turn:
    """What is asked and what is answered: text and text, or messages and the message behind them."""

    prompt: str | list[Message]
    answer: str | Message | None = None
    tools: list[Any] | None = None


class TurnReader:
    """Reads the turns of rows.

    Args:
        special: tokens that only a template writes.
        note: called with what was taken otherwise than it stands, and the row.
    """

    def __init__(self, config: DataConfig, special: Sequence[str], note: Callable[[str, int], None]) -> None:
        self.config, self.special, self.note = config, special, note

    def has_answer(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has a completion: in its column, or as the last message of the prompt."""
        row = Columns(self.config).row(row)
        completion, prompt = row.get(self.config.completion_column), from_json(row.get(self.config.prompt_column))
        if completion:
            return True
        return is_chat(prompt) and [m["role"] for m in read_messages(prompt, self.config.prompt_column)][-1:] == [
            "assistant"
        ]

    def of(self, row: Mapping[str, Any], index: int = 0) -> Turn:
        """The row's last turn: its prompt, and its answer where it has one.

        Raises:
            UserError: no prompt, messages that are none, or a prompt and a completion that do not meet.
        """
        return self.with_completion(row, row.get(self.config.completion_column), self.config.completion_column, index)

    def with_completion(
        self, row: Mapping[str, Any], completion: Any, column: str, index: int = 0, *, chat: bool = False
    ) -> Turn:
        """The row's prompt with ``completion``, which stands in ``column``: text, messages, or nothing.

        ``chat``: a prompt that is a string becomes a user message, as it does where the completion is messages.

        Raises:
            UserError: as :meth:`of`.
        """
        name, asked, completion = self.config.prompt_column, self._asked(row, index), from_json(completion)
        if completion is not None and not isinstance(completion, str) and not is_chat(completion):
            raise UserError(
                f"row {index}: {column} is {str(completion)[:80]!r}, a {type(completion).__name__}; it must be text or "
                "messages. Fix: mend the column."
            )
        tools = read_tools(row.get(self.config.tools_column), f"row {index}: {self.config.tools_column}")
        for what, text in ((name, asked), (column, completion)):
            if isinstance(text, str):
                check_characters(text, f"row {index}: {what}")
        if isinstance(asked, str):
            self._check_plain(asked, tools, index, chat or is_chat(completion))
            if not chat and not is_chat(completion):
                return Turn(asked, completion or None)
            self.note(
                "string prompts have chat completions; they are written by the chat template as user messages", index
            )
            asked = [{"role": "user", "content": asked}]
        answer: Message | None = None
        if is_chat(completion):
            said = self.read(completion, column, index)
            said = said[len(asked) :] if said[: len(asked)] == asked else said  # the whole conversation again
            if said:
                asked, answer = [*asked, *said[:-1]], said[-1]
                if answer["role"] != "assistant":
                    raise UserError(
                        f"row {index}: {column} ends with a message of role {answer['role']!r}; it must be the "
                        "assistant's. Fix: mend the row."
                    )
        elif completion:
            answer = {"role": "assistant", "content": completion}
        if asked[-1]["role"] == "assistant":
            if answer is not None and answer != asked[-1]:
                raise UserError(
                    f"row {index}: {name} ends with an assistant message and {column} has another answer. Fix: leave "
                    "one of them out."
                )
            asked, answer = asked[:-1], asked[-1]
        if not asked or asked[-1]["role"] == "assistant":
            what = "nothing" if not asked else "another assistant message"
            raise UserError(f"row {index}: {what} stands before the answer in {name}. Fix: a user's message there.")
        return Turn(asked, answer, tools)

    def counted(self, turn: Turn) -> list[Turn]:
        """The turns that count: the last one, or with ``data.assistant_turns: all`` each behind what was said before.

        Each is a text of its own: a template may write an earlier answer otherwise than the last (without its
        thoughts), and the student never generates it so.
        """
        if self.config.assistant_turns == "last" or isinstance(turn.prompt, str):
            return [turn]
        said = turn.prompt
        answered = [i for i in range(1, len(said)) if said[i]["role"] == "assistant" != said[i - 1]["role"]]
        return [*(Turn(said[:i], said[i], turn.tools) for i in answered), turn]

    def _asked(self, row: Mapping[str, Any], index: int) -> str | list[Message]:
        """The column of the prompt, in the usual form."""
        name = self.config.prompt_column
        prompt = from_json(row.get(name))
        if prompt is None and name not in row:
            raise UserError(
                f"row {index} has no column {name!r}, it has {', '.join(map(repr, row))}. "
                "Fix: --data.prompt_column NAME."
            )
        if isinstance(prompt, str):
            if not prompt:
                raise UserError(f"row {index}: {name} is empty. Fix: remove the row.")
            return prompt
        if prompt is not None and not is_chat(prompt):
            raise UserError(
                f"row {index}: {name} is {str(prompt)[:80]!r}, a {type(prompt).__name__}; it must be text or messages. "
                "Fix: mend the column."
            )
        messages = self.read(prompt, name, index) if is_chat(prompt) else []
        if not any(m["content"] for m in messages):
            raise UserError(f"row {index}: {name} has no message with content. Fix: remove the row.")
        return messages

    def read(self, value: Any, what: str, index: int) -> list[Message]:
        """Messages in the usual form; errors name the row."""
        try:
            return read_messages(value, what)
        except UserError as error:
            raise UserError(f"row {index}: {error}") from None

    def _check_plain(self, prompt: str, tools: Any, index: int, templated: bool) -> None:
        """Refuses a string prompt under settings that only a template reads, or one that is a template's work."""
        c = self.config
        read = {"system_prompt": c.system_prompt, "chat_template_kwargs": c.chat_template_kwargs, c.tools_column: tools}
        unread = next((name for name, value in read.items() if value), None)
        if not templated and unread is not None:
            what = f"row {index} has {unread}" if unread == c.tools_column else f"data.{unread} is set"
            raise UserError(
                f"row {index}: {c.prompt_column} is a string, which no chat template writes, and {what}. "
                "Fix: chat messages as prompts, or leave it out."
            )
        marks = [token for token in self.special if token in prompt] if templated else []
        if marks:
            raise UserError(
                f"row {index}: {c.prompt_column} is a string that holds {marks[0]!r}, and the completion is messages: "
                "the template would be applied twice. Fix: both as messages, or both as strings."
            )


def is_empty(answer: str | Message | None) -> bool:
    """Whether there is nothing to train on."""
    if isinstance(answer, dict):
        return not answer["content"].strip() and not answer.get("tool_calls")
    return not (answer or "").strip()


def with_hint(messages: Sequence[Message], hint: str) -> list[Message]:
    """The messages with ``hint`` at the end of the last user message."""
    changed = [dict(message) for message in messages]
    last = next((m for m in reversed(changed) if m["role"] == "user"), changed[-1])
    last["content"] = f"{last['content']}\n\n{hint}"
    return changed
