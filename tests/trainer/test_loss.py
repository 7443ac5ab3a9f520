"""The trainer's loss: the shift, the masks, the count, and TRL's trainer as an independent oracle."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill import Ask, DistillationTrainer, Method, OPDConfig, OPDTrainer, RolloutConfig, Term
from llmdistill.objectives import divergences
from llmdistill.teachers.local import LocalTeacher
from llmdistill.texts import Rollout, Sampling, collate
from llmdistill.texts.sources import Only
from tests import tiny
from tests.trainer.batches import micro_batch

TEXT = {"main": Only("dataset")}
FULL = Method((Term("divergence", divergences.reverse_kl, (Ask(),)),), TEXT)


def trainer(tmp_path: Path, student: Any = None, teacher: Any = None, **settings: Any) -> DistillationTrainer:
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", **settings}
    method = settings.pop("method", FULL)
    args = OPDConfig(output_dir=str(tmp_path / "run"), logging_steps=1, **settings)
    return DistillationTrainer(
        student or tiny.llama(1),
        args,
        teacher or tiny.llama(2),
        method=method,
        train_dataset=tiny.rows(16),
        processing_class=tiny.tokenizer(),
    )


def loss_and_gradients(t: DistillationTrainer, rollout: Rollout, count: int | None = None) -> tuple[float, dict]:
    t.model.zero_grad()
    t.model.train()
    loss = t.compute_loss(t.model, {"micro_batch": micro_batch(t, rollout, total=count)})
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in t.model.named_parameters() if p.grad is not None}


def by_hand(student: Any, teacher: Any, sequences: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Token mean of the reverse KL, one unpadded sequence and one position at a time."""
    total, count = torch.zeros(()), 0
    for prompt, completion in sequences:
        ids = torch.tensor([prompt + completion])
        s, t = student(ids).logits[0], teacher(ids).logits[0].detach()
        for position in range(len(prompt), len(prompt) + len(completion)):
            log_s, log_t = s[position - 1].log_softmax(-1), t[position - 1].log_softmax(-1)
            total, count = total + (log_s.exp() * (log_s - log_t)).sum(), count + 1
    return total / count


SEQUENCES = [([5, 6, 7, 8], [9, 10, 1]), ([11, 12], [13, 14, 15, 16, 17]), ([20] * 9, [1]), ([30, 31, 32], [33, 34])]


def batch(sequences: list[tuple[list[int], list[int]]]) -> Rollout:
    return collate([s[0] for s in sequences], [s[1] for s in sequences], pad_id=0)


def padded(rollout: Rollout, left: int, right: int) -> Rollout:
    """The same sequences with more padding on both sides, filled with an id that is a word elsewhere."""
    pad = partial(torch.nn.functional.pad, pad=(left, right))
    return Rollout(pad(rollout.input_ids, value=77), pad(rollout.attention_mask), pad(rollout.completion_mask))


def assert_same_gradients(a: dict, b: dict, tolerance: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    scale = max(g.abs().max() for g in a.values())
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance * scale, name


def test_loss_and_gradients_equal_a_position_by_position_computation(tmp_path: Path) -> None:
    """The shift: prompts, completions and padding differ in every row, and one completion is a single eos."""
    student, teacher = tiny.llama(1), tiny.llama(2)
    t = trainer(tmp_path, student, teacher)
    loss, gradients = loss_and_gradients(t, batch(SEQUENCES))
    student.zero_grad()
    expected = by_hand(student, teacher, SEQUENCES)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients, {n: p.grad for n, p in student.named_parameters()})


@pytest.mark.parametrize("left,right", [(0, 5), (5, 0), (3, 4)])
def test_padding_on_either_side_changes_nothing(tmp_path: Path, left: int, right: int) -> None:
    t = trainer(tmp_path)
    loss, gradients = loss_and_gradients(t, batch(SEQUENCES))
    loss_padded, gradients_padded = loss_and_gradients(t, padded(batch(SEQUENCES), left, right))
    assert loss_padded == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(gradients, gradients_padded)


@pytest.mark.parametrize("size,steps", [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_training_does_not_depend_on_the_micro_batch_split(tmp_path: Path, size: int, steps: int) -> None:
    """Same losses, gradient norms and final weights for 8x1, 4x2, 2x4, 1x8; completions differ in length."""
    runs = []
    for shape in ((8, 1), (size, steps)):
        student = tiny.llama(1)
        t = trainer(
            tmp_path / str(shape),
            student,
            per_device_train_batch_size=shape[0],
            gradient_accumulation_steps=shape[1],
            learning_rate=1e-2,
            optim="sgd",  # Adam would hide a wrong scale
        )
        t.train()
        logged = [line for line in t.state.log_history if "loss" in line]
        runs.append(([(x["loss"], x["grad_norm"]) for x in logged], student.state_dict()))
    (logs_a, weights_a), (logs_b, weights_b) = runs
    assert logs_a == [pytest.approx(pair, rel=1e-5) for pair in logs_b]
    for name in weights_a:
        torch.testing.assert_close(weights_a[name], weights_b[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ["full", "top_k", "sampled"])
def test_student_equal_to_teacher_has_no_loss_and_no_gradient(tmp_path: Path, estimator: Any) -> None:
    text = Only("student" if estimator == "sampled" else "dataset")
    method = OPDConfig(
        output_dir=str(tmp_path), estimator=estimator, **({"top_k": 8} if estimator == "top_k" else {})
    ).build(text)
    t = trainer(tmp_path, tiny.llama(1), tiny.llama(1), method=method)
    loss, gradients = loss_and_gradients(t, batch(SEQUENCES))
    assert abs(loss) < 1e-5
    assert all(g.abs().max() < 1e-5 for g in gradients.values())
    apart, _ = loss_and_gradients(trainer(tmp_path, tiny.llama(3), tiny.llama(1), method=method), batch(SEQUENCES))
    assert abs(apart) > 0.1  # the same composition does see a difference


def test_masked_tokens_do_not_count(tmp_path: Path) -> None:
    """Taking a sequence out by its mask equals leaving it out, also when it is the longest."""
    t = trainer(tmp_path)
    rollout = batch(SEQUENCES)
    mask = rollout.completion_mask.clone()
    mask[1] = False
    masked = Rollout(rollout.input_ids, rollout.attention_mask, mask)
    loss, gradients = loss_and_gradients(t, masked)
    loss_without, gradients_without = loss_and_gradients(t, batch([s for i, s in enumerate(SEQUENCES) if i != 1]))
    assert loss == pytest.approx(loss_without, rel=1e-5)
    assert_same_gradients(gradients, gradients_without)


def test_truncated_completions_can_be_masked() -> None:
    rollout = collate([[5], [6]], [[7, 1], [8, 9]], pad_id=0, finish=("stop", "length"))
    assert rollout.without_truncated().completion_mask.tolist() == [[False, True, True], [False, False, False]]


def test_a_wider_teacher_head_is_cut_before_the_softmax(tmp_path: Path) -> None:
    """Qwen's case: the same ids, more (padding) columns on one side; the padding must not take mass."""
    teacher, wide = tiny.llama(2, vocab=264), tiny.llama(2, vocab=300)
    weights = teacher.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        grown = torch.full((300, 32), 3.0)
        grown[:264] = weights[name]
        weights[name] = grown
    wide.load_state_dict(weights)
    loss, gradients = loss_and_gradients(trainer(tmp_path, tiny.llama(1), teacher), batch(SEQUENCES))
    loss_wide, gradients_wide = loss_and_gradients(trainer(tmp_path, tiny.llama(1), wide), batch(SEQUENCES))
    assert loss_wide == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(gradients, gradients_wide)


def test_top_k_is_below_the_full_divergence_and_reaches_it(tmp_path: Path) -> None:
    def loss(**settings: Any) -> float:
        method = OPDConfig(output_dir=str(tmp_path), **settings).build(Only("dataset"))
        return loss_and_gradients(trainer(tmp_path, method=method), batch(SEQUENCES))[0]

    full = loss(estimator="full")
    listed = [loss(estimator="top_k", top_k=k) for k in (1, 8, 64, 264)]
    assert listed == sorted(listed) and listed[0] < full
    assert listed[-1] == pytest.approx(full, rel=1e-5)


def test_lora_student_trains_only_the_adapter(tmp_path: Path) -> None:
    from peft import LoraConfig

    student = tiny.llama(1)
    frozen = {n: p.clone() for n, p in student.named_parameters()}
    args = OPDConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        learning_rate=1e-2,
        save_strategy="no",
        rollouts=RolloutConfig(max_new_tokens=4),
    )
    t = OPDTrainer(
        student,
        args,
        tiny.llama(2),
        train_dataset=tiny.rows(8),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
    )
    before = {n: p.clone() for n, p in t.model.named_parameters() if p.requires_grad}
    t.train()
    assert all("lora" in n for n in before)
    assert any((p != before[n]).any() for n, p in t.model.named_parameters() if n in before)
    base = dict(t.model.get_base_model().named_parameters())
    for name, weight in frozen.items():
        now = base.get(name, base.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(now, weight), name


def test_samples_per_prompt_are_adjacent_and_differ(tmp_path: Path) -> None:
    teacher = LocalTeacher(tiny.llama(2), tiny.tokenizer())
    prompts = trainer(tmp_path).train_dataset[:2]
    rollout = teacher.generate(prompts, Sampling(8, samples_per_prompt=3, seed=1))
    assert len(rollout) == 6
    texts = [tuple(r[m].tolist()) for r, m in zip(rollout.input_ids, rollout.completion_mask, strict=True)]
    assert len(set(texts[:3])) > 1
    starts = [
        r[: len(p.ids)].tolist() for r, p in zip(rollout.input_ids, [p for p in prompts for _ in range(3)], strict=True)
    ]
    assert starts == [p.ids for p in prompts for _ in range(3)]


def test_generation_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    teacher, prompts = LocalTeacher(tiny.llama(2), tiny.tokenizer()), trainer(tmp_path).train_dataset[:2]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = teacher.generate(prompts, Sampling(8, seed=3))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.input_ids, teacher.generate(prompts, Sampling(8, seed=3)).input_ids)


@pytest.mark.parametrize("beta,divergence", [(1.0, "reverse_kl"), (0.0, "forward_kl"), (0.3, "jsd")])
def test_trl_distillation_trainer_agrees(tmp_path: Path, beta: float, divergence: str) -> None:
    """TRL's stable trainer on the same models and the same fixed completions: loss and gradient norm to 1e-4."""
    from datasets import Dataset
    from trl import DistillationConfig as TRLConfig
    from trl import DistillationTrainer as TRLTrainer

    student, teacher = tiny.llama(1), tiny.llama(2)
    width = max(len(p) for p, _ in SEQUENCES)
    long = max(len(c) for _, c in SEQUENCES)
    inputs = {
        "prompt_ids": torch.tensor([[0] * (width - len(p)) + p for p, _ in SEQUENCES]),
        "prompt_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in SEQUENCES]),
        "completion_ids": torch.tensor([c + [0] * (long - len(c)) for _, c in SEQUENCES]),
        "completion_mask": torch.tensor([[1] * len(c) + [0] * (long - len(c)) for _, c in SEQUENCES]),
    }
    count = int(inputs["completion_mask"].sum())
    inputs["num_items_in_batch"] = torch.tensor(float(count))
    args = TRLConfig(output_dir=str(tmp_path / "trl"), beta=beta, use_cpu=True, bf16=False, report_to="none")
    peer = TRLTrainer(
        student, teacher, args, Dataset.from_list(tiny.rows(4, completion=False)), processing_class=tiny.tokenizer()
    )
    peer.model.train()
    peer_loss = peer.compute_loss(peer.model, inputs)
    peer_loss.backward()
    peer_norm = torch.nn.utils.get_total_norm([p.grad for p in peer.model.parameters()])

    extra = {"beta": beta} if divergence == "jsd" else {}
    method = OPDConfig(output_dir=str(tmp_path), divergence=divergence, **extra).build(Only("dataset"))  # type: ignore[arg-type]
    loss, gradients = loss_and_gradients(
        trainer(tmp_path, tiny.llama(1), tiny.llama(2), method=method), batch(SEQUENCES), count
    )
    assert loss == pytest.approx(peer_loss.item(), rel=1e-4)
    assert torch.nn.utils.get_total_norm(list(gradients.values())) == pytest.approx(peer_norm.item(), rel=1e-4)
