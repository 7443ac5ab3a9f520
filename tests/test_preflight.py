"""Every start-up check fails where it must and passes where it must; looking changes nothing."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from llmdistill import Ask, Method, Term, UserError
from llmdistill.objectives import divergences
from llmdistill.preflight import Finding, examine, machine, preflight
from llmdistill.teachers.local import LocalTeacher
from llmdistill.texts import Prompt
from llmdistill.tokenization.compare import compare_tokenizers
from tests import tiny
from tests.preflight_runs import NAMES, Elsewhere, Make, ending, levels, listed, local, message, swapped

# ---------------------------------------------------------------- the whole


def test_a_sound_run_passes_every_check(make_trainer: Make) -> None:
    rows = tiny.rows(12, completion=False)
    findings = preflight(make_trainer(train=rows[:8], heldout=rows[8:]))
    assert {f.check for f in findings if f.level == "ok"} == set(NAMES)


@pytest.mark.parametrize("estimator", ["full", "top_k", "sampled"])
def test_looking_changes_nothing(make_trainer: Make, estimator: str) -> None:
    """Random state, modes, weights, gradients and clocks are as before: a resumed run must stay bitwise the same."""
    teacher = local()
    trainer = make_trainer(teacher=teacher, estimator=estimator, **listed(estimator))
    trainer.model.train()
    weights = [p.clone() for p in (*trainer.model.parameters(), *teacher.model.parameters())]
    state = torch.get_rng_state()
    preflight(trainer)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.model.training and not teacher.model.training
    after = [*trainer.model.parameters(), *teacher.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))
    assert all(p.grad is None for p in after)
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not trainer.meters.sums and not teacher.head.linear._forward_pre_hooks


def test_all_failures_are_listed_and_models_are_not_run(make_trainer: Make) -> None:
    trainer = make_trainer(teacher=local(tokenizer=swapped()), rollouts={"max_new_tokens": 1000})
    with pytest.raises(UserError) as error:
        preflight(trainer)
    lines = str(error.value).splitlines()
    assert lines[0] == "3 preflight checks failed"  # each model's context is one
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["tokenizers", "context", "context"]
    assert "not checked: it needs tokenizers, context" in " ".join(f.message for f in examine(trainer))


def test_a_skipped_check_does_not_fail(make_trainer: Make) -> None:
    trainer = make_trainer(rollouts={"max_new_tokens": 1000})
    findings = preflight(trainer, skip=["context"])
    assert [f.message for f in findings if f.check == "context"] == ["skipped by --skip-check"]


def test_an_unknown_check_is_named_with_its_neighbour(make_trainer: Make) -> None:
    with pytest.raises(UserError, match="did you mean 'eos-pad'"):
        preflight(make_trainer(), skip=["eos_pad"])


def test_an_error_inside_a_check_is_a_failure(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    monkeypatch.setattr(trainer.rollout_engine, "generate", lambda *a: 1 / 0)
    assert "could not be carried out: ZeroDivisionError" in message(trainer, "round-trip")


def test_a_finding_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Finding("fail", "disk", "[no] markup " + "long " * 60, "less").show(Console(width=40))
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "[no] markup" in out and out.rstrip().endswith("Fix: less.")


# ---------------------------------------------------------------- tokens


def test_tokenizers(make_trainer: Make) -> None:
    assert levels(make_trainer(), "tokenizers") == {"ok"}
    bad = message(make_trainer(teacher=local(tokenizer=swapped())), "tokenizers")
    first = tiny.tokenizer().convert_tokens_to_ids("a")
    assert "2 of 260 shared ids" in bad and f"{first} is 'a' to the student, 'b' to the teacher" in bad


def test_tokenizers_are_compared_over_shared_ids_only() -> None:
    longer = tiny.tokenizer()
    longer.add_tokens(["<new>"])
    c = compare_tokenizers(tiny.tokenizer(), longer)
    assert (c.shared, c.differing, c.student_only, c.teacher_only, c.same_splits) == (260, [], 0, 1, True)
    marked = tiny.tokenizer()
    marked.add_special_tokens({"additional_special_tokens": ["a"]}, replace_extra_special_tokens=False)
    assert [token for _, token in compare_tokenizers(tiny.tokenizer(), marked).special] == ["a"]


def test_tokenizers_by_fingerprint(make_trainer: Make) -> None:
    assert levels(make_trainer(teacher=Elsewhere(local())), "tokenizers") == {"ok"}
    assert "fingerprint" in message(make_trainer(teacher=Elsewhere(local(tokenizer=swapped()))), "tokenizers")


def test_logit_width(make_trainer: Make) -> None:
    assert levels(make_trainer(), "logit-width") == {"ok"}
    wide = make_trainer(teacher=tiny.llama(2, vocab=300))
    assert "has 300 logit columns, the student 264; columns past 264 are dropped" in message(
        wide, "logit-width", "notice"
    )
    assert "258 logit columns" in message(make_trainer(student=tiny.llama(1, vocab=258)), "logit-width")
    assert "258 logit columns" in message(make_trainer(teacher=tiny.llama(1, vocab=258)), "logit-width")


@pytest.mark.parametrize(
    "student,teacher,expected",
    [(1, 1, {"ok"}), ([1, 3], 1, {"notice"}), (1, [1, 3], {"fail"}), (1, 3, {"fail"})],
)
def test_eos(make_trainer: Make, student: Any, teacher: Any, expected: set[str]) -> None:
    assert levels(make_trainer(student=ending(1, student), teacher=ending(2, teacher)), "eos-pad") == expected


def test_pad(make_trainer: Make) -> None:
    bare = tiny.tokenizer()
    bare.pad_token = None
    assert "no pad token" in message(make_trainer(tokenizer=bare), "eos-pad", "notice")
    shared = tiny.tokenizer()
    shared.pad_token = shared.eos_token
    assert "pad is the only eos" in message(make_trainer(tokenizer=shared), "eos-pad", "notice")
    endless = tiny.tokenizer()
    endless.eos_token = None
    assert "no eos id" in message(make_trainer(student=ending(1, []), tokenizer=endless), "eos-pad")


def test_chat_template(make_trainer: Make) -> None:
    assert levels(make_trainer(), "chat-template") == {"ok"}
    other = local(tokenizer=tiny.tokenizer("{{ messages[0].content }}"))
    assert "student's rendering" in message(make_trainer(teacher=other), "chat-template", "notice")
    plain = [{"prompt": "1+1="}]
    bare = make_trainer(teacher=local(), tokenizer=tiny.tokenizer(None), train=plain)
    assert "no chat template" in message(bare, "chat-template", "notice")
    broken = make_trainer(tokenizer=tiny.tokenizer("{{ raise_exception('no users') }}"), train=plain)
    assert "no users" in message(broken, "chat-template")


def test_bos_twice(make_trainer: Make) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = "<user>"
    rows = [Prompt([5, 6], "x"), Prompt([2, 2, 5], "y", row=1)]
    assert "row 1" in message(make_trainer(tokenizer=tokenizer, train=rows), "chat-template")
    assert levels(make_trainer(tokenizer=tokenizer, train=rows[:1]), "chat-template") == {"ok"}


def test_context(make_trainer: Make) -> None:
    prompt = [Prompt(list(range(4, 10)), "x")]  # 6 tokens; both models have 256 positions
    assert levels(make_trainer(train=prompt, rollouts={"max_new_tokens": 250}), "context") == {"ok"}
    tight = message(make_trainer(train=prompt, rollouts={"max_new_tokens": 251}), "context")
    assert "need 257 positions, the student has 256" in tight
    elsewhere = make_trainer(teacher=Elsewhere(local()), train=prompt, rollouts={"max_new_tokens": 250})
    assert "has 255" in message(elsewhere, "context")
    assert levels(make_trainer(train=prompt, batch_tokens=16, rollouts={"max_new_tokens": 10}), "context") == {"ok"}
    small = message(make_trainer(train=prompt, batch_tokens=15, rollouts={"max_new_tokens": 10}), "context")
    assert "need 16 tokens in one pass, objective.batch_tokens is 15" in small


def test_prompts(make_trainer: Make) -> None:
    rows = tiny.rows(12, completion=False)
    assert levels(make_trainer(train=rows[:8], heldout=rows[8:]), "prompts") == {"ok"}
    assert "2 of 4 held-out prompts are also trained on" in message(
        make_trainer(train=rows[:10], heldout=rows[8:]), "prompts"
    )
    assert "1 training prompts are repetitions" in message(
        make_trainer(train=[*rows[:8], rows[0]], heldout=rows[8:]), "prompts", "notice"
    )
    nothing = [f.fix for f in preflight(make_trainer(train=rows[:8])) if "no held-out prompts" in f.message]
    assert nothing == ["--data.heldout FILE, or from Python eval_dataset="]  # the reader may have no command line
    assert "no token (first: row 7)" in message(make_trainer(train=[Prompt([], "", row=7)]), "prompts")
    assert "longer than data.max_prompt_tokens" in message(make_trainer(train=[Prompt([5] * 1025, "")]), "prompts")


# ---------------------------------------------------------------- machine and settings


def test_disk(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(save_total_limit=2)
    assert levels(trainer, "disk") == {"ok"}
    weights = sum(p.numel() for p in trainer.model.parameters())
    needed = 3 * weights * (4 + 8)  # two kept and one being written: float32 weights and AdamW's two moments
    for free, expected in ((needed, {"ok"}), (needed - 1, {"fail"})):
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert levels(trainer, "disk") == expected
    forever = make_trainer(save_strategy="steps", save_steps=0.01, save_total_limit=None)
    forever.args.max_steps = 1000
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * weights * 12))
    assert "keeping all checkpoints" in message(forever, "disk", "notice")


def test_device(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores_here", torch.get_num_threads)
    assert levels(make_trainer(), "device") == {"ok"}
    assert "float16 on a CPU" in message(make_trainer(student=tiny.llama(1).half()), "device")
    assert "rounded away" in message(make_trainer(student=tiny.llama(1).bfloat16()), "device", "notice")
    monkeypatch.setattr(machine, "cpu_flags", set)
    assert "no bfloat16 instructions" in message(make_trainer(bf16=True), "device", "notice")
    monkeypatch.setattr(machine, "cpu_flags", lambda: {"avx512_bf16"})
    assert "no bfloat16" not in message(make_trainer(bf16=True), "device", "notice")
    monkeypatch.setattr(machine, "cores_here", lambda: torch.get_num_threads() + 1)
    assert "cores are used" in message(make_trainer(), "device", "notice")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert "4 processes" in message(make_trainer(), "device", "notice")


def test_objective(make_trainer: Make) -> None:
    assert levels(make_trainer(estimator="top_k", top_k=264), "objective") == {"ok"}
    assert "objective.top_k is 265, the vocabulary has 264" in message(
        make_trainer(estimator="top_k", top_k=265), "objective"
    )
    greedy = make_trainer(rollouts={"temperature": 0.0, "samples_per_prompt": 2})
    assert "samples are the same" in message(greedy, "objective")
    assert "rollouts.top_k is 999" in message(make_trainer(rollouts={"top_k": 999}), "objective")
    warm = make_trainer(estimator="sampled", rollouts={"temperature": 0.7})
    assert "rollouts.temperature 0.7" in message(warm, "objective", "notice")
    assert "outside this process" in message(make_trainer(teacher=Elsewhere(local())), "objective", "notice")
    frozen = tiny.llama(1).requires_grad_(False)
    assert "no weight of the student is trained" in message(make_trainer(student=frozen), "objective")


# ---------------------------------------------------------------- models


def test_head(make_trainer: Make) -> None:
    assert levels(make_trainer(teacher=tiny.llama(2).bfloat16()), "head") == {"ok"}
    for side, seed in (("student", 1), ("teacher", 2)):
        scaled = tiny.llama(seed)
        scaled.register_forward_hook(lambda module, inputs, output: replace_logits(output, lambda x: 1.1 * x))
        assert levels(make_trainer(**{side: scaled}), "head") == {"ok"}  # found by trying
        odd = tiny.llama(seed)
        odd.register_forward_hook(lambda module, inputs, output: replace_logits(output, lambda x: x + 1.0))
        with pytest.raises(UserError, match="does more to the logits of its head"):
            make_trainer(**{side: odd})
        later = tiny.llama(seed)
        trainer = make_trainer(**{side: later})
        later.register_forward_hook(lambda module, inputs, output: replace_logits(output, lambda x: x + 1.0))
        assert f"the {side}'s logits" in message(trainer, "head")
        damaged = tiny.llama(seed)
        damaged.model.norm.weight.data[3] = float("nan")
        assert f"the {side}'s logits are NaN" in message(make_trainer(**{side: damaged}), "head")


def replace_logits(output: Any, transform: Any) -> Any:
    output.logits = transform(output.logits)
    return output


def at_wrong_place(blocks: list[Any]) -> list[Any]:
    return [replace(b, positions=slice(b.positions.start - 1, b.positions.stop - 1)) for b in blocks]


def of_other_tokens(blocks: list[Any]) -> list[Any]:
    return [replace(b, token_logprobs=b.token_logprobs.roll(1)) for b in blocks]


def with_nan(blocks: list[Any]) -> list[Any]:
    return [replace(b, token_logprobs=b.token_logprobs * float("nan")) for b in blocks]


@pytest.mark.parametrize(
    "spoil,said",
    [
        (at_wrong_place, "scored positions"),
        (of_other_tokens, "it scored other tokens"),
        (with_nan, "NaN in sequence 0"),
        (lambda blocks: blocks[:1], "1 blocks for 2 sequences"),
    ],
)
def test_a_teacher_that_breaks_its_contract(make_trainer: Make, spoil: Any, said: str) -> None:
    settings = {"estimator": "top_k", "top_k": 8}
    prompts = [Prompt([5, 6, 7], "x"), Prompt([8, 9, 10, 11], "y")]
    assert said in message(make_trainer(teacher=Elsewhere(local(), spoil), train=prompts, **settings), "round-trip")


def test_round_trip(make_trainer: Make) -> None:
    assert "ok" in levels(make_trainer(), "round-trip")
    assert "ok" in levels(make_trainer(teacher=Elsewhere(local()), estimator="sampled"), "round-trip")
    narrow = make_trainer(teacher=tiny.llama(2, vocab=5))  # ids from 5 on do not exist there
    assert "teacher" in message(narrow, "round-trip") and "has 5 columns" in message(narrow, "round-trip")


@pytest.mark.parametrize("stale,expected", [(False, "ok"), (True, "fail")])
def test_an_engine_with_other_weights(make_trainer: Make, stale: bool, expected: str) -> None:
    """An engine that reports what it drew with is held to the student's own log-probs, at the sampling temperature."""
    student, other = tiny.llama(1), tiny.llama(5)
    trainer = make_trainer(student=student, rollouts={"temperature": 0.7})
    draw = trainer.rollout_engine.generate

    def generate(prompts: Any, sampling: Any) -> Any:
        rollout = draw(prompts, sampling)
        model = other if stale else student
        with torch.no_grad():
            logits = model(input_ids=rollout.input_ids, attention_mask=rollout.attention_mask).logits / 0.7
        logprobs = logits.log_softmax(-1)[:, :-1].gather(2, rollout.input_ids[:, 1:, None]).squeeze(2)
        shifted = torch.nn.functional.pad(logprobs, (1, 0)) * rollout.completion_mask
        return replace(rollout, behavior_logprobs=shifted)

    trainer.rollout_engine.generate = generate  # type: ignore[method-assign]
    assert expected in levels(trainer, "round-trip")
    assert ("holds other weights" in message(trainer, "round-trip")) == stale


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"divergence": "jsd", "beta": 0.3},
        {"divergence": "total_variation"},
        {"divergence": "adaptive_kl"},
        {"divergence": "f_divergence", "name": "total_variation", "estimator": "top_k"},
        {"estimator": "top_k", "top_k": 4},
        {"estimator": "sampled"},
        {"loss_temperature": 2.0},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teacher_has_nothing_to_teach_itself(make_trainer: Make, settings: Any, dtype: torch.dtype) -> None:
    assert levels(make_trainer(teacher=tiny.llama(2).to(dtype), **settings), "self") == {"ok"}


def test_self_sees_rows_that_are_shifted(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic: evidence one token early."""
    trainer = make_trainer()
    right = LocalTeacher.dense

    def early(self: LocalTeacher, rollout: Any) -> Any:
        rows = right(self, rollout)
        return replace(rows, hidden_NH=rows.hidden_NH.roll(1, 0))

    monkeypatch.setattr(LocalTeacher, "dense", early)
    assert "compares different things" in message(trainer, "self")


def test_self_sees_an_objective_with_an_offset_and_one_without_gradient(make_trainer: Make) -> None:
    trainer = make_trainer()
    trainer.method = Method(Term("offset", lambda s, t: divergences.forward_kl(s, t) + 1.0, (Ask(),)))
    assert "an offset" in message(trainer, "self", "notice")
    trainer.method = Method(Term("nothing", lambda s, t: divergences.forward_kl(s, t) * 0, (Ask(),)))
    assert "no gradient" in message(trainer, "self")


@pytest.mark.parametrize("weight", [0.0, (1.0, 2.0)])
def test_weights_of_rows_are_not_in_the_way_of_self(make_trainer: Make, weight: Any) -> None:
    """The check counts other tokens than the row's completion, of which the weights are."""
    rows = [Prompt(list(range(4, 30)), "x", weight=weight), Prompt([5, 6, 7, 8], "y", row=1, weight=weight)]
    assert levels(make_trainer(train=rows), "self") == {"ok"}


def test_self_says_when_it_cannot_look(make_trainer: Make) -> None:
    assert "another engine" in message(make_trainer(teacher=Elsewhere(local())), "self", "notice")
