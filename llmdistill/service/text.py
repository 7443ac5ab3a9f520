"""From text to the teacher's tokens, for students with another vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from llmdistill.service.problems import first_line, invalid

if TYPE_CHECKING:
    from llmdistill.service.requests import TextItem


@dataclass(frozen=True)
class TokenizedText:
    """A prompt and a completion as the teacher reads them, split between the two."""

    prompt_ids: list[int]
    ids: list[int]
    offsets: list[tuple[int, int]]  # of every id: first and last + 1 character of the completion


def tokenized(tokenizer: PreTrainedTokenizerBase, index: int, item: TextItem) -> TokenizedText:
    """The item's tokens. Chat messages get the template and its generation prompt.

    Raises:
        Problem: 400, naming the item: no template for messages, messages it refuses, nothing before the completion.
    """
    field = f"items[{index}]"
    if isinstance(item.prompt, str):
        prompt_ids = tokenizer(item.prompt)["input_ids"]
    elif not tokenizer.chat_template:
        raise invalid(f"{field}.prompt", "is a list of messages; the model has no chat template. Send text")
    else:
        try:
            text = tokenizer.apply_chat_template(item.prompt, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            raise invalid(f"{field}.prompt", f"is refused by the chat template: {first_line(error)}") from None
        prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not prompt_ids:
        raise invalid(f"{field}.prompt", "is empty; the completion's first token needs one before it")
    encoded = tokenizer(item.completion, add_special_tokens=False, return_offsets_mapping=True)
    return TokenizedText(list(prompt_ids), list(encoded["input_ids"]), [tuple(o) for o in encoded["offset_mapping"]])
