"""Task rewards of sampled completions, normalised over the samples of a prompt as in GRPO."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from llmdistill.errors import UserError
from llmdistill.texts import Prompt
from llmdistill.verify.rewards import choice_reward, math_reward

# TRL's signature: (prompts, completions, **columns) -> a number for each completion.
Reward = Callable[..., Sequence[float | None]]
BUILT_IN: dict[str, Reward] = {"math": math_reward, "choice": choice_reward}


def load_reward(name: str) -> Reward:
    """``math``, ``choice``, or a function of yours as ``package.module:name``.

    Raises:
        UserError: there is none of that name.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function) if function else None
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"objective.reward {name!r} cannot be loaded: {error}") from error
    if not callable(found):
        raise UserError(
            f"objective.reward is {name!r}; it must be {' or '.join(BUILT_IN)}, or package.module:function taking "
            "(prompts, completions, **columns) and returning one number for each."
        )
    return found  # type: ignore[no-any-return]


def task_rewards(reward: Reward, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    """The numbers of a reward function with TRL's signature.

    Its columns are those of the rows where they were kept, ``answer`` and ``row``; a function without ``**columns`` is
    given those that it names.

    Raises:
        UserError: a row has no answer to verify against.
    """
    if getattr(reward, "reads_answers", False) and (bare := [p.row for p in prompts if not p.answer]):
        raise UserError(f"row {bare[0]} has no answer to verify against. Fix: --data.answer_column NAME.")
    records = [p.record or {} for p in prompts]
    names = set.intersection(*(set(record) for record in records)) if records else set()
    columns: dict[str, Any] = {name: [record[name] for record in records] for name in sorted(names)}
    columns |= {"answer": [p.answer for p in prompts], "row": [p.row for p in prompts]}
    columns.pop("prompts", None), columns.pop("completions", None)
    taken = inspect.signature(reward).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values()):
        columns = {name: values for name, values in columns.items() if name in taken}
    found = reward([p.text for p in prompts], list(completions), **columns)
    return [float("nan") if number is None else float(number) for number in found]


def group_advantages(rewards: Sequence[float], group_size: int) -> list[float]:
    """(r - mean) / (std + 1e-4) within each run of ``group`` neighbours (GRPO, arXiv 2402.03300, section 4.1.2).

    The deviation is the sample's (n - 1), as TRL takes it; a group of equal rewards has advantage 0.

    Raises:
        ValueError: the rewards are no multiple of the group.
    """
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards in groups of {group_size}; a group has at least 2 and all are whole")
    advantages = []
    for start in range(0, len(rewards), group_size):
        group_rewards = [float(r) for r in rewards[start : start + group_size]]
        # Of equal numbers the mean is one of them: rounding must not become an advantage.
        mean = group_rewards[0] if min(group_rewards) == max(group_rewards) else statistics.fmean(group_rewards)
        std = statistics.stdev(group_rewards)
        advantages += [(r - mean) / (std + 1e-4) for r in group_rewards]
    return advantages
