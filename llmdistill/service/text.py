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
    elif not tokenizer.chat_template:
        raise invalid(f"{field}.prompt", "is a list of messages; the model has no chat template. Send text")
    elif not item.prompt:
        raise invalid(f"{field}.prompt", "is empty; the completion's first token needs one before it")
    else:
        try:
            messages = read_messages(item.prompt, f"{field}.prompt")
            text = template.prompt(messages, read_tools(item.tools, f"{field}.tools"))
        except UserError as error:
            raise invalid(f"{field}.prompt", f"is refused by the chat template: {first_line(error)}") from None
    special = isinstance(item.prompt, str)
    prompt_ids = text_ids(tokenizer, text, special=special)
    if not prompt_ids:
        raise invalid(f"{field}.prompt", "is empty; the completion's first token needs one before it")
    ids, offsets = behind_with_offsets(tokenizer, text, prompt_ids, item.completion, special=special)
    return TokenizedText(prompt_ids, ids, offsets)
