"""Parts of laying a checkpoint out anew that need no launch; what a launch shows is in tests/distributed."""

from __future__ import annotations

import pytest

from llmdistill.texts import Prompt, collate
from llmdistill.texts.buffer import ReplayBuffer
from llmdistill.texts.sources import Adaptive
from llmdistill.training.relayout import _of_groups


@pytest.mark.parametrize(
    ("values", "count", "expected"),
    [([1, 2, 3], 3, [1, 2, 3]), ([1, 2, 3], 2, [1, 3]), ([1, 3], 3, [1, 1, 3])],
)
def test_a_schedule_of_groups_of_which_deepspeed_leaves_the_empty_one_out(
    values: list[int], count: int, expected: list[int]
) -> None:
    assert _of_groups(values, [False, True, False], count) == expected


def buffer(versions: list[int], capacity: int = 4) -> ReplayBuffer:
    """A sample of each step."""
    made = ReplayBuffer(capacity)
    for version in versions:
        prompt = Prompt([5, 6], "", row=version)
        made.add(collate([[5, 6]], [[7, version]], pad_id=0, policy_version=version), [prompt])
    return made


def versions(source: Adaptive) -> list[int]:
    return [sample.policy_version for sample in source.buffer.samples]


@pytest.mark.parametrize(
    ("ranks", "world", "expected"),
    [
        ([[1, 2], [1, 2]], 1, [[1, 1, 2, 2]]),
        ([[1, 2, 3], [1, 2, 3]], 1, [[2, 2, 3, 3]]),  # the newest: one process holds no more
        ([[1, 2, 3, 4]], 2, [[1, 3], [2, 4]]),
        ([[1, 2], [3, 4], [5, 6]], 2, [[1, 3, 5], [2, 4, 6]]),
    ],
)
def test_what_ranks_replay_is_shared_out_among_another_number_of_them(
    ranks: list[list[int]], world: int, expected: list[list[int]]
) -> None:
    """All of it, each once, where there is room."""
    states = [{"phi": 0.3, "last_loss": 1.5, "buffer": buffer(rank).state_dict()} for rank in ranks]
    for rank in range(world):
        source = Adaptive(capacity=4)
        source.load_state_dict(source.shared(states, rank, world))
        assert (source.phi, source.last_loss, versions(source)) == (0.3, 1.5, expected[rank])
        assert [s.completion for s in source.buffer.samples] == [[7, v] for v in expected[rank]]
