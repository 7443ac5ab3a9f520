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
    found = {}
    for name, where in named.items():
        module, _, attribute = where.partition(":")
        try:
            function = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(
                f"data.contexts.{name} is {where!r}: {error}. Fix: a module:function that is there."
            ) from None
        if not callable(function):
            raise UserError(f"data.contexts.{name} is {where!r}, which is no function. Fix: name one.")
        found[name] = function
    return found


def build_contexts(
    text: Text, functions: Mapping[str, ContextFunction], encode: PromptEncoder, group: int, decode: Decode
) -> Text:
    """The text with those contexts in its prompts. Up to ``group`` neighbours are the samples of one prompt.

    Raises:
        UserError: a function gives other than one context a completion.
    """
    written = decode(text.rollout, text.prompts, skip_special_tokens=True)
    prompts: list[Prompt] = []
    for part in _groups(text.prompts, 1 if text.author == "dataset" else group):
        row, index = dict(text.prompts[part.start].record or {}), text.prompts[part.start].row
        rewards = None if text.rewards is None else text.rewards[part]
        contexts: list[dict[str, tuple[int, ...]]] = [dict(p.contexts) for p in text.prompts[part]]
        for name, function in functions.items():
            given = list(function(row, written[part], rewards))
            if len(given) != len(contexts):
                raise UserError(
                    f"data.contexts.{name} gave {len(given)} contexts for the {len(contexts)} completions of row "
                    f"{index}. Fix: one for each, None where there is none."
                )
            for own, context in zip(contexts, given, strict=True):
                if context is not None:
                    own[name] = encode.in_context(row, context, f"data.contexts.{name}", index)
        prompts += [replace(p, contexts=own) for p, own in zip(text.prompts[part], contexts, strict=True)]
    return replace(text, prompts=prompts)


def _groups(prompts: Sequence[Prompt], most: int) -> list[slice]:
    """Neighbours of one row, at most so many: replayed samples have others beside them than those of their prompt."""
    starts = [i for i in range(len(prompts)) if i == 0 or prompts[i].row != prompts[i - 1].row]
    ends = [*starts[1:], len(prompts)]
    return [slice(i, min(i + most, b)) for a, b in zip(starts, ends, strict=False) for i in range(a, b, most)]
