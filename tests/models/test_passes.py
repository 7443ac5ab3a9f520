"""Passes over a text in batches: what is read at the head is what the whole model would say, whatever the batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmdistill.models.heads import head_of
from llmdistill.models.passes import at_head, metrics_at_head
from llmdistill.objectives.rows import TokenRows
from llmdistill.texts import Rollout, collate, predicting_rows
from llmdistill.texts.batches import Passes
from tests.tiny import llama


def text() -> Rollout:
    """Five sequences of different lengths, one of them with nothing to count."""
    ids = torch.arange(3, 60).split([5, 9, 3, 14, 26])
    return collate([x[:2].tolist() for x in ids], [x[2 : 2 + 3 * i].tolist() for i, x in enumerate(ids)], pad_id=0)


def logprobs(logits_nV: Tensor, token_ids_n: Tensor) -> dict[str, Tensor]:
    return {"logprob": logits_nV.log_softmax(-1).gather(1, token_ids_n[:, None]).squeeze(1)}


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_metrics_are_those_of_the_whole_models_logits_in_row_order(size: int) -> None:
    model, rollout = llama(0).eval(), text()
    parts = Passes(size).of(rollout, "cpu")
    batches = ((part, TokenRows(part.token_rows())) for part in parts)
    found = metrics_at_head(model, head_of(model), batches, logprobs, chunk_tokens=4)["logprob"]
    with torch.no_grad():
        logits_BTV = model(input_ids=rollout.input_ids, attention_mask=rollout.attention_mask).logits
    expected = logprobs(predicting_rows(logits_BTV, rollout.completion_mask), rollout.token_rows())["logprob"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # float32's order of summation
    assert not found.requires_grad


def test_a_text_without_sequences_has_no_metric() -> None:
    model = llama(0)
    batches: list[tuple[Rollout, TokenRows]] = []
    assert metrics_at_head(model, head_of(model), batches, logprobs, chunk_tokens=4) == {}


def test_a_generator_of_batches_may_ask_the_same_model_between_the_passes() -> None:
    """The student may be its own judge: what asks it must not run while it stands without its head."""
    model, rollout, seen = llama(0).train(), text(), list[tuple[bool, int]]()

    def judged():
        for part in Passes(2).of(rollout, "cpu"):
            seen.append((model.training, model(input_ids=part.input_ids).logits.shape[-1]))
            yield part, len(part)

    read = at_head(model, head_of(model), judged(), lambda rows_NH, view, evidence: (len(rows_NH), evidence))
    assert [size for _, size in read] == [2, 2, 1]
    assert sum(rows for rows, _ in read) == rollout.num_rows
    assert seen == [(False, head_of(model).vocab_size)] * 3 and model.training


def test_after_an_error_the_model_trains_again_and_has_its_head() -> None:
    model, rollout = llama(0).train(), text()
    with pytest.raises(ZeroDivisionError):
        at_head(model, head_of(model), [(rollout, 0)], lambda rows_NH, view, evidence: 1 // evidence)
    assert model.training and model(input_ids=rollout.input_ids).logits.shape[-1] == head_of(model).vocab_size
