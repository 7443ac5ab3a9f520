"""Before and after on the same prompts, against the differences themselves."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from llmdistill.record.page.paired import change, per_token


def side(means: list[float], tokens: list[int] | None = None) -> dict[str, Any]:
    return {"sequences": {"student": {"reverse_kl": means, **({} if tokens is None else {"tokens": tokens})}}}


def drawn(n: int = 40) -> tuple[list[float], list[int], list[float], list[int]]:
    """Prompts of very different difficulty, each a tenth of a nat better; completions of all lengths."""
    rng = random.Random(0)
    before = [rng.uniform(0.5, 6.0) for _ in range(n)]
    after = [x - 0.1 + rng.gauss(0, 0.05) for x in before]
    return before, [rng.randint(4, 60) for _ in range(n)], after, [rng.randint(4, 60) for _ in range(n)]


def test_the_difference_is_that_of_the_means_per_token() -> None:
    """The change beside the two means is their difference: with tokens, of means that weigh tokens alike."""
    before, n_before, after, n_after = drawn()
    found = change(side(before, n_before), side(after, n_after), "student", "reverse_kl")
    assert found is not None
    assert found.difference == pytest.approx(np.average(after, weights=n_after) - np.average(before, weights=n_before))
    assert found.low < found.difference < found.high
    plain = change(side(before), side(after), "student", "reverse_kl")
    assert plain is not None and plain.difference == pytest.approx(np.mean(after) - np.mean(before))


def test_the_interval_is_that_of_resampled_ratios() -> None:
    """The linearisation against the bootstrap of the ratios themselves, 40 prompts: within a tenth of its width."""
    before, n_before, after, n_after = (np.array(x) for x in drawn())
    sides = (side(means.tolist(), tokens.tolist()) for means, tokens in ((before, n_before), (after, n_after)))
    found = change(*sides, "student", "reverse_kl")
    picks = np.random.default_rng(1).integers(40, size=(10_000, 40))

    def ratio(means: Any, tokens: Any) -> Any:
        return (means * tokens)[picks].sum(1) / tokens[picks].sum(1)

    low, high = np.percentile(ratio(after, n_after) - ratio(before, n_before), [2.5, 97.5])
    assert found is not None
    assert abs(found.low - low) < 0.1 * (high - low) and abs(found.high - high) < 0.1 * (high - low)


def test_a_change_of_every_prompt_is_seen_through_their_spread() -> None:
    """A tenth of a nat on each of 40 prompts that spread over five: the marginal intervals nearly coincide."""
    before, _, after, _ = drawn()
    same = [20] * 40
    found = change(side(before, same), side(after, same), "student", "reverse_kl")
    assert found is not None and found.told and found.high < 0
    wide = 1.96 * np.std(before) / 40**0.5
    assert found.high - found.low < wide / 10


@pytest.mark.parametrize(("n", "told"), [(2, False), (5, False), (6, True)])
def test_a_handful_of_prompts_tells_nothing(n: int, told: bool) -> None:
    """All of five fall: a coin does that once in 16; of six, once in 32, below 5 %."""
    found = change(side([1.0 + i for i in range(n)]), side([0.5 + i * 0.9 for i in range(n)]), "student", "reverse_kl")
    assert found is not None and found.leaves_zero_out and found.told == told


def test_scores_have_the_mean_per_token() -> None:
    scores = per_token([1.0, 4.0], [3, 1])
    assert scores == pytest.approx([1.75 + 1.5 * (1 - 1.75), 1.75 + 0.5 * (4 - 1.75)])
    assert np.mean(scores) == pytest.approx(1.75)


def test_pairs_have_margins_and_accuracies() -> None:
    def pairs(chosen: list[float], rejected: list[float]) -> dict[str, Any]:
        return {"sequences": {"pairs": {"chosen_logp": chosen, "rejected_logp": rejected}}}

    before, after = pairs([-1.0, -2.0, -3.0], [-0.5, -3.0, -2.0]), pairs([-0.5, -1.0, -2.0], [-1.0, -3.0, -3.0])
    for metric, expected in (("margin", 4 / 3), ("accuracy", 2 / 3), ("rejected_logp", -0.5)):
        found = change(before, after, "pairs", metric)
        assert found is not None and found.difference == pytest.approx(expected)


@pytest.mark.parametrize(
    "after",
    [
        {},
        {"sequences": {"student": {}}},
        side([1.0]),
        side([1.0, float("nan")]),
        side([1.0, None]),  # type: ignore[list-item]
        side([1.0, 2.0], [1]),
        side([1.0, 2.0], [0, 0]),
        {"sequences": [1]},
    ],
)
def test_what_cannot_be_paired_is_none(after: dict[str, Any]) -> None:
    before = side([1.0, 2.0], [3, 4])
    assert change(before, after, "student", "reverse_kl") is None
    assert change(after, before, "student", "reverse_kl") is None
