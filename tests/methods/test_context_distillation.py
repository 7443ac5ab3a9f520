"""Context distillation: KL(T(. | context, y) || S(. | prompt, y)), whoever wrote y."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill.recipe.data_config import DataConfig
from tests import tiny
from tests.methods import rounds

HAVE = [i for i, row in enumerate(rounds.SEQUENCES) if row[2] is not None]


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_loss_and_gradients_equal_the_formula(tmp_path: Path, temperature: float) -> None:
    student, teacher = tiny.llama(1), tiny.llama(2)
    settings: dict[str, Any] = {"context": rounds.CONTEXT, "loss_temperature": temperature}
    t = rounds.make(tmp_path, "context_distillation", student=student, teacher=teacher, **settings)
    s = rounds.logps(student, temperature=temperature)
    q = rounds.logps(teacher, temperature=temperature, in_context=True)
    losses = torch.cat([rounds.kl(q[i].detach(), s[i]) for i in HAVE])
    rounds.assert_agree(t, rounds.text(right=3), student, losses.mean())


@pytest.mark.parametrize("author", ["student", "dataset", "teacher"])
def test_the_text_is_whose_the_setting_says(tmp_path: Path, author: str) -> None:
    rows = [{**row, "hint": f"it is {i}"} for i, row in enumerate(tiny.rows(8))]
    data = DataConfig(contexts={rounds.CONTEXT: "hint"})
    settings: dict[str, Any] = {"sequences": author, "rows": rows, "data": data, "context": rounds.CONTEXT}
    t = rounds.make(tmp_path, "context_distillation", **settings)
    text = t.draw(t.train_dataset[:4])["main"]
    assert text.author == author
    if author == "dataset":
        written = text.rollout.token_rows().split(text.rollout.row_counts)
        assert [tuple(w.tolist()) for w in written] == [p.completion for p in text.prompts]
    else:
        assert (text.rollout.behavior_logprobs is not None) == (author == "student")
    assert torch.isfinite(torch.tensor(t.train().training_loss))
