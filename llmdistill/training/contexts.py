"""Contexts that are built in a round, from what was sampled and how it was rewarded: a sibling's success, a message."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmdistill.composition.batch import Text
from llmdistill.errors import UserError
from llmdistill.texts import Prompt
from llmdistill.texts.prompts import PromptEncoder

# f(row, completions, rewards or None) -> for each completion a string, chat messages, or None: left out of the term
ContextFunction = Callable[[dict[str, Any], list[str], list[float] | None], Sequence[Any]]
Decode = Callable[..., list[str]]  # (rollout, prompts, skip_special_tokens) -> completions


def load_functions(named: Mapping[str, str]) -> dict[str, ContextFunction]:
    """The functions that ``data.contexts`` names as ``module:function``.

    Raises:
        UserError: no such module, or nothing callable there.
    """
    functions = {}
    for name, path in named.items():
        module, _, attribute = path.partition(":")
        try:
            function = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(
                f"data.contexts.{name} is {path!r}: {error}. Fix: a module:function that is there."
            ) from None
        if not callable(function):
            raise UserError(f"data.contexts.{name} is {path!r}, which is no function. Fix: name one.")
        functions[name] = function
    return functions


def build_contexts(
    text: Text, functions: Mapping[str, ContextFunction], encode: PromptEncoder, group_size: int, decode: Decode
) -> Text:
    """The text with those contexts in its prompts. Up to ``group`` neighbours are the samples of one prompt.

    Raises:
        UserError: a function gives other than one context a completion.
    """
    completions = decode(text.rollout, text.prompts, skip_special_tokens=True)
    prompts: list[Prompt] = []
    for sample_slice in _groups(text.prompts, 1 if text.author == "dataset" else group_size):
        row, row_index = dict(text.prompts[sample_slice.start].record or {}), text.prompts[sample_slice.start].row
        rewards = None if text.rewards is None else text.rewards[sample_slice]
        contexts: list[dict[str, tuple[int, ...]]] = [dict(p.contexts) for p in text.prompts[sample_slice]]
        for name, function in functions.items():
            new_contexts = list(function(row, completions[sample_slice], rewards))
            if len(new_contexts) != len(contexts):
                raise UserError(
                    f"data.contexts.{name} gave {len(new_contexts)} contexts for the {len(contexts)} completions of "
                    f"row {row_index}. Fix: one for each, None where there is none."
                )
            for prompt_contexts, context in zip(contexts, new_contexts, strict=True):
                if context is not None:
                    prompt_contexts[name] = encode.in_context(row, context, f"data.contexts.{name}", row_index)
        prompts += [
            replace(p, contexts=prompt_contexts)
            for p, prompt_contexts in zip(text.prompts[sample_slice], contexts, strict=True)
        ]
    return replace(text, prompts=prompts)


def _groups(prompts: Sequence[Prompt], most: int) -> list[slice]:
    """Neighbours of one row, at most so many: replayed samples have others beside them than those of their prompt."""
    starts = [i for i in range(len(prompts)) if i == 0 or prompts[i].row != prompts[i - 1].row]
    ends = [*starts[1:], len(prompts)]
    return [slice(i, min(i + most, b)) for a, b in zip(starts, ends, strict=False) for i in range(a, b, most)]
