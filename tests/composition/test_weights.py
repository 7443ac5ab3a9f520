"""Weights of samples, tokens and domains: sum(w l) / sum(w) over the global batch, or means of sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill import OPDConfig, OPDTrainer
from llmdistill.composition.batch import row_weights
from llmdistill.composition.term import Term
from llmdistill.errors import UserError
from llmdistill.recipe.data_config import DataConfig
from tests import tiny
from tests.methods import rounds

# completions of 2, 5, 2, 9 tokens, the eos included: "0", "8 ok", "1" and "24 ok ok", say
BASE = [
    {"prompt": "1+1=", "completion": "2", "domain": "a"},
    {"prompt": "7*6 is", "completion": "8 ok", "domain": "b"},
    {"prompt": [{"role": "user", "content": "0+1"}], "completion": "1", "domain": None},
    {"prompt": "3*8=", "completion": "24 ok ok", "domain": "a"},
]
LISTS = [[3.0, 0.5], [0.0, 1.0, 2.0, 0.25], 2.0, [1, 0, 0, 0, 0, 0, 0, 2, 7]]  # with and without one for the eos
TOKENS = [[3.0, 0.5], [0.0, 1.0, 2.0, 0.25, 1.0], [2.0, 2.0], [1, 0, 0, 0, 0, 0, 0, 2, 7]]
NUMBERS = [0.5, 2, 0.0, 1.5]
DOMAINS = {"a": 3.0, "b": 0.5}


def make(folder: Path, weights: list[Any] | None, student: Any = None, **settings: Any) -> OPDTrainer:
    rows = [dict(row) if weights is None else {**row, "w": w} for row, w in zip(BASE, weights or BASE, strict=True)]
    shared: dict[str, Any] = {"per_device_train_batch_size": 4, "max_steps": 2, "save_strategy": "no"}
    return OPDTrainer(
        student or tiny.llama(1),
        OPDConfig(output_dir=str(folder), sequences="dataset", logging_steps=1, **{**shared, **settings}),
        tiny.llama(2),
        train_dataset=rows,
        processing_class=tiny.tokenizer(),
        data=DataConfig(weight_column="w" if weights else ""),
    )


CASES = [
    (NUMBERS, {}, [[w] * len(t) for w, t in zip(NUMBERS, TOKENS, strict=True)]),
    (LISTS, {}, TOKENS),
    (None, {"domain_weights": DOMAINS}, [[3.0] * 2, [0.5] * 5, [1.0] * 2, [3.0] * 9]),
    (NUMBERS, {"domain_weights": DOMAINS}, [[1.5] * 2, [1.0] * 5, [0.0] * 2, [4.5] * 9]),
]


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("mean", ["token", "sequence"])
@pytest.mark.parametrize(("weights", "settings", "by_row"), CASES)
def test_weighted_means(tmp_path: Path, weights: Any, settings: Any, by_row: list[Any], mean: Any, parts: int) -> None:
    """token: sum(w l) / sum(w). sequence: means within sequences by their tokens' weights, then over sequences by
    sample and domain."""
    student = tiny.llama(1)
    t = make(tmp_path, weights, student, mean=mean, **settings)
    text = t.draw(t.train_dataset)["main"]  # type: ignore[arg-type]
    rows = [(p.ids, p.completion, None, [0.0] * len(p.completion)) for p in text.prompts]
    assert [len(w) for w in by_row] == text.rollout.row_counts
    s, q = rounds.logps(student, rows), rounds.logps(tiny.llama(2), rows)
    losses = [rounds.kl(a, b.detach()) for a, b in zip(s, q, strict=True)]
    w = [torch.tensor(x, dtype=torch.float64) for x in by_row]
    if mean == "token":
        expected = torch.cat([x * y for x, y in zip(w, losses, strict=True)]).sum() / torch.cat(w).sum()
    else:
        lists = weights is LISTS
        outer = torch.tensor([1.0, 1.0, 2.0, 1.0] if lists else [float(x[0]) for x in w], dtype=torch.float64)
        inner = torch.stack(
            [
                (x * y).sum() / x.sum() if lists and i != 2 else y.mean()
                for i, (x, y) in enumerate(zip(w, losses, strict=True))
            ]
        )
        expected = (outer * inner).sum() / outer.sum()
    loss, found = rounds.gradients(t, text, parts)
    student.zero_grad()
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    rounds.assert_same(found, {n: p.grad for n, p in student.named_parameters()}, 5e-5)


def test_the_effective_number_of_rows_is_logged(tmp_path: Path) -> None:
    """(sum w)^2 / sum w^2 over the global batch, however it is cut."""
    every = [x for row in TOKENS for x in row]
    expected = sum(every) ** 2 / sum(x * x for x in every)
    for size, steps in ((4, 1), (1, 4)):
        t = make(tmp_path / str(size), LISTS, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        t.train()
        line = next(x for x in t.state.log_history if "loss" in x)
        assert line["distill/effective_rows"] == pytest.approx(expected, rel=1e-5)
    t = make(tmp_path / "plain", None)
    t.train()
    assert not any("effective_rows" in name for x in t.state.log_history for name in x)


def test_equal_weights_are_none(tmp_path: Path) -> None:
    """Of twos everywhere the loss is that of ones, and of no column at all to the bit."""
    found = []
    for name, weights in (("none", None), ("ones", [1.0] * 4), ("twos", [2] * 4)):
        t = make(tmp_path / name, weights)
        found.append(rounds.gradients(t, t.draw(t.train_dataset)["main"])[0])  # type: ignore[arg-type]
    assert found[0] == found[1] and found[2] == pytest.approx(found[0], rel=1e-6)


def test_a_run_with_weights_does_not_depend_on_the_split(tmp_path: Path) -> None:
    runs = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        t = make(
            tmp_path / str(size),
            LISTS,
            domain_weights=DOMAINS,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            learning_rate=1e-2,
            optim="sgd",
        )
        t.train()
        runs.append([(x["loss"], x["grad_norm"]) for x in t.state.log_history if "loss" in x])
    for other in runs[1:]:
        assert runs[0] == [pytest.approx(x, rel=1e-4) for x in other]


def test_a_loss_of_groups_that_reads_no_weights_is_refused_where_there_are_some(tmp_path: Path) -> None:
    class Blind:
        """Has no attribute ``weighs``."""

    t = make(tmp_path, NUMBERS)
    texts = [t.draw(t.train_dataset)["main"]]  # type: ignore[arg-type]
    term = Term("blind", group=Blind(), reads=("tokens",), text="main")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="term 'blind' is a loss of groups of rows.*leave data.weight_column"):
        row_weights(term, texts, {}, t.pad_id)
