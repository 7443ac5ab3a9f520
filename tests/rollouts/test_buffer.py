"""The replay buffer: what goes in comes out as it was written, the oldest leave, and a checkpoint holds all of it."""

from __future__ import annotations

import io

import pytest
import torch

from llmdistill.texts import Prompt, Rollout, collate
from llmdistill.texts.buffer import ReplayBuffer


def written(numbers: range, *, logprobs: bool = True, finish: bool = True) -> tuple[Rollout, list[Prompt]]:
    """Sequence i: a prompt of 1 + i % 3 tokens, a completion of 1 + i % 4, log-probs that name both."""
    prompts = [
        Prompt([10 + i] * (1 + i % 3), f"p{i}", "even" if i % 2 == 0 else None, i, (3, i), str(i)) for i in numbers
    ]
    completions = [[100 + i] * (1 + i % 4) for i in numbers]
    rollout = collate(
        [p.ids for p in prompts],
        completions,
        pad_id=0,
        behavior_logprobs=[[-float(i)] * len(c) for i, c in zip(numbers, completions, strict=True)]
        if logprobs
        else None,
        finish=["length" if i % 3 == 0 else "stop" for i in numbers] if finish else (),
        domain=[p.domain for p in prompts],
        policy_version=numbers.start,
    )
    return rollout, prompts


def same(rollout: Rollout, b: int, prompt: Prompt) -> None:
    """Sequence b is the one that was written for the prompt, to the last field."""
    i = prompt.row
    n, m = len(prompt.ids), 1 + i % 4
    assert prompt == Prompt([10 + i] * (1 + i % 3), f"p{i}", "even" if i % 2 == 0 else None, i, (3, i), str(i))
    assert rollout.input_ids[b].tolist()[: n + m] == [10 + i] * n + [100 + i] * m
    assert rollout.attention_mask[b].sum() == n + m and rollout.completion_mask[b].nonzero().flatten().tolist() == [
        *range(n, n + m)
    ]
    if rollout.behavior_logprobs is not None:
        assert rollout.behavior_logprobs[b, n : n + m].tolist() == [-float(i)] * m
    if rollout.finish:
        assert rollout.finish[b] == ("length" if i % 3 == 0 else "stop")
    assert rollout.domain is not None and rollout.domain[b] == prompt.domain


@pytest.mark.parametrize("logprobs,finish", [(True, True), (False, True), (True, False)])
def test_what_comes_out_is_what_was_written(logprobs: bool, finish: bool) -> None:
    buffer = ReplayBuffer(20)
    buffer.add(*written(range(12), logprobs=logprobs, finish=finish))
    rollout, prompts = buffer.draw(12, 0, 0)
    assert sorted(p.row for p in prompts) == list(range(12))
    assert (rollout.behavior_logprobs is not None, bool(rollout.finish)) == (logprobs, finish)
    for b, prompt in enumerate(prompts):
        same(rollout, b, prompt)


def test_padding_on_the_way_in_does_not_matter() -> None:
    rollout, prompts = written(range(6))
    pad = torch.nn.functional.pad
    wider = Rollout(
        pad(rollout.input_ids, (0, 4), value=77),
        pad(rollout.attention_mask, (0, 4)),
        pad(rollout.completion_mask, (0, 4)),
        pad(rollout.behavior_logprobs, (0, 4)),  # type: ignore[arg-type]
        finish=rollout.finish,
        domain=rollout.domain,
    )
    a, b = ReplayBuffer(6), ReplayBuffer(6)
    a.add(rollout, prompts)
    b.add(wider, prompts)
    assert a.samples == b.samples


def test_the_oldest_leave_first_and_no_more_than_the_capacity_stays() -> None:
    buffer = ReplayBuffer(7)
    for start in range(0, 12, 3):
        assert buffer.full == (start >= 7 or len(buffer) == 7)
        buffer.add(*written(range(start, start + 3)))
        assert len(buffer) <= 7
    assert [s.prompt.row for s in buffer.samples] == list(range(5, 12)) and buffer.full
    buffer.add(*written(range(20, 40)))  # more than there is room for
    assert [s.prompt.row for s in buffer.samples] == list(range(33, 40))


def test_mixed_knowledge_and_age_of_what_is_drawn() -> None:
    buffer = ReplayBuffer(20)
    buffer.add(*written(range(4, 8)))
    buffer.add(*written(range(8, 12), logprobs=False, finish=False))
    rollout, _ = buffer.draw(8, 0, 0)
    assert rollout.behavior_logprobs is None and rollout.finish == () and rollout.policy_version == 4


def test_draws_depend_on_the_seed_only_and_repeat_when_there_are_too_few() -> None:
    buffer = ReplayBuffer(10)
    buffer.add(*written(range(10)))

    def rows(n: int, seed: int) -> list[int]:
        return [p.row for p in buffer.draw(n, seed, 0)[1]]

    assert rows(4, 1) == rows(4, 1) and len({tuple(rows(4, seed)) for seed in range(20)}) > 10
    assert all(len(set(rows(10, seed))) == 10 for seed in range(5))
    assert len(rows(25, 3)) == 25 and set(rows(25, 3)) <= set(range(10))
    seen = [row for seed in range(300) for row in rows(2, seed)]
    assert all(40 <= seen.count(row) <= 80 for row in range(10))  # 60 expected, standard deviation 7


def test_through_a_checkpoint_and_back() -> None:
    buffer, restored = ReplayBuffer(8), ReplayBuffer(8)
    buffer.add(*written(range(5)))
    buffer.add(*written(range(5, 7), logprobs=False, finish=False))
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert restored.samples == buffer.samples
    a, b = buffer.draw(5, 9, 0), restored.draw(5, 9, 0)
    assert torch.equal(a[0].input_ids, b[0].input_ids) and a[1] == b[1]


def test_a_buffer_for_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity is 0; a buffer holds at least one sample"):
        ReplayBuffer(0)
