"""Task rewards: the verified one, one of the user's, and their normalisation over a prompt's samples."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from llmdistill.errors import UserError
from llmdistill.texts import Prompt
from llmdistill.training.rewards import group_advantages, load_reward, task_rewards
from llmdistill.verify.rewards import choice_reward, code_reward, math_reward


def asked(*answers: str) -> list[Prompt]:
    return [Prompt([1], "question", row=i, answer=a) for i, a in enumerate(answers)]


def test_answers_are_verified_and_not_compared_as_text() -> None:
    completions = [
        "We add them.\n\\boxed{\\frac{1}{2}}",
        "The answer is 0.5.",
        "So there are 1,234 of them. The answer is 1234.",
        "The answer is 43.",
        "I do not know.",
        "",
    ]
    assert task_rewards(math_reward, asked("1/2", "\\frac12", "1,234", "42", "42", "42"), completions) == [
        1,
        1,
        1,
        0,
        0,
        0,
    ]


def test_a_row_without_an_answer_is_named() -> None:
    with pytest.raises(UserError, match=r"row 1 has no answer to verify against. Fix: --data.answer_column NAME"):
        task_rewards(math_reward, asked("1", ""), ["1", "1"])


def test_a_reward_of_ones_own_is_given_the_columns_that_it_names() -> None:
    prompts = [
        Prompt([1], "q", answer="a", record={"level": 3, "hint": "h"}),
        Prompt([1], "r", answer="b", record={"level": 5}),
    ]

    def named(prompts: list[str], completions: list[str], level: list[int]) -> list[float]:
        assert prompts == ["q", "r"]
        return [n + len(c) for n, c in zip(level, completions, strict=True)]

    seen: dict[str, object] = {}

    def all_of_them(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
        seen.update(columns)
        return [0.0, 1.0]

    assert task_rewards(named, prompts, ["x", "yy"]) == [4, 7]
    assert task_rewards(all_of_them, prompts, ["x", "yy"]) == [0, 1]
    assert seen == {"level": [3, 5], "answer": ["a", "b"], "row": [0, 0]}, "columns that some rows lack are left out"


def trl_calls(reward: object, completions: list[object], **columns: list[object]) -> list[float | None]:
    """As TRL's GRPOTrainer calls it: everything by keyword, its own extras among the columns."""
    extras = {
        "completion_ids": [[1]] * len(completions),
        "trainer_state": None,
        "log_extra": print,
        "log_metric": print,
    }
    return reward(prompts=["q"] * len(completions), completions=completions, **columns, **extras)  # type: ignore[operator]


def test_rewards_have_the_signature_of_trl() -> None:
    told = [{"role": "assistant", "content": "It is \\boxed{0.5}."}]
    assert trl_calls(math_reward, ["The answer is 4.", told, "5"], answer=["5", "1/2", None]) == [0, 1, None]
    assert trl_calls(math_reward, ["5"], solution=["We add.\n#### 5"]) == [1]
    assert trl_calls(choice_reward, ["Option A is wrong, so B is correct.", "Answer: C"], answer=["B", "D"]) == [1, 0]
    with pytest.raises(UserError, match="needs a column answer or solution or gold in the dataset; it was given"):
        trl_calls(math_reward, ["5"], target=["5"])
    with pytest.raises(UserError, match="2 completions and 1 values of 'answer'"):
        trl_calls(math_reward, ["5", "6"], answer=["5"])


def test_programs_are_rewarded_by_their_tests() -> None:
    tests = {"style": "asserts", "test": "assert double(2) == 4", "entry_point": "double"}
    right, wrong = (f"```python\ndef double(x):\n    return {n} * x\n```" for n in (2, 3))
    assert trl_calls(code_reward, [right, wrong, "none"], tests=[tests, json.dumps(tests), tests]) == [1, 0, 0]
    assert trl_calls(code_reward, [right], tests=[None]) == [None]
    with pytest.raises(UserError, match="needs a column tests"):
        trl_calls(code_reward, [right], answer=["4"])


def test_names_of_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def length(prompts, completions): return [len(c) for c in completions]\nX = 1"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_reward("math") is math_reward
    assert task_rewards(load_reward("my_rewards:length"), asked("", ""), ["ab", "c"]) == [2, 1]
    for name, said in (
        ("maths", "it must be math or choice, or package.module:function"),
        ("my_rewards", "it must be math or choice, or package.module:function"),
        ("my_rewards:X", "it must be math or choice, or package.module:function"),
        ("my_rewards:", "it must be math or choice, or package.module:function"),
        ("my_rewards:longest", "'my_rewards:longest' cannot be loaded: .*longest"),
        ("no_such_module_here:f", "cannot be loaded: No module named"),
        (":f", "cannot be loaded"),
    ):
        with pytest.raises(UserError, match=said):
            load_reward(name)


def test_advantages_are_those_of_grpo() -> None:
    """(r - mean) / (std + 1e-4) over neighbours, the sample's deviation."""
    rewards = [1.0, 0.0, 0.0, 1.0, 3.0, 5.0, 4.0, 0.0]
    for group in (2, 4, 8):
        expected = []
        for start in range(0, 8, group):
            part = rewards[start : start + group]
            mean = sum(part) / group
            std = (sum((r - mean) ** 2 for r in part) / (group - 1)) ** 0.5
            expected += [(r - mean) / (std + 1e-4) for r in part]
        assert group_advantages(rewards, group) == pytest.approx(expected, rel=1e-12)
    found = group_advantages(rewards, 4)
    assert sum(found[:4]) == pytest.approx(0, abs=1e-12) and statistics.stdev(found[4:]) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -3.7, 1e9])
def test_equal_rewards_say_nothing(reward: float) -> None:
    assert group_advantages([reward] * 3 + [0.0, 1.0, 0.0], 3)[:3] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("count,group", [(4, 1), (5, 2), (4, 0), (3, 4)])
def test_groups_that_do_not_fit(count: int, group: int) -> None:
    with pytest.raises(ValueError, match=f"{count} rewards in groups of {group}"):
        group_advantages([1.0] * count, group)
