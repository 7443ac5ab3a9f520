"""The section ``data`` of a recipe: which rows there are, what is in their columns, how long they may be."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from llmdistill.errors import UserError
from llmdistill.recipe.settings import option, require

TEMPLATE_ARGUMENTS = (  # of apply_chat_template: what is said with them is set elsewhere
    *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
)


@dataclass
class DataConfig:
    """Where prompts come from."""

    train: str = option("", "JSONL/Parquet/Arrow/CSV files (list, glob), folder or hub dataset of training prompts")
    heldout: str = option("", "the same for held-out prompts, or NAME: files of several sets; empty: not measured")
    subset: str = option("", "configuration of a dataset that has several (gsm8k: main)")
    split: str = option("train", "split to read of a dataset")
    heldout_split: str = option("", "split of data.heldout; empty: as data.split")
    streaming: bool = option(False, "read rows as they are needed (needs train.max_steps)")
    shuffle_buffer: int = option(1000, "streaming: rows among which the next one is drawn; 0: as they stand")
    prompt_column: str = option("prompt", "column with the prompt: a string or a list of chat messages")
    completion_column: str = option("completion", "column with the completion, for methods that train on a dataset")
    domain_column: str = option("domain", "column that names a row's domain, if there is one")
    answer_column: str = option("answer", "column with the right answer, for a task reward")
    max_prompt_tokens: int = option(1024, "longest prompt allowed, chat template included")
    overlong: Literal["error", "drop", "truncate_prompt"] = option(
        "error", "what to do with longer prompts; truncate_prompt: oldest turns, then the question's beginning, go"
    )
    max_answer_tokens: int = option(0, "longest completion of the dataset's own; 0: any")
    completion_overlong: Literal["truncate", "drop", "error"] = option(
        "truncate", "what to do with longer completions of the dataset; cut ones are not closed"
    )
    bad_rows: Literal["error", "skip"] = option("error", "skip leaves out rows that cannot be read, and counts them")
    limit: int = option(0, "use only the first so many rows; 0: all")
    text_column: str = option(
        "", "column with a document instead of prompts: its first token conditions, the rest counts"
    )
    max_text_tokens: int = option(2048, "documents: longer ones are cut into windows of so many tokens")
    weight_column: str = option(
        "", "column with a row's weight in the loss: a number, or one for each completion token"
    )
    system_prompt: str = option("", "system message of conversations that have none; empty: the template's own default")
    chat_template_kwargs: dict[str, Any] = option(
        {}, "what the chat template reads beside the messages, NAME: value, as {enable_thinking: false}"
    )
    tools_column: str = option("tools", "column with a conversation's tools for the template, if there is one")
    assistant_turns: Literal["last", "all"] = option(
        "last", "of conversations with several answers: the last one counts, or all, each behind what came before it"
    )
    contexts: dict[str, str] = option(
        {}, "other contexts of a row's completions, NAME: column, or NAME: module:function of what was sampled"
    )

    def __post_init__(self) -> None:
        self.train, self.heldout = sources(self.train, "data.train"), sources(self.heldout, "data.heldout")
        require(not isinstance(self.train, dict), "data.train", self.train, "files or a dataset", "a list of them")
        require(self.max_prompt_tokens >= 1, "data.max_prompt_tokens", self.max_prompt_tokens, ">= 1", "use 1024")
        for name in ("shuffle_buffer", "max_answer_tokens", "limit"):
            require(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), ">= 0", "use 0")
        require(self.max_text_tokens >= 2, "data.max_text_tokens", self.max_text_tokens, ">= 2", "use 2048")
        for name in self.chat_template_kwargs:
            ours = name in TEMPLATE_ARGUMENTS
            require(not ours, "data.chat_template_kwargs", name, "a name that only the template reads", "leave it out")
        for name, where in self.contexts.items():
            require(bool(name and where), f"data.contexts.{name}", where, "a column or module:function", "name one")
        require(
            not (self.contexts and self.assistant_turns == "all"),
            "data.contexts",
            self.contexts,
            "empty for data.assistant_turns all: a row has one of them, for its last answer",
            "leave one out",
        )
        require(
            not (self.text_column and self.contexts),
            "data.contexts",
            self.contexts,
            "empty beside data.text_column: a document has no prompt that could be another one",
            "leave one out",
        )


def sources(given: Any, setting: str) -> Any:
    """Files of a recipe: a name, a list of names, or of held-out sets a mapping; on the command line as YAML."""
    if isinstance(given, str) and given.startswith(("[", "{")):
        try:
            given = yaml.safe_load(given)
        except yaml.YAMLError:
            raise UserError(f"{setting} is {given!r}, which is no list. Fix: --{setting} '[A, B]'.") from None
    entries = given.values() if isinstance(given, dict) else [given]
    for entry in entries:
        names = entry if isinstance(entry, list | tuple) else [entry]
        good = bool(names) and all(isinstance(name, str | os.PathLike) for name in names)
        require(good, setting, given, "a file or dataset, or a list of files", f"--{setting} FILE")
    if isinstance(given, dict):
        return {str(name): sources(entry, setting) for name, entry in given.items()}
    return [os.fspath(name) for name in given] if isinstance(given, list | tuple) else os.fspath(given)
