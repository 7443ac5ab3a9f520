"""The tags that models think, and call tools, between; both differ by family."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# (opening, closing), the commonest first
THINK_TAGS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<seed:think>", "</seed:think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
)


# Around one call, or a list of them.
CALL_TAGS = (
    ("<tool_call>", "</tool_call>"),
    ("<|tool_call|>", "<|/tool_call|>"),
    ("<|tool_call_start|>", "<|tool_call_end|>"),
    ("<tool_calls>", "</tool_calls>"),
    ("<function_calls>", "</function_calls>"),
    ("<minimax:tool_call>", "</minimax:tool_call>"),
    ("<seed:tool_call>", "</seed:tool_call>"),
)


def think_tags(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The tags of a tokenizer: those it has tokens for, else those in its chat template; none if it has neither."""
    return _tags(tokenizer, THINK_TAGS)


def call_tags(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """As :func:`think_tags`, of calls."""
    return _tags(tokenizer, CALL_TAGS)


def _tags(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    vocabulary = tokenizer.get_vocab()
    template = tokenizer.chat_template
    source = "\n".join(template.values()) if isinstance(template, dict) else template or ""
    for known in (vocabulary.__contains__, source.__contains__):
        for opening, closing in pairs:
            if known(opening) and known(closing):
                return opening, closing
    return ()
