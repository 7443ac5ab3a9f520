"""G-OPD and mixed-in task rewards in the trainer: what the reference is, what lambda and a reward do to the loss."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill import (
    Ask,
    DistillationTrainer,
    Method,
    OPDConfig,
    OPDTrainer,
    RolloutConfig,
    TAIDConfig,
    Term,
    UserError,
)
from llmdistill.objectives import divergences
from llmdistill.objectives.composed import extrapolated
from llmdistill.teachers.evidence import gather
from llmdistill.teachers.local import LocalTeacher, UnadaptedTeacher
from llmdistill.teachers.mixture import RoutedTeacher
from llmdistill.texts import Prompt, Rollout, Sampling
from llmdistill.texts.sources import Only
from llmdistill.training.rewards import group_advantages
from tests import tiny
from tests.trainer.batches import micro_batch
from tests.trainer.test_loss import SEQUENCES, assert_same_gradients, batch, padded
from tests.trainer.test_several_teachers import domain_rows, local

Weights = dict[str, torch.Tensor]


def make(tmp_path: Path, student: Any = None, teacher: Any = None, **settings: Any) -> OPDTrainer:
    """An OPDTrainer on the tiny models; what is no setting of OPDConfig goes to the trainer."""
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "logging_steps": 1, **settings}
    settings.setdefault("rollouts", RolloutConfig(max_new_tokens=6))
    kwargs = {k: settings.pop(k) for k in ("reference", "reward", "peft_config", "train_dataset") if k in settings}
    return OPDTrainer(
        tiny.llama(1) if student is None else student,
        OPDConfig(output_dir=str(tmp_path / "run"), **settings),
        tiny.llama(2) if teacher is None else teacher,
        processing_class=tiny.tokenizer(),
        **{"train_dataset": tiny.rows(16, completion=False), **kwargs},
    )


def weights(model: Any) -> Weights:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def bitwise(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def trained(trainer: Any) -> Weights:
    trainer.train()
    return weights(trainer.model)


def loss_and_gradients(t: DistillationTrainer, rollout: Rollout, **micro: Any) -> tuple[float, Weights]:
    t.model.zero_grad()
    t.model.train()
    loss = t.compute_loss(t.model, {"micro_batch": micro_batch(t, rollout, **micro)})
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in t.model.named_parameters() if p.grad is not None}


def length_reward(prompts: Any, completions: Any) -> list[float]:
    return [float(len(text)) for text in completions]


# ---------------------------------------------------------------- lambda and the reference


@pytest.mark.parametrize("estimator", ["full", "sampled"])
@pytest.mark.parametrize("reference", ["given", "nowhere"])
def test_lambda_one_is_plain_opd_bit_for_bit_with_any_reference(tmp_path: Path, estimator: Any, reference: str) -> None:
    other = {"reference": tiny.llama(7)} if reference == "given" else {}
    named = {} if reference == "given" else {"reference": reference}
    plain = trained(make(tmp_path, estimator=estimator))
    args = OPDConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=4,
        save_strategy="no",
        rollouts=RolloutConfig(max_new_tokens=6),
        estimator=estimator,
        reward_scale=1.0,
        **named,
    )
    t = OPDTrainer(
        tiny.llama(1),
        args,
        tiny.llama(2),
        train_dataset=tiny.rows(16, completion=False),
        processing_class=tiny.tokenizer(),
        **other,
    )
    assert set(t.judges) == {"teacher"}
    assert bitwise(trained(t), plain)


def test_lambda_changes_what_is_learnt(tmp_path: Path) -> None:
    learnt = [trained(make(tmp_path, reward_scale=x)) for x in (1.0, 1.25)]
    assert not bitwise(*learnt)


def test_lambda_without_a_reference_stops_before_the_first_step(tmp_path: Path) -> None:
    args = OPDConfig(output_dir=str(tmp_path), reward_scale=1.25, reference="")
    with pytest.raises(UserError, match=r"reward_scale is 1.25 and there is no reference.*objective.reference initial"):
        OPDTrainer(tiny.llama(1), args, tiny.llama(2), processing_class=tiny.tokenizer())
    args = OPDConfig(output_dir=str(tmp_path), reward_scale=1.25, reference=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"^objective.reference\.?.*cannot be loaded"):
        OPDTrainer(tiny.llama(1), args, tiny.llama(2), processing_class=tiny.tokenizer())


@pytest.mark.parametrize("where", ["object", "folder"])
def test_the_initial_reference_stays_the_initial_student(tmp_path: Path, where: str) -> None:
    student: Any = tiny.llama(1)
    if where == "folder":
        student.save_pretrained(tmp_path / "student")
        tiny.tokenizer().save_pretrained(tmp_path / "student")
        student = str(tmp_path / "student")
    t = make(tmp_path, student, reward_scale=1.25, learning_rate=1e-2, max_steps=3)
    t.train()
    start = weights(tiny.llama(1))
    assert isinstance(t.judges["reference"], LocalTeacher)
    assert bitwise(weights(t.judges["reference"].model), start)
    assert not bitwise(weights(t.model), start)
    assert not any(p.requires_grad for p in t.judges["reference"].model.parameters())


@pytest.mark.parametrize("plausibility", [0.0, 0.1])
def test_the_first_loss_with_the_initial_reference_is_the_extrapolated_one(tmp_path: Path, plausibility: float) -> None:
    """R = S in the first step: the loss is that towards scale log T + (1 - scale) log S, for the plausible tokens."""
    t = make(tmp_path, reward_scale=1.5, **({} if plausibility else {"plausibility": 0.0}))  # 0.1 is the default
    loss, gradients = loss_and_gradients(t, batch(SEQUENCES))
    towards = extrapolated(divergences.reverse_kl, 1.5, plausibility=plausibility)
    by_hand = DistillationTrainer(
        tiny.llama(1),
        OPDConfig(output_dir=str(tmp_path / "run")),
        tiny.llama(2),
        method=Method(Term("divergence", towards, (Ask("teacher"), Ask("reference"))), {"main": Only("dataset")}),
        judges={"reference": tiny.llama(1)},
        processing_class=tiny.tokenizer(),
    )
    expected, expected_gradients = loss_and_gradients(by_hand, batch(SEQUENCES))
    assert loss == pytest.approx(expected, rel=1e-6)
    assert_same_gradients(gradients, expected_gradients)
    # And it is no other loss: two positions by hand.
    ids = torch.tensor([SEQUENCES[0][0] + SEQUENCES[0][1]])
    s, z = (m(ids).logits[0, 3:6].double().log_softmax(-1) for m in (tiny.llama(1), tiny.llama(2)))
    head = z >= z.amax(-1, keepdim=True) + math.log(plausibility or 1e-300)
    target = torch.where(head, 1.5 * z - 0.5 * s, z).log_softmax(-1)
    value = (s.exp() * (s - target)).sum(-1).mean().item()
    assert loss_and_gradients(t, batch(SEQUENCES[:1]))[0] == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("estimator", ["full", "sampled"])
def test_with_an_adapter_the_reference_is_the_model_below_it(tmp_path: Path, estimator: Any) -> None:
    """It answers as the initial student does, before and after training, and its look disturbs nothing."""
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.3)
    t = make(tmp_path, peft_config=config, reward_scale=1.25, learning_rate=5e-2, max_steps=3, estimator=estimator)
    assert isinstance(t.judges["reference"], UnadaptedTeacher)
    trainable = {n for n, p in t.model.named_parameters() if p.requires_grad}
    assert trainable and all("lora" in n for n in trainable)
    rollout, initial = batch(SEQUENCES), LocalTeacher(tiny.llama(1), tiny.tokenizer())
    expected = torch.cat([b.token_logprobs for b in initial.score(rollout, 0)])
    for train in (False, True):
        if train:
            t.train()
        t.model.train()
        found = torch.cat([b.token_logprobs for b in t.judges["reference"].score(rollout, 0)])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert t.model.training
        assert {n for n, p in t.model.named_parameters() if p.requires_grad} == trainable
        own = torch.cat([b.token_logprobs for b in LocalTeacher(t.model, tiny.tokenizer()).score(rollout, 0)])
        assert ((own - expected).abs().max() > 0.01) == train  # the student has left, the reference has not
        for n, p in t.model.named_parameters():
            p.requires_grad_(n in trainable)


def test_a_narrower_reference_cuts_both(tmp_path: Path) -> None:
    t = make(tmp_path, tiny.llama(1, vocab=264), tiny.llama(2, vocab=270), reference=tiny.llama(3, vocab=260),
             reward_scale=1.25, plausibility=0.0)  # fmt: skip
    assert t.vocab_size == 260
    loss, _ = loss_and_gradients(t, batch(SEQUENCES))
    wide = [torch.nn.functional.pad(m(torch.tensor([SEQUENCES[1][0] + SEQUENCES[1][1]])).logits, (0, 0))[0, 1:6, :260]
            for m in (tiny.llama(1), tiny.llama(2, vocab=270), tiny.llama(3, vocab=260))]  # fmt: skip
    expected = extrapolated(divergences.reverse_kl, 1.25)(*wide).mean().item()
    assert loss_and_gradients(t, batch(SEQUENCES[1:2]))[0] == pytest.approx(expected, rel=1e-4)
    assert loss != expected


@pytest.mark.parametrize("estimator", ["full", "sampled"])
def test_every_row_has_its_own_teacher_and_all_one_reference(tmp_path: Path, estimator: Any) -> None:
    domains = ("math", "code", "code", "math")
    routed = RoutedTeacher({"a": (local(2), ["math"]), "b": (local(3), ["code"])})
    settings = dict(reward_scale=1.25, estimator=estimator)
    together, _ = loss_and_gradients(
        make(tmp_path, teacher=routed, **settings), replace(batch(SEQUENCES), domain=domains)
    )
    total = 0.0
    for domain, seed in (("math", 2), ("code", 3)):
        own = [s for s, d in zip(SEQUENCES, domains, strict=True) if d == domain]
        mean, _ = loss_and_gradients(make(tmp_path, teacher=tiny.llama(seed), **settings), batch(own))
        total += mean * sum(len(c) for _, c in own)
    assert together == pytest.approx(total / sum(len(c) for _, c in SEQUENCES), rel=1e-5)


def test_a_row_of_an_unknown_domain_is_named(tmp_path: Path) -> None:
    routed = RoutedTeacher({"a": (local(2), ["maths"]), "b": (local(3), ["code"])})
    t = make(tmp_path, teacher=routed, reward_scale=1.25, train_dataset=domain_rows(8, completion=False))
    with pytest.raises(UserError, match=r"has domain 'math', and no teacher takes it.*data.domain_column"):
        t.train()


# ---------------------------------------------------------------- one step, however it is split

REWARDED = RolloutConfig(max_new_tokens=6, samples_per_prompt=2)
STEPS: dict[str, dict[str, Any]] = {
    "full": {"estimator": "full"},
    "top_k_of_both": {"estimator": "top_k", "top_k": 8, "support": "union"},
    "sampled": {"estimator": "sampled"},
    "exopd_full": {"estimator": "full", "reward_scale": 1.25},
    "exopd_sampled": {"estimator": "sampled", "reward_scale": 1.25},
    "weighed": {
        "estimator": "sampled",
        "importance_cap": 1.5,
        "rollouts": RolloutConfig(max_new_tokens=6, temperature=2, top_k=20, top_p=0.9),
    },
    "rewarded": {"reward": length_reward, "reward_weight": 0.3, "rollouts": REWARDED},
    "rewarded_sampled": {
        "estimator": "sampled",
        "reward_scale": 1.25,
        "reward": length_reward,
        "reward_weight": 0.3,
        "rollouts": REWARDED,
    },
    "taid": {"divergence": "taid"},
    "taid_driven_by_cross_entropy": {"divergence": "taid", "t_driver": "cross_entropy"},
}


def one_step(tmp_path: Path, shape: tuple[int, int], settings: dict[str, Any]) -> tuple[Any, Weights]:
    settings = {**settings, "learning_rate": 1.0, "optim": "sgd", "max_steps": 1, "max_grad_norm": 0.0}
    settings |= {"per_device_train_batch_size": shape[0], "gradient_accumulation_steps": shape[1]}
    if settings.get("divergence") != "taid":
        t: Any = make(tmp_path, **settings)
    else:
        from llmdistill import TAIDTrainer

        args = TAIDConfig(output_dir=str(tmp_path / "run"), save_strategy="no", logging_steps=1, **settings)
        t = TAIDTrainer(
            tiny.llama(1), args, tiny.llama(2), train_dataset=tiny.rows(16), processing_class=tiny.tokenizer()
        )
    found = trained(t)
    return next(line for line in t.state.log_history if "loss" in line), found


@pytest.mark.parametrize("name", STEPS)
def test_a_step_does_not_depend_on_its_micro_batches(tmp_path: Path, name: str) -> None:
    """8x1, 4x2, 2x4 with plain SGD: loss, gradient norm and weights; sequences differ in length and are re-ordered."""
    (line, whole), *others = [one_step(tmp_path, shape, STEPS[name]) for shape in ((8, 1), (4, 2), (2, 4))]
    assert line["grad_norm"] > 1e-3
    start = weights(tiny.llama(1))
    moved = max(float((whole[n] - start[n]).abs().max()) for n in whole)
    for other, found in others:
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-5, abs=1e-6)
        assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-5)
        assert other.get("rollout/reward") == line.get("rollout/reward")
        for n in whole:
            assert (found[n] - whole[n]).abs().max() <= 1e-4 * moved, n


@pytest.mark.parametrize("name", ["full", "top_k_of_both", "exopd_full", "exopd_sampled"])
def test_padding_changes_nothing(tmp_path: Path, name: str) -> None:
    t = make(tmp_path, **STEPS[name])
    loss, gradients = loss_and_gradients(t, batch(SEQUENCES))
    for left, right in ((0, 5), (3, 4)):
        found, padded_gradients = loss_and_gradients(t, padded(batch(SEQUENCES), left, right))
        assert found == pytest.approx(loss, rel=1e-5)
        assert_same_gradients(gradients, padded_gradients)


# ---------------------------------------------------------------- task rewards and weights of sampled tokens


def test_a_reward_of_no_weight_changes_no_bit(tmp_path: Path) -> None:
    plain = trained(make(tmp_path, max_steps=3, rollouts=REWARDED))
    t = make(tmp_path, max_steps=3, rollouts=REWARDED, reward=length_reward, reward_weight=0.0)
    assert bitwise(trained(t), plain)
    assert all(line["rollout/reward"] >= 0 for line in t.state.log_history if "loss" in line)  # it is still watched


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_loss_with_a_reward_is_the_one_by_hand(tmp_path: Path, temperature: float) -> None:
    """KL - c A log S(y) over the counted tokens, S as it was sampled; A from the groups, in the order the sequences
    came before sorting."""
    rollouts = RolloutConfig(max_new_tokens=6, samples_per_prompt=4, temperature=temperature)
    t = make(tmp_path, rollouts=rollouts, reward=length_reward, reward_weight=0.3)
    prompts = t.train_dataset[2::-1]  # type: ignore[index]  # the longest first: sorting by length turns it round
    batches, count = t.get_batch_samples(iter([prompts[:1], prompts[1:2], prompts[2:]]), 3, torch.device("cpu"))
    assert len(batches) == 3 and count is not None
    by_prompt: dict[int, list[float]] = {p.row: [] for p in prompts}
    student, teacher, expected, loss = tiny.llama(1), tiny.llama(2), 0.0, 0.0
    for inputs in batches:
        micro = inputs["micro_batch"].texts["main"]
        for text, prompt in zip(t._completions(micro.rollout, micro.prompts, True), micro.prompts, strict=True):
            by_prompt[prompt.row].append(float(len(text)))
    assert [len(found) for found in by_prompt.values()] == [4, 4, 4] and any(
        len(set(r)) > 1 for r in by_prompt.values()
    )
    for inputs in batches:
        micro = inputs["micro_batch"].texts["main"]
        texts = t._completions(micro.rollout, micro.prompts, skip_special_tokens=True)
        rows = zip(micro.rollout.input_ids, micro.rollout.attention_mask, micro.prompts, texts, micro.advantages,
                   strict=True)  # fmt: skip
        for ids, attention, prompt, text, advantage in rows:
            assert ids[: len(prompt.ids)].tolist() == prompt.ids
            group = by_prompt[prompt.row]
            place = group.index(float(len(text)))
            assert advantage == pytest.approx(group_advantages(group, 4)[place], abs=1e-9)
            n, start = int(attention.sum()), len(prompt.ids) - 1
            s, z = (m(ids[None, :n]).logits[0, start:-1].detach() for m in (student, teacher))
            drawn = (s / temperature).log_softmax(-1).gather(1, ids[start + 1 : n, None]).squeeze(1)
            expected += float((divergences.reverse_kl(s, z) - 0.3 * advantage * drawn).sum())
        t.model.train()
        loss += t.compute_loss(t.model, inputs, num_items_in_batch=count).item()
    assert loss == pytest.approx(expected / int(count), rel=1e-4)


def test_a_reward_judges_what_was_written_also_where_the_loss_leaves_it_out(tmp_path: Path) -> None:
    seen: list[str] = []

    def reward(prompts: Any, completions: Any) -> list[float]:
        seen.extend(completions)
        return [1.0] * len(completions)

    rollouts = RolloutConfig(max_new_tokens=2, samples_per_prompt=2, mask_truncated=True)
    t = make(tmp_path, rollouts=rollouts, reward=reward, reward_weight=0.3, max_steps=1)
    t.train()
    assert len(seen) == 8 and sum(map(bool, seen)) >= 6


@pytest.mark.parametrize("estimator", ["full", "sampled"])
def test_a_round_without_a_counted_token_is_no_step_at_all(tmp_path: Path, estimator: Any) -> None:
    rollouts = RolloutConfig(max_new_tokens=1, mask_truncated=True, samples_per_prompt=2)
    t = make(tmp_path, rollouts=rollouts, estimator=estimator, reward_scale=1.25, reward=length_reward,
             reward_weight=1.0, optim="sgd")  # fmt: skip
    t.model.lm_head.weight.data[1] = 0.0  # eos is never the first token, near enough
    before = weights(t.model)
    t.train()
    assert bitwise(weights(t.model), before)


def tempered(logits: torch.Tensor, y: torch.Tensor, top_k: int) -> torch.Tensor:
    """log of softmax(logits / 2) over the top_k likeliest tokens (0: all) and y, at y: [n, V] and [n, 1] -> [n]."""
    allowed = logits.topk(top_k or logits.shape[-1]).indices
    kept = torch.full_like(logits, -torch.inf).scatter(1, torch.cat([allowed, y], 1), 0.0) + logits / 2
    return kept.log_softmax(-1).gather(1, y).squeeze(1)


@pytest.mark.parametrize("top_k", [0, 30])
@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_weights_of_sampled_tokens_are_ratios_to_what_drew_them(tmp_path: Path, estimator: Any, top_k: int) -> None:
    """Drawn at temperature 2, trained one update later: w = min(new S_2(y) / S_2(y), cap), by hand, on what is about
    the drawn tokens: the sampled estimator and the reward, and not on a divergence of whole distributions. S_2 is over
    the tokens that may be drawn, old and new. Before the update every weight is 1."""
    rollouts = RolloutConfig(max_new_tokens=6, temperature=2.0, top_k=top_k, samples_per_prompt=2)
    settings = {"rollouts": rollouts, "estimator": estimator, "reward": length_reward, "reward_weight": 0.3}
    plain, capped = (make(tmp_path, importance_cap=cap, **settings) for cap in (0.0, 1.5))
    for each in (plain, capped):
        each.model.train()
    (inputs,), _ = capped.get_batch_samples(iter([plain.train_dataset[:4]]), 1, torch.device("cpu"))  # type: ignore[index]
    (unweighed,), _ = plain.get_batch_samples(iter([plain.train_dataset[:4]]), 1, torch.device("cpu"))  # type: ignore[index]
    fresh = [t.compute_loss(t.model, given).item() for t, given in ((plain, unweighed), (capped, inputs))]
    assert fresh[0] == pytest.approx(fresh[1], rel=1e-5)
    text = inputs["micro_batch"].texts["main"]
    old, model, teacher, expected, ratios = tiny.llama(1), tiny.llama(1), tiny.llama(2), 0.0, []
    for m in (model, capped.model):
        m.model.norm.weight.data *= 1.5
    of = zip(text.rollout.input_ids, text.rollout.attention_mask, text.prompts, text.advantages, strict=True)
    for ids, attention, prompt, advantage in of:
        n, start = int(attention.sum()), len(prompt.ids) - 1
        z, was, target = (m(ids[None, :n]).logits[0, start:-1].detach() for m in (model, old, teacher))
        y = ids[start + 1 : n, None]
        new, drawn = tempered(z, y, top_k), tempered(was, y, top_k)
        ratios += (new - drawn).exp().tolist()
        w = (new - drawn).exp().clamp(max=1.5)
        kl = divergences.reverse_kl(z, target)
        if estimator == "sampled":
            behind = (target.log_softmax(-1) - z.log_softmax(-1)).gather(1, y).squeeze(1)
            kl = w * (-behind / 2.0 * new)
        expected += float((kl - 0.3 * advantage * w * new).sum())
    assert min(ratios) < 0.9 and max(ratios) > 1.5  # below 1, and past the cap
    capped.model.train()
    assert capped.compute_loss(capped.model, inputs).item() == pytest.approx(expected / len(ratios), rel=1e-4)


def test_rewards_that_cannot_be_used_stop_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reward_weight is 1 and there is no reward"):
        make(tmp_path, reward_weight=1.0)
    with pytest.raises(UserError, match="rollouts.samples_per_prompt is 1"):
        make(tmp_path, reward=length_reward, reward_weight=1.0)
    with pytest.raises(UserError, match="objective.reward is normalised over the samples.*samples_per_prompt is 1"):
        OPDConfig(output_dir=str(tmp_path), reward="math")
    t = make(tmp_path, reward=lambda prompts, completions: [1.0], reward_weight=1.0, rollouts=REWARDED)
    with pytest.raises(UserError, match="the reward returned 1 numbers for 8 completions"):
        t.train()


def test_a_loss_that_is_not_finite_names_step_rows_and_checkpoint(tmp_path: Path) -> None:
    class Broken(LocalTeacher):
        calls = 0

        def dense(self, rollout: Any) -> Any:
            Broken.calls += 1
            rows = super().dense(rollout)
            return replace(rows, hidden_NH=rows.hidden_NH * torch.nan) if Broken.calls == 3 else rows

    t = make(tmp_path, teacher=Broken(tiny.llama(2), tiny.tokenizer()), max_steps=4, save_strategy="steps",
             save_steps=1, rollouts=REWARDED, per_device_train_batch_size=2)  # fmt: skip
    with pytest.raises(UserError) as error:
        t.train()
    said = str(error.value)
    assert "the loss is nan at step 3, on the prompts of rows " in said and "checkpoint-2" in said and "Fix:" in said
    rows = said.split("rows ")[1].split(";")[0].split(", ")
    assert len(rows) == len(set(rows)) == 2
    fresh = make(tmp_path / "other", teacher=Broken(tiny.llama(2), tiny.tokenizer()))
    Broken.calls = 2
    with pytest.raises(UserError, match="at step 1, .*none was saved yet"):
        fresh.train()


@pytest.mark.parametrize(
    "settings,said",
    [
        ({"reward_scale": -1.0}, "objective.reward_scale is -1.0; it must be >= 0"),
        ({"reward_weight": -1.0}, "objective.reward_weight is -1.0; it must be >= 0"),
        ({"reward_scale": 1.25, "divergence": "forward_kl"}, "not forward_kl with full. Fix: --reward_scale 1"),
        ({"reward_scale": 1.25, "estimator": "top_k"}, "not reverse_kl with top_k. Fix:"),
        ({"reward_scale": 1.25, "loss_temperature": 2.0}, "objective.loss_temperature 2; the extrapolated"),
        ({"reward_scale": 1.25, "xi": 0.5, "sequences": "dataset"}, "objective.xi is 0.5 and objective.reward_scale"),
        ({"reward_weight": 1.0, "sequences": "mixed"}, "objective.sequences mixed; a reward teaches through tokens"),
        ({"importance_cap": -1.0}, "objective.importance_cap is -1.0; it must be >= 0"),
        ({"importance_cap": 2.0}, "objective.importance_cap is 2, and objective.estimator full weighs no sampled"),
        ({"student_fraction": 1.5}, "objective.student_fraction is 1.5; it must be >= 0 and <= 1"),
        ({"replay_size": 0}, "objective.replay_size is 0; it must be >= 1"),
        ({"top_k": 0}, "objective.top_k is 0; it must be >= 1"),
        ({"loss_temperature": 0.0}, "objective.loss_temperature is 0.0; it must be > 0"),
        ({"estimator": "sampled", "divergence": "jsd", "beta": 0.5}, "objective.divergence is jsd. Fix: --estimator"),
        ({"estimator": "sampled", "loss_temperature": 2.0}, "are those of temperature 1. Fix: use 1"),
        ({"estimator": "top_k", "loss_temperature": 2.0}, "cannot be tempered exactly. Fix: use 1"),
        ({"estimator": "full", "support": "student"}, "does not read it. Fix: leave it out, or --estimator top_k"),
        *(
            ({"estimator": "sampled", "sequences": x}, f"objective.sequences is {x}, and objective.estimator sampled")
            for x in ("dataset", "teacher", "mixed", "adaptive")
        ),
        ({"sequences": "adaptive"}, "train.eval_strategy is no. Fix: --eval_strategy steps"),
        ({"alpha": 0.2}, "objective.alpha is 0.2, and objective.divergence reverse_kl does not read it. Fix:"),
        ({"divergence": "jsd"}, "objective.divergence jsd needs objective.beta"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        OPDConfig(output_dir=str(tmp_path), **settings)
    assert said in str(error.value)


def test_the_teacher_in_every_place_has_no_loss(tmp_path: Path) -> None:
    """What the preflight does: student, teacher and reference are one."""
    t = make(tmp_path, tiny.llama(2), reward_scale=1.25, reference=tiny.llama(3))
    rollout = batch(SEQUENCES)
    micro = micro_batch(t, rollout, teacher=t.teacher)
    assert abs(t.compute_loss(t.model.train(), {"micro_batch": micro}).item()) < 1e-5
    assert gather(t.teacher, rollout, "full", 0).width == 264


def test_a_student_without_its_adapter_is_the_one_it_started_as_whatever_it_is_asked() -> None:
    """Its rows, its layers' hidden states, and what it writes."""
    from peft import LoraConfig, get_peft_model

    start, tok = tiny.llama(1), tiny.tokenizer()
    adapted = get_peft_model(
        copy.deepcopy(start), LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    plain, unadapted = LocalTeacher(start, tok), UnadaptedTeacher(adapted, tok)
    prompts = [Prompt([5, 6, 7], ""), Prompt([9, 8], "")]
    text = plain.generate(prompts, Sampling(6, seed=3))
    assert torch.equal(unadapted.generate(prompts, Sampling(6, seed=3)).input_ids, text.input_ids)
    for a, b in zip(unadapted.hidden_layers(text, [0, 1]), plain.hidden_layers(text, [0, 1]), strict=True):
        torch.testing.assert_close(a, b)
    every = slice(0, text.num_rows)
    torch.testing.assert_close(unadapted.dense(text).chunk(every, None), plain.dense(text).chunk(every, None))
    with_adapter = LocalTeacher(adapted, tok).hidden_layers(text, [1])[0]
    assert float((with_adapter - plain.hidden_layers(text, [1])[0]).abs().max()) > 1e-3
