"""Whose text a round is: the student's, the dataset's, the teacher's, a mix, or DistiLLM's schedule with its replay."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill import OPDConfig, OPDTrainer, RolloutConfig, UserError
from llmdistill.texts import Prompt, collate
from llmdistill.texts.sources import Adaptive, Mixed, Only, Round, make_source
from tests import tiny
from tests.trainer.test_gopd import bitwise, weights
from tests.trainer.test_several_teachers import Pushed

PROMPTS = [Prompt([5, 6 + i], f"p{i}", row=i) for i in range(2)]


def round_(step: int, rank: int = 0, *, total: int = 100, samples: int = 1, seen: list[str] | None = None) -> Round:
    """A round whose sources say who was asked; every student sample is another one."""

    def source(name: str) -> Any:
        def draw(prompts: Any) -> Any:
            if seen is not None:
                seen.append(name)
            each = [p for p in prompts for _ in range(samples)]
            tokens = [[1000 * step + 10 * rank + b] for b in range(len(each))]
            lp = [[-1.0 * token] for (token,) in tokens]
            return collate([p.ids for p in each], tokens, pad_id=0, behavior_logprobs=lp, policy_version=step), each

        return draw

    sources = {name: source(name) for name in ("student", "dataset", "teacher")}
    return Round(PROMPTS, step, total, 7, rank, samples, 0, sources)


# ---------------------------------------------------------------- the policies alone


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_mixed_draws_the_student_in_its_share_and_alike_on_every_rank(share: float) -> None:
    seen: list[list[str]] = []
    for rank in (0, 1, 5):
        seen.append([])
        for step in range(1000):
            Mixed(share).draw(round_(step, rank, seen=seen[-1]))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0].count("student") / 1000 == pytest.approx(share, abs=0.045)  # three standard deviations
    again: list[str] = []
    for step in range(500, 1000):  # a run resumed in the middle
        Mixed(share).draw(round_(step, seen=again))
    assert again == seen[0][500:]
    assert set(seen[0]) <= {"student", "dataset"}


def test_mixed_with_the_teachers_text() -> None:
    seen: list[str] = []
    policy = Mixed(0.5, "teacher")
    for step in range(100):
        policy.draw(round_(step, seen=seen))
    assert set(seen) == {"student", "teacher"} == policy.uses


def test_phi_grows_only_when_the_loss_has_risen_by_eps_since_it_last_grew() -> None:
    policy = Adaptive(eps=0.1)
    phis = []
    for loss in (2.0, 2.09, 2.05, 2.1, 2.15, 1.0, 2.19, 2.2, 2.5, 2.55, 9.0):
        policy.evaluated(loss)
        phis.append(round(policy.phi, 6))
    #                 first  <    <  grew  <    <    <  grew grew  <  grew
    assert phis == [0.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1, 0.2, 0.3, 0.3, 0.4]
    for step in range(30):
        policy.evaluated(100.0 + step)
    assert policy.phi == 1.0


def test_adaptive_begins_with_the_dataset_then_generates_then_replays() -> None:
    seen: list[str] = []
    policy = Adaptive(capacity=6)
    for step in range(10):
        policy.draw(round_(step, seen=seen))
    assert seen == ["dataset"] * 10 and len(policy.buffer) == 0
    policy.phi = 1.0
    for step in range(10, 13):  # the buffer fills
        policy.draw(round_(step, total=10**9, seen=seen))
    assert seen[10:] == ["student"] * 3 and policy.buffer.full
    seen.clear()
    rollout, prompts = policy.draw(round_(100, total=100, seen=seen))  # at the end nothing is generated anew
    assert seen == [] and len(rollout) == len(prompts) == 2 and rollout.policy_version >= 10


def test_the_shares_of_adaptive_rounds() -> None:
    """phi: student text; of that 1 - step/total anew; the rest replayed; on every rank alike."""
    counts: list[Counter[str]] = []
    for rank in (0, 1):
        policy, kinds = Adaptive(capacity=2), []
        policy.phi = 1.0
        policy.draw(round_(0, rank))
        policy.phi = 0.6
        for step in range(500, 1500):
            seen: list[str] = []
            policy.draw(round_(step, rank, total=2000, seen=seen))
            kinds += seen or ["replay"]
        counts.append(Counter(kinds))
    assert counts[0] == counts[1]
    assert counts[0]["dataset"] == pytest.approx(400, abs=50)
    assert counts[0]["student"] == pytest.approx(300, abs=50)  # .6 (1 - step/2000), .5 on average
    assert counts[0]["replay"] == pytest.approx(300, abs=50)


def test_replayed_rounds_have_as_many_sequences_as_others_and_differ_by_rank() -> None:
    policy = Adaptive(capacity=12)
    policy.phi = 1.0
    while not policy.buffer.full:
        policy.draw(round_(0, total=10**9, samples=3))
    rollout, prompts = policy.draw(round_(100, total=100, samples=3))
    assert len(rollout) == len(prompts) == 6
    for ids, prompt in zip(rollout.input_ids.tolist(), prompts, strict=True):
        assert ids[:2] == prompt.ids
    other, _ = policy.draw(round_(100, rank=1, total=100, samples=3))
    assert other.input_ids.tolist() != rollout.input_ids.tolist() or len(policy.buffer) < 12


def test_the_state_of_adaptive_goes_through_a_file_of_plain_data(tmp_path: Path) -> None:
    policy, restored = Adaptive(capacity=4), Adaptive(capacity=4)
    policy.phi = 1.0
    for step in range(3):
        policy.draw(round_(step, total=10**9))
    policy.evaluated(1.0)
    torch.save(policy.state_dict(), tmp_path / "state.pt")
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (restored.phi, restored.last_loss, restored.buffer.samples) == (1.0, 1.0, policy.buffer.samples)


def test_policies_by_name() -> None:
    def made(kind: Any) -> Any:
        return make_source(kind, student_fraction=0.3, off_policy="teacher", replay_size=5, adaptive_eps=0.2)

    assert isinstance(made("student"), Only) and made("teacher").uses == {"teacher"}
    assert made("mixed").student_fraction == 0.3 and made("mixed").off_policy == "teacher"
    adaptive = made("adaptive")
    assert (adaptive.buffer.capacity, adaptive.eps, adaptive.off_policy) == (5, 0.2, "teacher")
    with pytest.raises(ValueError, match="student_fraction is 1.5"):
        Mixed(1.5)


# ---------------------------------------------------------------- in the trainer


def make(folder: Path, policy: Any = None, train: Any = None, **settings: Any) -> OPDTrainer:
    settings = {"max_steps": 8, "per_device_train_batch_size": 2, "save_strategy": "no", **settings}
    settings.setdefault("rollouts", RolloutConfig(max_new_tokens=5))
    extra = {k: settings.pop(k) for k in ("rollout_engine",) if k in settings}
    return OPDTrainer(
        tiny.llama(1),
        OPDConfig(output_dir=str(folder), logging_steps=1, learning_rate=3e-3, **settings),
        tiny.llama(2),
        train_dataset=tiny.rows(32) if train is None else train,
        eval_dataset=tiny.rows(2),
        processing_class=tiny.tokenizer(),
        **({} if policy is None else {"sequences": policy}),
        **extra,
    )


def watch(trainer: OPDTrainer) -> list[tuple[str, Any, Any]]:
    """(source, rollout, prompts) of every round."""
    rounds: list[tuple[str, Any, Any]] = []
    draw = trainer.method.texts["main"].draw

    def watched(r: Round) -> Any:
        names: list[str] = []

        def named(name: str, source: Any) -> Any:
            return lambda of: names.append(name) or source(of)  # type: ignore[func-returns-value]

        drawn = draw(replace(r, authors={name: named(name, source) for name, source in r.authors.items()}))
        rounds.append(((names or ["replay"])[0], *drawn))
        return drawn

    trainer.method.texts["main"].draw = watched  # type: ignore[method-assign]
    return rounds


def sequences(rollout: Any) -> list[tuple[Any, ...]]:
    lp = rollout.behavior_logprobs
    return [
        (
            rollout.input_ids[b, : int(rollout.attention_mask[b].sum())].tolist(),
            rollout.completion_mask[b].nonzero().flatten().tolist(),
            lp[b][rollout.completion_mask[b]].tolist() if lp is not None else None,
            rollout.finish[b] if rollout.finish else None,
        )
        for b in range(len(rollout))
    ]


@pytest.mark.parametrize("samples,mask_truncated", [(1, False), (2, True)])
def test_adaptive_resumed_is_the_undisturbed_run_and_replays_what_was_written(
    tmp_path: Path, samples: int, mask_truncated: bool
) -> None:
    """phi, the buffer and the weights; every replayed sequence is a student's, to its log-probs and its ending."""
    settings = dict(
        max_steps=10,
        save_strategy="steps",
        save_steps=5,
        eval_strategy="steps",
        eval_steps=1,
        rollouts=RolloutConfig(max_new_tokens=5, samples_per_prompt=samples, mask_truncated=mask_truncated),
    )

    def policy() -> Adaptive:
        return Adaptive(capacity=4 * samples, eps=-100.0, growth=0.5)  # grows at every validation

    whole = make(tmp_path / "run", policy(), **settings)
    rounds = watch(whole)
    whole.train()
    assert {"dataset", "student", "replay"} == {name for name, *_ in rounds}
    written: list[tuple[Any, ...]] = []
    for name, rollout, prompts in rounds:
        for (ids, *_), prompt in zip(sequences(rollout), prompts, strict=True):
            assert ids[: len(prompt.ids)] == prompt.ids
        if name == "student":
            written += sequences(rollout)
        if name == "replay":
            assert len(rollout) == 2 * samples and all(s in written for s in sequences(rollout))
    assert all(lp is not None and finish for *_, lp, finish in written)
    resumed = make(tmp_path / "run", policy(), **settings)
    again = watch(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    assert [name for name, *_ in again] == [name for name, *_ in rounds[5:]]
    one, other = resumed.method.texts["main"], whole.method.texts["main"]
    assert one.buffer.samples == other.buffer.samples  # type: ignore[attr-defined]
    assert (one.phi, one.last_loss) == (other.phi, other.last_loss)  # type: ignore[attr-defined]
    assert bitwise(weights(resumed.model), weights(whole.model))
    assert len(whole.method.texts["main"].buffer) <= 4 * samples  # type: ignore[attr-defined]


def test_mixed_resumed_decides_as_the_undisturbed_run(tmp_path: Path) -> None:
    settings = dict(sequences="mixed", student_fraction=0.5, save_strategy="steps", save_steps=4)
    whole = make(tmp_path / "run", **settings)
    rounds = watch(whole)
    whole.train()
    resumed = make(tmp_path / "run", **settings)
    again = watch(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert {name for name, *_ in rounds} == {"student", "dataset"}
    assert [name for name, *_ in again] == [name for name, *_ in rounds[4:]]
    assert bitwise(weights(resumed.model), weights(whole.model))


def test_the_teachers_text_is_the_teachers(tmp_path: Path) -> None:
    t = make(tmp_path, sequences="teacher", max_steps=2, train=tiny.rows(8, completion=False),
             rollouts=RolloutConfig(max_new_tokens=5, samples_per_prompt=2, mask_truncated=True))  # fmt: skip
    rounds = watch(t)
    t.train()
    for step, (name, rollout, prompts) in enumerate(rounds):
        assert name == "teacher" and [p.row for p in prompts[::2]] == [p.row for p in prompts[1::2]]
        expected = t.teacher.generate(prompts[::2], t._sampling(step))
        # Not the student's probabilities: there is no ratio to weigh a token by.
        assert sequences(rollout) == sequences(replace(expected, behavior_logprobs=None))


def test_off_policy_text_with_mask_truncated_and_a_dataset_without_endings(tmp_path: Path) -> None:
    rollouts = RolloutConfig(max_new_tokens=5, mask_truncated=True)
    t = make(tmp_path, sequences="dataset", max_steps=2, rollouts=rollouts)
    t.train()
    assert all("rollout/truncated_fraction" not in line for line in t.state.log_history)


@pytest.mark.parametrize("kind", ["dataset", "mixed", "adaptive"])
def test_rows_without_a_completion_are_refused(tmp_path: Path, kind: Any) -> None:
    rows = [*tiny.rows(3), *tiny.rows(1, completion=False)]
    with pytest.raises(UserError, match=r"row 3: completion is empty. Fix: --data.completion_column NAME"):
        make(tmp_path, sequences=kind, train=rows, eval_strategy="steps", eval_steps=1)
    bare = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "off_policy": "teacher"}
    if kind != "dataset":  # the teacher's text needs none
        make(tmp_path, sequences=kind, train=tiny.rows(4, completion=False), **bare).train()


def test_weights_are_pushed_once_a_stretch_also_where_the_student_writes_at_no_multiple(tmp_path: Path) -> None:
    """No sample is older than push_every - 1 steps, whichever rounds are the student's."""
    engine = Pushed(eos_ids=[1], pad_id=0)
    rollouts = RolloutConfig(engine="vllm", max_new_tokens=3, push_every=3)
    t = make(tmp_path, sequences="mixed", rollouts=rollouts, rollout_engine=engine, max_steps=16)
    rounds = watch(t)
    t.train()
    student = [step for step, (name, *_) in enumerate(rounds) if name == "student"]
    assert 3 < len(student) < 13
    assert engine.pushes == [next(s for s in student if s // 3 == k) for k in sorted({s // 3 for s in student})]
    assert all(0 <= s - rounds[s][1].policy_version < 3 for s in student)


def test_a_policy_goes_in_as_an_object_and_a_name_by_the_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sequences='dataset' is a name.*OPDConfig\(sequences='dataset'\)"):
        make(tmp_path, "dataset")
    with pytest.raises(UserError, match="sampled needs tokens that the student drew, and Mixed uses dataset, student"):
        make(tmp_path, Mixed(0.5), estimator="sampled")
    assert make(tmp_path, Only("student"), estimator="sampled").on_policy


# ---------------------------------------------------------------- ids that one of the models has no column for

WIDTHS = {"student wider": (264, 262), "teacher wider": (262, 264)}


@pytest.mark.parametrize(
    ("widths", "estimator"),
    [("student wider", "full"), ("student wider", "top_k"), ("student wider", "sampled"), ("teacher wider", "full")],
)
def test_a_completion_ends_before_an_id_that_one_model_cannot_read(tmp_path: Path, widths: str, estimator: Any) -> None:
    """Text that the model with the wider head wrote."""
    wide = widths == "student wider"
    models = [tiny.llama(seed, vocab=vocab, tied=False) for seed, vocab in zip((1, 2), WIDTHS[widths], strict=True)]
    writer = models[0 if wide else 1]
    with torch.no_grad():  # it likes one of its two columns past the other's head
        writer.get_output_embeddings().weight[262:] *= 3
    rows, readable = tiny.rows(16), []
    settings = {"sequences": "student" if wide else "teacher", "estimator": estimator, "max_steps": 3}
    t = OPDTrainer(
        models[0],
        OPDConfig(output_dir=str(tmp_path / "run"), logging_steps=1, per_device_train_batch_size=8, save_strategy="no",
                  rollouts=RolloutConfig(max_new_tokens=8, samples_per_prompt=2), **settings),
        models[1],
        train_dataset=rows,
        eval_dataset=tiny.rows(4),
        processing_class=tiny.tokenizer(),
    )  # fmt: skip
    rounds, draw = watch(t), t.draw

    def drawn(prompts: Any) -> Any:
        texts = draw(prompts)
        readable.append((texts["main"].rollout, texts["main"].prompts))
        return texts

    t.draw = drawn  # type: ignore[method-assign]
    t.train()
    cuts = 0
    for (_, before, _), (after, _) in zip(rounds, readable, strict=True):
        for had, kept, mask in zip(before.input_ids, after.input_ids, after.attention_mask, strict=True):
            ids = had.tolist()
            first = next((i for i, token in enumerate(ids) if token >= 262), None)
            cuts += first is not None
            if first is not None:
                assert kept[mask].tolist() == ids[:first]
        assert not bool((after.completion_mask & ~after.attention_mask).any())
    logged = sum(line.get("rollout/cut_at_unreadable_id", 0) for line in t.state.log_history)
    assert cuts > 3 and logged == cuts
    assert all(math.isfinite(line["loss"]) for line in t.state.log_history if "loss" in line)
    assert all(math.isfinite(v) for v in t.evaluate().values())


def test_a_prompt_that_the_teacher_cannot_read_is_named(tmp_path: Path) -> None:
    rows = [Prompt([5, 6, 7], "a", row=0), Prompt([5, 261, 7], "b", row=1)]
    t = OPDTrainer(
        tiny.llama(1),
        OPDConfig(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to="none"),
        tiny.llama(2, vocab=260),
        train_dataset=rows,
        processing_class=tiny.tokenizer(),
    )
    with pytest.raises(UserError, match="prompt of row 1 has the id 261, and .* 260 columns in common"):
        t.train()
