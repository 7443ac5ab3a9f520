"""The tags that models think between, which differ by family."""

from __future__ import annotations

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


def think_tags(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The tags of a tokenizer: those it has tokens for, else those in its chat template; none if it has neither."""
    vocabulary = tokenizer.get_vocab()
    template = tokenizer.chat_template
    source = "\n".join(template.values()) if isinstance(template, dict) else template or ""
    for known in (vocabulary.__contains__, source.__contains__):
        for opening, closing in THINK_TAGS:
            if known(opening) and known(closing):
                return opening, closing
    return ()
