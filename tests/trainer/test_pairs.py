"""PairTrainer: its loss against a position-by-position computation, normalisation, what is logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill.composition.loss import loss_on
from llmdistill.errors import UserError
from llmdistill.models.heads import head_of
from llmdistill.objectives.redi import redi_loss, simpo_loss
from llmdistill.recipe.data_config import DataConfig
from llmdistill.redi import REDIConfig, REDITrainer
from llmdistill.texts.pairs import collate_pairs, pair_encoder
from tests import tiny
from tests.trainer.batches import pair_batch
from tests.trainer.pair_cases import (
    PAIRS,
    assert_same_gradients,
    by_hand,
    loss_and_gradients,
    pair,
    pair_rows,
    trainer,
)

METHODS = {
    "redi": ({"method": "redi", "alpha": 0.8}, lambda a, b: (-a + 0.8 * b).mean()),
    "gamma": ({"method": "redi", "gamma": 0.3}, lambda a, b: (-a + 0.8 * b * (0.3 * b).exp()).mean()),
    "alpha 0": ({"method": "redi", "alpha": 0.0}, lambda a, b: -a.mean()),
    "symmetric": ({"method": "symmetric"}, lambda a, b: (b - a).mean()),
    "simpo": (
        {"method": "simpo", "beta": 2.5, "margin": 0.5},
        lambda a, b: -torch.sigmoid(2.5 * (a - b) - 0.5).log().mean(),
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradients_equal_a_position_by_position_computation(tmp_path: Path, name: str) -> None:
    """The shift, the two lengths of a pair, and the chain through the means: whole logits against none."""
    settings, naive = METHODS[name]
    student = tiny.llama(1)
    t = trainer(tmp_path, student, chunk_tokens=3, **settings)
    loss, gradients = loss_and_gradients(t, PAIRS)
    student.zero_grad()
    expected = naive(*by_hand(student, PAIRS))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients, {n: p.grad for n, p in student.named_parameters()})


@pytest.mark.parametrize("left,right", [(0, 5), (5, 0), (3, 4)])
def test_padding_on_either_side_changes_nothing(tmp_path: Path, left: int, right: int) -> None:
    t = trainer(tmp_path)
    loss, gradients = loss_and_gradients(t, PAIRS)
    loss_padded, gradients_padded = loss_and_gradients(t, PAIRS, left, right)
    assert loss_padded == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(gradients, gradients_padded)


def test_a_softcapped_and_scaled_head_is_honoured(tmp_path: Path) -> None:
    """Gemma's and Cohere's logits: cap tanh(scale z / cap); the loss reads the log-softmax of those."""
    t = trainer(tmp_path, method="simpo")
    head, batch = head_of(t.model), pair_batch(t, PAIRS)
    capped = type(head)(head.linear, 1.7, 5.0)
    found = loss_on(t.model, batch, head=capped, vocab_size=t.vocab_size, chunk_tokens=4)
    found.loss.backward()
    gradients = {n: p.grad.clone() for n, p in t.model.named_parameters()}
    t.model.zero_grad()
    rollout = batch.rollout
    hidden = t.model.model(input_ids=rollout.input_ids, attention_mask=rollout.attention_mask.long()).last_hidden_state
    logits = 5.0 * torch.tanh(1.7 * head.linear(hidden) / 5.0)
    logp = logits[:, :-1].log_softmax(-1).gather(-1, rollout.input_ids[:, 1:, None]).squeeze(-1)
    mask = rollout.completion_mask[:, 1:]
    chosen, rejected = ((logp * mask).sum(1) / mask.sum(1)).chunk(2)
    expected = simpo_loss(chosen, rejected, beta=2.0, margin=1.0)
    expected.backward()
    torch.testing.assert_close(found.terms["pairs"].row_losses, logp[mask].detach(), rtol=1e-5, atol=1e-6)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients, {n: p.grad for n, p in t.model.named_parameters()})


def test_whole_logits_never_exist(tmp_path: Path) -> None:
    """No tensor of the size of [N, V] is made, forward or backward, when a chunk is smaller."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = set()  # sizes of [rows, V] tensors

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, torch.Tensor) and x.shape[-1:] == (264,):
                    seen.add(x.numel() // 264)
            return out

    t = trainer(tmp_path, chunk_tokens=4)
    with Watch():
        loss_and_gradients(t, PAIRS)
    assert collate_pairs(PAIRS, 0).num_rows == 17
    assert seen - {32} == {1, 4}  # 17 rows in chunks of 4; [32, V] is the weight, transposed


@pytest.mark.parametrize("size,steps", [(4, 2), (2, 4), (1, 8)])
@pytest.mark.parametrize("method", ["redi", "simpo"])
def test_training_does_not_depend_on_the_micro_batch_split(tmp_path: Path, size: int, steps: int, method: Any) -> None:
    """Same losses, gradient norms, metrics and final weights as 8x1; the sides differ in length."""
    runs = []
    for shape in ((8, 1), (size, steps)):
        student = tiny.llama(1)
        t = trainer(
            tmp_path / str(shape),
            student,
            method=method,
            per_device_train_batch_size=shape[0],
            gradient_accumulation_steps=shape[1],
            learning_rate=1e-2,
            optim="sgd",  # Adam would hide a wrong scale
        )
        t.train()
        names = ("loss", "grad_norm", "redi/chosen_logp", "redi/rejected_logp", "redi/margin", "redi/accuracy")
        logged = [[line[n] for n in names] for line in t.state.log_history if "loss" in line]
        runs.append((logged, student.state_dict()))
    (logs_a, weights_a), (logs_b, weights_b) = runs
    assert len(logs_a) == 2 and logs_a == [pytest.approx(line, rel=1e-5) for line in logs_b]
    for name in weights_a:
        torch.testing.assert_close(weights_a[name], weights_b[name], rtol=1e-4, atol=1e-6)


def test_alpha_0_is_fine_tuning_on_the_chosen_side(tmp_path: Path) -> None:
    """What transformers' own cross-entropy gives where all chosen sides have one length, so token mean = pair mean."""
    pairs = [pair([5, 6, 7], [9, 10, 11, 1], [50, 51]), pair([12, 13, 14, 15, 16], [17, 18, 19, 1], [60] * 9)]
    student = tiny.llama(1)
    t = trainer(tmp_path, student, alpha=0.0)
    loss, gradients = loss_and_gradients(t, pairs)
    student.zero_grad()
    ids, labels = torch.zeros(2, 9, dtype=torch.int64), torch.full((2, 9), -100)
    for b, p in enumerate(pairs):
        whole = torch.tensor([*p.prompt.ids, *p.chosen])
        ids[b, : len(whole)] = whole
        labels[b, len(p.prompt.ids) : len(whole)] = whole[len(p.prompt.ids) :]
    sft = student(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss
    sft.backward()
    assert loss == pytest.approx(sft.item(), rel=1e-5)
    assert_same_gradients(gradients, {n: p.grad for n, p in student.named_parameters()})


def test_lora_student_trains_only_the_adapter(tmp_path: Path) -> None:
    from peft import LoraConfig

    student = tiny.llama(1)
    frozen = {n: p.clone() for n, p in student.named_parameters()}
    t = REDITrainer(
        student,
        REDIConfig(output_dir=str(tmp_path), max_steps=2, learning_rate=1e-2, save_strategy="no"),
        train_dataset=pair_rows(8),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    before = {n: p.clone() for n, p in t.model.named_parameters() if p.requires_grad}
    t.train()
    for name, parameter in t.model.get_base_model().named_parameters():
        if "lora" not in name:
            assert torch.equal(parameter, frozen[name.replace(".base_layer", "")])
    assert before and any(not torch.equal(p, before[n]) for n, p in t.model.named_parameters() if n in before)


def test_metrics_of_training_and_of_held_out_pairs(tmp_path: Path) -> None:
    """metrics.jsonl and evaluate() say what a computation by hand says."""
    student = tiny.llama(1)
    t = trainer(tmp_path, student, heldout=pair_rows(5), max_steps=1, per_device_eval_batch_size=2)
    with torch.no_grad():
        chosen, rejected = by_hand(student, t.eval_dataset)
    results = t.evaluate()
    assert results["eval_redi/chosen_logp"] == pytest.approx(chosen.mean().item(), rel=1e-5)
    assert results["eval_redi/rejected_logp"] == pytest.approx(rejected.mean().item(), rel=1e-5)
    assert results["eval_redi/margin"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-4)
    assert results["eval_redi/accuracy"] == pytest.approx((chosen > rejected).float().mean().item())
    assert results["eval_redi/margin_low"] < results["eval_redi/margin"] < results["eval_redi/margin_high"]
    assert results["eval_redi/chosen_length"] == sum(len(p.chosen) for p in t.eval_dataset) / 5
    assert results["eval_loss"] == pytest.approx(redi_loss(chosen, rejected, 0.8).item(), rel=1e-5)
    batch = next(iter(t.get_train_dataloader()))
    with torch.no_grad():
        chosen, rejected = by_hand(student, batch)
    t.train()
    lines = [json.loads(line) for line in t.run_folder.metrics_file.read_text().splitlines()]
    (line,) = [line for line in lines if "loss" in line]
    assert line["loss"] == pytest.approx(redi_loss(chosen, rejected, 0.8).item(), rel=1e-5)
    assert line["redi/chosen_logp"] == pytest.approx(chosen.mean().item(), rel=1e-5)
    assert line["redi/rejected_logp"] == pytest.approx(rejected.mean().item(), rel=1e-5)
    assert line["redi/accuracy"] == pytest.approx((chosen > rejected).float().mean().item())
    assert line["redi/rejected_length"] == sum(len(p.rejected) for p in batch) / 4
    assert line["time/student"] > 0 and line["time/optimizer"] > 0 and line["memory/peak_gib"] > 0
    assert any("eval_redi/accuracy" in line for line in lines)


def test_weights_of_rows_are_refused_where_pairs_would_not_read_them(tmp_path: Path) -> None:
    """Before anything is trained, and for the methods that TRL trains too: it would not read them either."""
    for method in ("redi", "dpo", "sft"):
        with pytest.raises(UserError, match="objective.domain_weights is .*a mean that reads no weights"):
            REDIConfig(output_dir=str(tmp_path), method=method, domain_weights={"math": 2.0})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="data.weight_column is 'w'.*leave it out"):
        pair_encoder(tiny.tokenizer(), DataConfig(weight_column="w"))


def test_evaluate_needs_pairs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.heldout"):
        trainer(tmp_path).evaluate()
