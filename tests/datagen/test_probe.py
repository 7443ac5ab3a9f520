"""What stands for an endpoint's weights: rounding passes, other weights do not."""

from __future__ import annotations

import math

import pytest

from llmdistill.datagen.engines.probe import NATS, Probe, read_answer

BEFORE = Probe([["The", " sea", " is"], ["one", ","]], [[-0.5, -1.0, -0.7], [-0.1, -0.2]])


def changed(by: float) -> Probe:
    logprobs = [[x + by for x in row] for row in BEFORE.logprobs]
    return Probe(BEFORE.tokens, logprobs)


@pytest.mark.parametrize("by", [0.0, 0.9 * NATS, -0.9 * NATS])
def test_rounding_is_no_other_model(by: float) -> None:
    assert BEFORE.other(changed(by)) == ""
    assert Probe.read(BEFORE.stored()) == BEFORE


def test_a_tie_that_tips_is_no_other_model_and_nothing_behind_it_is_compared() -> None:
    """Two tokens of half the probability each; what comes then stands behind other words."""
    near = Probe([["a", "b", "c"]], [[-0.1, math.log(0.5), -0.1]])
    tipped = Probe([["a", "x", "y"]], [[-0.1, math.log(0.48), -3.0]])
    assert near.other(tipped) == ""


def test_other_weights_are_told() -> None:
    assert "0.20 nats off in the mean" in BEFORE.other(changed(-0.2))
    sure = Probe([["yes"]], [[-0.05]])
    assert sure.other(Probe([["no"]], [[-0.05]])) == "where it was sure of 'yes' it is now sure of 'no'"


def test_an_answer_without_log_probs_says_nothing() -> None:
    assert read_answer({"choices": [{"message": {"content": "x"}}]}) is None
    assert read_answer({"choices": [{"logprobs": {"content": [{"token": "x", "logprob": -1}]}}]}) == (["x"], [-1.0])
    with pytest.raises(LookupError):
        read_answer({"choices": []})
