"""Verdicts as rewards, with the signature that TRL documents for reward functions.

    from llmdistill.verify.rewards import math_reward
    GRPOTrainer(model=..., reward_funcs=math_reward, train_dataset=dataset)   # a dataset with a column "answer"

``reward(prompts, completions, **columns) -> list[float | None]``, every argument by keyword: completions are texts or
lists of messages, ``columns`` those of the dataset, one value for each completion. 1 is right, 0 is wrong; None, of a
row without its column's value, is what TRL leaves out. ``objective.reward: math`` and ``choice`` of a recipe are these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmdistill.errors import UserError
from llmdistill.verify.asked import Asked, Kind
from llmdistill.verify.code import find_program, judge_program
from llmdistill.verify.math import judge_answers

Completion = str | Sequence[Mapping[str, Any]]
ANSWERS = ("answer", "solution", "gold")


def math_reward(
    prompts: Sequence[Any], completions: Sequence[Completion], **columns: Sequence[Any]
) -> list[float | None]:
    """1 where the completion's final answer is the row's ``answer`` (or ``solution``, or ``gold``), else 0.

    Raises:
        UserError: the dataset has no such column, or not as many values as completions.
    """
    return _answers(completions, columns, "math")


def choice_reward(
    prompts: Sequence[Any], completions: Sequence[Completion], **columns: Sequence[Any]
) -> list[float | None]:
    """1 where the completion chooses the option whose letter is the row's ``answer``, else 0. See ``math_reward``."""
    return _answers(completions, columns, "choice")


def code_reward(
    prompts: Sequence[Any], completions: Sequence[Completion], **columns: Sequence[Any]
) -> list[float | None]:
    """1 where the completion's program passes the row's ``tests``, else 0.

    ``tests`` is what ``llmdistill.verify.code.judge_program`` takes, {"style": "asserts", "test": ...} and the like, or
    that as JSON. Programs run confined; where nothing confines them here, that is the error.

    Raises:
        UserError: no column ``tests``, tests of another form, no confinement.
    """
    rows = _column(columns, ("tests",), len(completions))
    return [_code(text_of(c), tests) for c, tests in zip(completions, rows, strict=True)]


for _reward in (math_reward, choice_reward):
    _reward.reads_answers = True  # type: ignore[attr-defined]  # what the preflight looks for


def _code(text: str, tests: Any) -> float | None:
    if not tests:
        return None
    found: dict[str, Any] = (
        json.loads(tests) if isinstance(tests, str) else {k: v for k, v in tests.items() if v is not None}
    )
    program = find_program(text, entry_point=found.get("entry_point"), prompt=found.get("setup"))
    return float(judge_program(program, found).passed)


def _answers(completions: Sequence[Completion], columns: Mapping[str, Sequence[Any]], kind: Kind) -> list[float | None]:
    golds = ["" if gold is None else str(gold).strip() for gold in _column(columns, ANSWERS, len(completions))]
    asked = [Asked(text_of(c), gold, kind) for c, gold in zip(completions, golds, strict=True) if gold]
    verdicts = iter(judge_answers(asked))
    return [float(next(verdicts).passed) if gold else None for gold in golds]


def _column(columns: Mapping[str, Sequence[Any]], names: Sequence[str], count: int) -> Sequence[Any]:
    name = next((name for name in names if columns.get(name) is not None), None)
    if name is None:
        raise UserError(
            f"the reward needs a column {' or '.join(names)} in the dataset; it was given "
            f"{', '.join(sorted(columns)) or 'none'}. Fix: rename the column that holds it."
        )
    if len(columns[name]) != count:
        raise UserError(
            f"the reward was given {count} completions and {len(columns[name])} values of {name!r}; one each is needed"
        )
    return columns[name]


def text_of(completion: Completion) -> str:
    """The text of a completion: itself, or what the last assistant message of a conversation says."""
    if isinstance(completion, str):
        return completion
    said = [message for message in completion if message.get("role", "assistant") == "assistant"]
    content = said[-1].get("content") if said else ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content or [] if isinstance(part, Mapping))
