"""From text to the teacher's tokens, for students with another vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from llmdistill.errors import UserError
from llmdistill.service.problems import first_line, invalid
from llmdistill.texts.chat import ChatTemplate
from llmdistill.texts.messages import read_messages, read_tools
from llmdistill.texts.seam import behind_with_offsets, text_ids

if TYPE_CHECKING:
    from llmdistill.service.requests import TextItem


@dataclass(frozen=True)
class TokenizedText:
    """A prompt and a completion as the teacher reads them, split between the two."""

    prompt_ids: list[int]
    ids: list[int]
    offsets: list[tuple[int, int]]  # of every id: first and last + 1 character of the completion


def template_of(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any] | None = None) -> ChatTemplate:
    """The teacher's template, with what a request gives it beside the messages.

    Raises:
        Problem: 400, a name that the template does not read.
    """
    try:
        return ChatTemplate(tokenizer, kwargs=kwargs)
    except UserError as error:
        raise invalid("chat_template_kwargs", first_line(error).removeprefix("data.chat_template_kwargs ")) from None


def rendered(template: ChatTemplate, given: Any, tools: Any, field: str, tools_field: str) -> str:
    """Chat messages in the template, its generation prompt behind them.

    Raises:
        Problem: 400, naming the field: there is no template, there are no messages, or it refuses them.
    """
    if not template.tokenizer.chat_template:
        raise invalid(field, "is a list of messages; the model has no chat template. Send text")
    if not given:
        raise invalid(field, "is empty; the completion's first token needs one before it")
    try:
        return template.prompt(read_messages(given, field), read_tools(tools, tools_field))
    except UserError as error:
        raise invalid(field, f"is refused by the chat template: {first_line(error)}") from None


def tokenized(template: ChatTemplate, index: int, item: TextItem) -> TokenizedText:
    """The item's tokens. Chat messages get the template and its generation prompt; the completion stands as it is.

    Raises:
        Problem: 400, naming the item: no template for messages, messages it refuses, nothing before the completion.
    """
    field, tokenizer = f"items[{index}]", template.tokenizer
    if isinstance(item.prompt, str):
        if item.tools:
            raise invalid(f"{field}.tools", "are for a prompt of messages: no chat template writes a text")
        text = item.prompt
    else:
        text = rendered(template, item.prompt, item.tools, f"{field}.prompt", f"{field}.tools")
    special = isinstance(item.prompt, str)
    prompt_ids = text_ids(tokenizer, text, special=special)
    if not prompt_ids:
        raise invalid(f"{field}.prompt", "is empty; the completion's first token needs one before it")
    ids, offsets = behind_with_offsets(tokenizer, text, prompt_ids, item.completion, special=special)
    return TokenizedText(prompt_ids, ids, offsets)
