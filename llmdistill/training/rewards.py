"""Task rewards of sampled completions: verdicts, normalised over the samples of a prompt as in GRPO."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from importlib import import_module

from llmdistill.errors import UserError
from llmdistill.texts import Prompt

Reward = Callable[[Sequence[Prompt], Sequence[str]], Sequence[float]]


def math_reward(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    """1 where the completion's final answer is the row's ``answer``, else 0 (llmdistill.verify.math).

    Raises:
        UserError: a row has no answer.
    """
    from llmdistill.verify.math import verify_answer

    if without_answer := [p.row for p in prompts if not p.answer]:
        raise UserError(f"row {without_answer[0]} has no answer to verify against. Fix: --data.answer_column NAME.")
    return [float(verify_answer(text, p.answer)) for p, text in zip(prompts, completions, strict=True)]


math_reward.reads_answers = True  # type: ignore[attr-defined]  # what the preflight looks for

BUILT_IN: dict[str, Reward] = {"math": math_reward}


def load_reward(name: str) -> Reward:
    """``math``, or a function of yours as ``package.module:name``.

    Raises:
        UserError: there is none of that name.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, _, function = name.partition(":")
    try:
        reward = getattr(import_module(module), function) if function else None
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"objective.reward {name!r} cannot be loaded: {error}") from error
    if not callable(reward):
        raise UserError(
            f"objective.reward is {name!r}; it must be {' or '.join(BUILT_IN)}, or package.module:function taking "
            "(prompts, completions) and returning one number for each."
        )
    return reward  # type: ignore[no-any-return]


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
