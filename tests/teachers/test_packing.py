"""A teacher in this process says of packed sequences what it says of padded ones, wherever it stands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from llmdistill.teachers.local import LocalTeacher, UnadaptedTeacher, embedded
from llmdistill.teachers.mixture import EnsembleTeacher, RoutedTeacher
from llmdistill.teachers.stored import StoredTeacher
from llmdistill.texts import Rollout, collate
from tests import tiny


def text() -> Rollout:
    """Of other lengths everywhere, one sequence with nothing to count, and a mask with holes."""
    ids = torch.arange(5, 90).split([9, 30, 4, 17, 25])
    counts = [[i % 4 != 1 for i in range(len(x) - 3)] for x in ids[:4]] + [[False] * 22]
    return collate([x[:3].tolist() for x in ids], [x[3:].tolist() for x in ids], pad_id=0, counts=counts)


@pytest.mark.parametrize("batch_tokens", [30, 50, 10_000])
@pytest.mark.parametrize("adapted", [False, True])
def test_rows_layers_and_scores_are_those_of_padded_batches(batch_tokens: int, adapted: bool) -> None:
    model = tiny.llama(1)
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    make = UnadaptedTeacher if adapted else LocalTeacher
    teacher, rollout = make(model, tiny.tokenizer(), batch_tokens=batch_tokens, chunk_tokens=7), text()

    def said() -> tuple[torch.Tensor, ...]:
        return teacher.dense(rollout).hidden_NH, *teacher.hidden_layers(rollout, [0, -1])

    padded, blocks = said(), teacher.score(rollout, 5)
    teacher.packs = True
    for now, before in zip(said(), padded, strict=True):
        assert len(now) == rollout.num_rows
        torch.testing.assert_close(now, before, rtol=0, atol=1e-5 * float(before.abs().max()))
    for now, before in zip(teacher.score(rollout, 5), blocks, strict=True):
        assert torch.equal(torch.as_tensor(now.topk_ids), torch.as_tensor(before.topk_ids))
        assert np.allclose(now.topk_logprobs, before.topk_logprobs, atol=1e-5)


def test_they_are_found_behind_caches_and_in_mixtures(tmp_path: Path) -> None:
    a, b = (LocalTeacher(tiny.llama(seed), tiny.tokenizer()) for seed in (1, 2))
    cached = StoredTeacher(tmp_path, a)
    routed = RoutedTeacher({"a": (cached, ["math"]), "b": (EnsembleTeacher([(b, 1.0)]), ["code"])})
    assert embedded(a) == [a] and embedded(cached) == [a] and embedded(routed) == [a, b] and embedded(object()) == []
