"""The stages on the one loop, with tiny models: they learn, go through adapters, and what they save is a denoiser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from llmdistill import RolloutConfig, UserError, cli
from llmdistill.diffusion import MaskedDiffusionLM, elbo
from llmdistill.diffusion.stages import ARDistillationConfig, DiffusionOPDConfig, FromARConfig, SFTConfig
from llmdistill.diffusion.trainers import ARDistillationTrainer, MaskedDiffusionTrainer
from llmdistill.evals.callback import EvalCallback
from llmdistill.evals.engines.base import Asked
from llmdistill.evals.engines.diffusion import DiffusionEngine
from llmdistill.texts import Prompt, Sampling
from tests import tiny
from tests.evals import made

from .runs import examples, trainer

WRITERS = (DiffusionOPDConfig, ARDistillationConfig)


def log(t: Any, name: str = "loss") -> list[float]:
    return [line[name] for line in t.state.log_history if name in line]


@pytest.mark.parametrize("settings", [{}, {"block_size": 4}, {"shift": False}], ids=str)
def test_it_learns_and_what_it_saves_is_the_denoiser(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Thirty steps on sixteen rows: the held-out bound falls by a third. The folder is a plain checkpoint: loaded by
    transformers alone it has the trained logits, and the denoiser of it the bound that was measured in training."""
    t = trainer(tmp_path / "run", max_steps=30, logging_steps=30, **settings)
    before = t.evaluate()
    t.train()
    after = t.evaluate()
    assert after["eval_bound/nats"] < before["eval_bound/nats"] * 2 / 3
    assert after["eval_loss"] == after["eval_bound/nats"]
    said: list[str] = []
    t.heldout.tell = said.append
    t.measure_heldout(t.eval_dataset)
    assert len(said) == t.args.heldout_masks + 3 and "mask 1 of" in said[0] and "15% of the tokens" in said[-3]
    assert {"eval_t15/masked_ce", "eval_t50/masked_ce", "eval_t90/masked_ce"} < after.keys()
    t.save_model(str(tmp_path / "saved"))
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    assert config.architectures == ["LlamaForCausalLM"] and config.is_causal is False
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = torch.tensor([[5, 9, 60, 7]])
    t.model.eval()
    torch.testing.assert_close(plain(ids).logits, t.model(ids).logits)
    model, tokenizer = MaskedDiffusionLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert (model.shift, model.block_size) == (t.denoiser.shift, t.denoiser.block_size)
    assert tokenizer.mask_token_id == t.denoiser.mask_token_id
    if model.block_size is None:  # 64 masks of each: four standard errors of both estimates
        bounds = []
        for prompt in t.eval_dataset:
            whole = torch.tensor([[*prompt.ids, *prompt.completion]])
            maskable = torch.arange(whole.shape[1])[None] >= len(prompt.ids)
            bounds.append(elbo(model, whole, maskable, n=64, generator=torch.Generator().manual_seed(0)))
        t.args.heldout_masks = 64
        found = t.measure_heldout(t.eval_dataset)["bound"]
        error = sum(float(b.error[0]) ** 2 for b in bounds) ** 0.5
        assert sum(found.sums["nats"]) == pytest.approx(sum(float(b.nats[0]) for b in bounds), abs=4 * 2**0.5 * error)


def test_a_checkpoint_is_an_engine_of_eval(tmp_path: Path) -> None:
    t = trainer(tmp_path / "run", block_size=4)
    t.train()
    t.save_model(str(tmp_path / "saved"))
    model, tokenizer = MaskedDiffusionLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    engine = DiffusionEngine(model, tokenizer, {"select": "threshold", "threshold": 0.9})
    prompt = t.eval_dataset[0].ids
    asked = [Asked("p", i, 7 + i, [], ids=prompt, text="", room=8) for i in range(2)]
    samples = list(engine.draw(asked, Sampling(8), ()))
    assert len(samples) == 2 and all(0 < s.tokens <= 8 for s in samples)


def test_samples_of_a_problem_are_pushed_apart_by_eval_too(tmp_path: Path) -> None:
    """As by ``generate`` with the processor; other problems in the call, and their order, change nothing."""
    model, tokenizer = MaskedDiffusionLM(tiny.llama(3), mask_token_id=262), tiny.tokenizer()

    def asked(problem: str, first: int) -> list[Asked]:
        return [Asked(problem, i, first + i, [], ids=[7, 8, 9], text="", room=6) for i in range(4)]

    def drawn(settings: dict[str, Any], *problems: list[Asked]) -> dict[tuple[str, int], str]:
        engine = DiffusionEngine(model, tokenizer, settings, batch_size=3)
        found = engine.draw([one for of in problems for one in of], Sampling(6, temperature=0.1), ())
        return {(s.problem, s.index): s.text for s in found}

    alike, apart = drawn({}, asked("p", 3)), drawn({"repulsion": "odd", "repulsion_alpha": 30.0}, asked("p", 3))
    assert len(set(apart.values())) > len(set(alike.values()))
    assert apart["p", 0] == alike["p", 0]  # the first is left as it is
    both = drawn({"repulsion": "odd", "repulsion_alpha": 30.0}, asked("q", 50), asked("p", 3))
    assert {key: text for key, text in both.items() if key[0] == "p"} == apart
    assert set(drawn({"repulsion": "dpp"}, asked("p", 3))) == set(apart)
    for wrong, said in (
        ({"repulsion": "foo"}, "diffusion.repulsion is 'foo'; there are none, odd, dpp"),
        ({"repulsion_alpha": 3}, "repulsion_alpha and no repulsion"),
        ({"repulsion": "odd", "repulsion_alpha": -1}, "diffusion.alpha is -1"),
        ({"repulsion": "odd", "repulsion_pool": "sum"}, "there are max and mean"),
        ({"repulsion": "odd", "repulsion_beta": 1}, "diffusion has 'repulsion_beta'"),
    ):
        with pytest.raises(UserError, match=said):
            list(DiffusionEngine(model, tokenizer, wrong).draw(asked("p", 3), Sampling(6), ()))


def test_suites_during_training_are_written_by_denoising(tmp_path: Path) -> None:
    """And not by generate of transformers, from left to right, which a student that reads both ways cannot."""
    t = trainer(tmp_path, max_steps=2, block_size=4, writing={"order": "margin"})
    t.add_callback(EvalCallback(t, [str(made.suite(tmp_path))], problems=3, samples=1, longest=6))
    t.train()
    found = json.loads((tmp_path / "evals" / "step-000002" / "sums" / "results.json").read_text())
    assert found["problems"] == 3
    told = (tmp_path / "evals" / "step-000002" / "sums" / "config.json").read_text()
    assert "diffusion" in told and "margin" in told


@pytest.mark.parametrize("norm", ["sequence", "token"])
def test_training_does_not_depend_on_micro_batches(tmp_path: Path, norm: str) -> None:
    runs = []
    for size, accumulation in ((8, 1), (2, 4)):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        t = trainer(tmp_path / str(size), norm=norm, copies=2, anneal_steps=3, **split)
        t.train()
        runs.append(log(t))
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


@pytest.mark.parametrize("batch_tokens, calls", [(0, 2), (24, 10), (4096, 1)])
def test_so_many_sequences_are_written_together_as_batch_tokens_hold(
    tmp_path: Path, batch_tokens: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty prompts of four tokens with room for eight; without a bound sixteen at a time."""
    t = trainer(tmp_path, block_size=4)
    engine = t.rollout_engine
    assert engine.batch_tokens == t.args.rollouts.batch_tokens
    engine.batch_tokens = batch_tokens
    sizes, batch = list[int](), engine._batch
    monkeypatch.setattr(engine, "_batch", lambda model, asked, s: (sizes.append(len(asked)), batch(model, asked, s))[1])
    engine.sync(t.model, 0)
    found = engine.generate([Prompt([5, 6, 7, 8], "")] * 20, Sampling(8, seed=1))
    assert len(sizes) == calls and sum(sizes) == len(found) == 20


def test_an_adapter_is_trained_and_merged(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    t = trainer(tmp_path, max_steps=12, peft_config=lora, block_size=4)
    before = t.evaluate()["eval_loss"]
    t.train()
    assert t.evaluate()["eval_loss"] < before - 0.3
    written = t.rollout_engine
    written.sync(t.forward_model(), 0)
    rollout = written.generate(t.eval_dataset[:2], Sampling(6, seed=3))
    assert rollout.step_map is not None and int(rollout.step_map.max()) >= 0


@pytest.mark.parametrize("targets", ["all", "no_suffix"])
def test_a_teacher_of_the_states_that_the_student_writes_through(tmp_path: Path, targets: str) -> None:
    """The divergence from an autoregressive teacher falls; each block of a text is one state of its trace, in which
    what a step reveals is masked or not as a whole."""
    teacher = tiny.llama(2)
    small = {"writing": {"order": "sequential" if targets == "all" else "entropy"}, "targets": targets}
    t = trainer(tmp_path, DiffusionOPDConfig, ARDistillationTrainer, teacher=teacher, max_steps=16, **small)
    rollout = t.draw(examples(t))["main"].rollout
    steps, noise = rollout.step_map, rollout.noise
    for b in range(len(rollout)):
        for block in range(1, int(noise.blocks[b].max()) + 1):
            here = noise.blocks[b] == block
            masked = noise.masked[b] & here
            assert bool(masked.any()) and bool((steps[b][masked].min() > steps[b][here & ~masked]).all())
    assert torch.equal(rollout.completion_mask, noise.masked & noise.countable)
    if targets == "all":  # written from left to right nothing is visible behind a masked token
        assert bool(noise.no_suffix[rollout.completion_mask].all())
    t.train()
    losses = log(t)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize(
    "settings",
    [{"targets": "sequence"}, {"targets": "no_suffix"}, {"targets": "no_suffix", "top_k": 8, "sequences": "dataset"}],
    ids=str,
)
def test_given_text_and_what_a_teacher_says_of_it(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The bound on what the teacher writes for held-out prompts, which have no completions of their own, falls."""
    if settings.get("sequences") != "dataset":
        settings = settings | {"eval_dataset": tiny.rows(20, completion=False)[16:]}
    t = trainer(tmp_path, ARDistillationConfig, ARDistillationTrainer, teacher=tiny.llama(2), max_steps=12, **settings)
    before = t.evaluate()["eval_bound/nats"]
    t.train()
    assert t.evaluate()["eval_bound/nats"] < before - 0.3


def test_the_mask_token_of_a_teacher_ends_its_text(tmp_path: Path) -> None:
    """A teacher whose head is wider than its vocabulary may write the id of the student's new mask token."""
    t = trainer(tmp_path, ARDistillationConfig, ARDistillationTrainer, teacher=tiny.llama(2), targets="sequence")
    mask = t.denoiser.mask_token_id
    drawn = t.method.texts["main"].source.draw

    def with_mask(round_: Any) -> Any:
        rollout, prompts = drawn(round_)
        rollout.input_ids[0, len(prompts[0].ids) + 2] = mask
        return rollout, prompts

    t.method.texts["main"].source.draw = with_mask
    rollout = t.draw(examples(t))["main"].rollout
    assert not bool((rollout.input_ids == mask).any())
    assert int(rollout.noise.countable[0].sum()) == 2
    assert t.method.texts["main"].numbers()["cut_at_mask_token"] >= 1


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mask token"):
        rows = [Prompt([5, 6], "", row=i, completion=(7, 260 if i == 1 else 9, 1)) for i in range(4)]
        trainer(tmp_path, train_dataset=rows, eval_dataset=None)
    with pytest.raises(UserError, match="an ordinary word"):
        trainer(tmp_path, mask_token="a")
    with pytest.raises(UserError, match="learns from a teacher"):
        trainer(tmp_path, DiffusionOPDConfig, ARDistillationTrainer)
    with pytest.raises(UserError, match="rollouts.engine is vllm"):
        SFTConfig(output_dir=str(tmp_path), rollouts=RolloutConfig(engine="vllm"))
    with pytest.raises(UserError, match="no completion"):
        t = trainer(tmp_path, eval_dataset=[{"prompt": "a"}])
        t.evaluate()


def test_the_door_trains_from_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command, with preflight, measurement before and after, and the saved student; and the checks alone."""
    from llmdistill.diffusion.__main__ import main

    tiny.llama(1).save_pretrained(tmp_path / "student")
    tiny.tokenizer().save_pretrained(tmp_path / "student")
    rows = tiny.rows(20)
    for name, part in (("train", rows[:16]), ("heldout", rows[16:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    words = ["--student.model", str(tmp_path / "student"), "--data.train", str(tmp_path / "train.jsonl")]
    words += ["--data.heldout", str(tmp_path / "heldout.jsonl"), "--output_dir", str(tmp_path / "run")]
    words += ["--max_steps", "4", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--save_steps", "2"]
    words += ["--max_new_tokens", "8", "--learning_rate", "0.01", "--block_size", "4", "--save_total_limit", "3"]
    assert cli.main(["doctor", "--method", "diffusion", *words]) == 0
    assert "read both ways" in capsys.readouterr().out
    assert main(words) == 0
    before, after = (json.loads((tmp_path / "run" / f"{n}.json").read_text()) for n in ("before", "after"))
    assert after["bound"]["nats"] < before["bound"]["nats"] and len(after["student_answers"]) == 3
    assert (tmp_path / "run" / "report.html").is_file()
    model, _ = MaskedDiffusionLM.from_pretrained(tmp_path / "run" / "student")
    assert model.block_size == 4
    with pytest.raises(UserError, match="nobody asks it"):
        main([*words, "--teacher.model", str(tmp_path / "student")])
    with pytest.raises(UserError, match="there are from_ar"):
        main([*words, "--stage", "sfd"])


def test_stages_have_settings_and_trainers() -> None:
    import llmdistill.diffusion
    from llmdistill.diffusion.__main__ import STAGES, of_stage

    for name in llmdistill.diffusion.__all__:
        assert getattr(llmdistill.diffusion, name) is not None
    for name in STAGES:
        config, trainer_class = of_stage(name)
        several = {"rollouts": RolloutConfig(samples_per_prompt=2), "reward": "math"} if name == "rl" else {}
        assert config(output_dir="x", **several).stage == name and issubclass(trainer_class, MaskedDiffusionTrainer)
    assert FromARConfig(output_dir="x").norm == "token" and SFTConfig(output_dir="x").norm == "sequence"
