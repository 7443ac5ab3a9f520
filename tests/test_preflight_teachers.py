"""The start-up checks with several teachers, and with one that is read from disk."""

from __future__ import annotations

from typing import Any

import pytest

from llmdistill import DistillationTrainer, OPDConfig, OPDTrainer, RolloutConfig, UserError
from llmdistill.preflight import examine, preflight
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.mixture import EnsembleTeacher, RoutedTeacher
from llmdistill.texts import Prompt
from llmdistill.texts.prompts import completed
from llmdistill.texts.sources import Only
from tests import tiny
from tests.preflight_runs import NAMES, Elsewhere, Make, ending, levels, listed, local, message, swapped

# ---------------------------------------------------------------- several teachers


def in_domains(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "domain": ("math", "code")[i % 2]} for i, row in enumerate(rows)]


def two(a: Any = None, b: Any = None, rest: bool = False) -> RoutedTeacher:
    return RoutedTeacher({"A": (a or local(), ["math"]), "B": (b or local(tiny.llama(3)), [] if rest else ["code"])})


@pytest.mark.parametrize("estimator", ["full", "top_k", "sampled"])
def test_a_sound_run_with_two_teachers_passes_every_check(make_trainer: Make, estimator: str) -> None:
    """Every check looks at both, the self-check through the router, and looking changes nothing."""
    rows = in_domains(tiny.rows(12, completion=False))
    trainer = make_trainer(teacher=two(), train=rows[:8], heldout=rows[8:], estimator=estimator, **listed(estimator))
    findings = preflight(trainer)
    assert {f.check for f in findings if f.level == "ok"} == set(NAMES)
    for check in ("tokenizers", "eos-pad", "chat-template", "head", "self"):
        said = " ".join(f.message for f in findings if f.check == check)
        assert "teacher 'A'" in said and "teacher 'B'" in said, check
    assert "4 rows for teacher 'A'; 4 rows for teacher 'B'" in message(trainer, "domains", "ok")
    assert all(p.grad is None for p in trainer.model.parameters())


def test_an_ensemble_passes_every_check(make_trainer: Make) -> None:
    """Its average is no member's own word, so each member is held against itself alone."""
    teacher = EnsembleTeacher([(local(), 1.0), (local(tiny.llama(3)), 2.0)], ["A", "B"])
    rows = tiny.rows(12, completion=False)
    findings = preflight(make_trainer(teacher=teacher, train=rows[:8], heldout=rows[8:]))
    assert {f.check for f in findings if f.level == "ok"} == set(NAMES)


def test_the_teacher_that_does_not_fit_is_named(make_trainer: Make) -> None:
    rows = in_domains(tiny.rows(8, completion=False))
    eos = make_trainer(teacher=two(b=local(ending(3, [1, 3]))), train=rows)
    assert "teacher 'B' at [1, 3]" in message(eos, "eos-pad") and "'A'" not in message(eos, "eos-pad")
    other = local(tiny.llama(3), tiny.tokenizer("{{ messages[0].content }}"))
    template = message(make_trainer(teacher=two(b=other), train=rows), "chat-template", "notice")
    assert "teacher 'B': the student's template" in template and "'A'" not in template
    damaged = tiny.llama(3)
    damaged.model.norm.weight.data[3] = float("nan")
    assert "the logits of teacher 'B' are NaN" in message(
        make_trainer(teacher=two(b=local(damaged)), train=rows), "head"
    )
    # Far away they are known by fingerprint only, and both can be wrong in the same way.
    swaps = [Elsewhere(local(seed, swapped())) for seed in (None, tiny.llama(3))]
    both = message(make_trainer(teacher=two(*swaps), train=rows), "tokenizers")
    assert "vocabulary of teacher 'A'" in both and "vocabulary of teacher 'B'" in both


def test_only_a_teachers_own_rows_have_to_fit_its_context(make_trainer: Make) -> None:
    """A long row of one domain does not concern the other domain's teacher, which holds less."""
    short = tiny.llama(3)
    short.config.max_position_embeddings = 60
    rows = [Prompt(list(range(4, 104)), "long", "math", 0), Prompt([5, 6, 7], "short", "code", 1)]
    assert levels(make_trainer(teacher=two(b=local(short)), train=rows), "context") == {"ok"}
    crossed = make_trainer(teacher=two(local(short), local()), train=rows)
    assert "need 106 positions, teacher 'A' has 60" in message(crossed, "context")


def test_domains(make_trainer: Make) -> None:
    rows = in_domains(tiny.rows(8, completion=False))
    rows[3]["domain"] = "prose"
    bad = message(make_trainer(teacher=two(), train=rows, heldout=tiny.rows(10, completion=False)[8:]), "domains")
    assert "1 training rows have no teacher; row 3 has domain 'prose', and no teacher takes it" in bad
    assert "2 held-out rows have no teacher; row 0 has no domain" in bad
    assert "data.domain_column" in bad
    assert levels(make_trainer(teacher=two(rest=True), train=rows), "domains") == {"ok"}
    only_code = make_trainer(teacher=two(), train=rows[1:2])
    assert "teacher 'A' has no training row" in message(only_code, "domains", "notice")
    assert levels(make_trainer(), "domains") == {"ok"}


def test_self_sees_a_router_that_mixes_up_rows(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every teacher gets the other one's sequences."""
    rows = in_domains(tiny.rows(8, completion=False))
    trainer = make_trainer(teacher=two(), train=rows)
    monkeypatch.setattr(RoutedTeacher, "route", lambda self, domain: {"math": "B", "code": "A"}[domain])
    assert "teacher 'A': with the teacher as student" in message(trainer, "self")


# ---------------------------------------------------------------- a teacher that is only stored


class Replay(Elsewhere):
    """Answers for the sequences it was shown before, whole and alike, and for no others."""

    live = False

    def __init__(self, teacher: LocalTeacher, rollout: Any) -> None:
        super().__init__(teacher)
        self.known = {self.key(*row) for row in zip(rollout.input_ids, rollout.attention_mask, strict=True)}
        self.generate = self.refuse  # type: ignore[assignment]

    @staticmethod
    def key(ids: Any, real: Any) -> tuple[int, ...]:
        return tuple(ids[real].tolist())

    def refuse(self, *args: Any) -> Any:
        raise UserError("teacher.stored writes nothing")

    def score(self, rollout: Any, top_k: int, chosen: Any = None) -> list[Any]:
        for row in zip(rollout.input_ids, rollout.attention_mask, strict=True):
            if self.key(*row) not in self.known:
                raise UserError("a sequence is not in the store. Fix: teacher.model.")
        return self.inner.score(rollout, top_k)


def replayed(
    tmp_path: Any, stored: int, rows: list[dict[str, Any]], heldout: Any = None, **settings: Any
) -> OPDTrainer:
    """A run whose teacher has stored the first so many training rows, and the held-out rows with a completion."""
    settings = {
        "max_steps": 2,
        "estimator": "top_k",
        "top_k": 8,
        "rollouts": RolloutConfig(max_new_tokens=6),
        **settings,
    }
    args = OPDConfig(output_dir=str(tmp_path / "run"), **settings)
    options: dict[str, Any] = dict(train_dataset=rows, eval_dataset=heldout, processing_class=tiny.tokenizer())
    prompts = OPDTrainer(tiny.llama(1), args, local(), **options)
    known = [*prompts.train_dataset[:stored], *(prompts.eval_dataset or [])]  # type: ignore[index]
    return OPDTrainer(tiny.llama(1), args, Replay(local(), completed(known, 0)), **options)  # type: ignore[arg-type]


def test_a_stored_teacher_passes_without_being_asked_anything_new(tmp_path: Any) -> None:
    rows = tiny.rows(12)
    trainer = replayed(tmp_path, 8, rows[:8], rows[8:], sequences="dataset")
    findings = preflight(trainer)
    assert {f.check for f in findings if f.level == "ok"} == set(NAMES) - {"self"}
    assert "is read from disk" in message(trainer, "self", "notice")
    assert "the teacher is read from disk" in message(trainer, "device", "ok")


def test_a_store_that_lacks_training_rows(tmp_path: Any) -> None:
    trainer = replayed(tmp_path, 5, tiny.rows(8), sequences="dataset")
    said = message(trainer, "stored")
    assert "3 of the first 8 training sequences are not stored" in said and "first: row 5" in said
    assert "teacher.model or teacher.url" in said
    assert "not checked: it needs stored" in " ".join(f.message for f in examine(trainer))


def test_a_stored_teacher_cannot_follow_a_student_that_samples(tmp_path: Any) -> None:
    trainer = replayed(tmp_path, 8, tiny.rows(8))
    assert "only replays what is stored" in message(trainer, "stored")
    assert "objective.sequences dataset" in message(trainer, "stored")


def test_held_out_rows_a_store_cannot_judge_are_not_measured(tmp_path: Any) -> None:
    bare = tiny.rows(12, completion=False)[8:]
    trainer = replayed(tmp_path, 8, tiny.rows(8), bare, sequences="dataset")
    assert "nothing will be measured on held-out rows: they have no completions" in message(trainer, "stored", "notice")
    assert trainer.measure_heldout(trainer.eval_dataset) == {}  # type: ignore[arg-type]
    trainer = replayed(tmp_path, 8, tiny.rows(8), tiny.rows(12)[8:], sequences="dataset")
    trainer.teacher.known = {k for k in trainer.teacher.known if len(k) < 30}  # type: ignore[attr-defined]
    assert trainer.measure_heldout(trainer.eval_dataset) == {}  # type: ignore[arg-type]
    assert "a sequence is not in the store" in trainer.heldout.lacking(trainer.eval_dataset)  # type: ignore[arg-type]
    known = replayed(tmp_path, 8, tiny.rows(8), tiny.rows(12)[8:], sequences="dataset")
    assert set(known.measure_heldout(known.eval_dataset)) == {"dataset"}  # type: ignore[arg-type]


def test_it_works_off_policy(tmp_path: Any) -> None:
    args = OPDConfig(output_dir=str(tmp_path / "run"), max_steps=1)
    trainer = DistillationTrainer(
        tiny.llama(1),
        args,
        tiny.llama(2),
        method=args.build(Only("dataset")),
        train_dataset=tiny.rows(4),
        processing_class=tiny.tokenizer(),
    )
    assert not [f for f in preflight(trainer) if f.level == "fail"]
