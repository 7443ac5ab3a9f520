"""Training on several teachers: every row learns from its own, an ensemble is one, and what is logged about them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from llmdistill import DistillationTrainer, Method, OPDConfig, OPDTrainer, RolloutConfig, UserError, cli
from llmdistill.models.generation import HFRollouts
from llmdistill.opd import main
from llmdistill.recipe.command_line import parse
from llmdistill.recipe.config import TeacherConfig
from llmdistill.record.page.page import write_report
from llmdistill.rollouts.choose import make_rollout_engine
from llmdistill.teachers.load import load_teachers
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.mixture import EnsembleTeacher, RoutedTeacher, leaves
from llmdistill.texts.sources import Only
from tests import tiny
from tests.trainer.test_loss import FULL, assert_same_gradients, batch, by_hand, loss_and_gradients

SEQUENCES = [([5, 6, 7, 8], [9, 10, 1]), ([11, 12], [13, 14, 15, 16, 17]), ([20] * 9, [1]), ([30, 31, 32], [33, 34])]
DOMAINS = ("math", "code", "code", "math")


def local(seed: int) -> LocalTeacher:
    return LocalTeacher(tiny.llama(seed), tiny.tokenizer())


def domain_rows(n: int, *, completion: bool = True) -> list[dict[str, Any]]:
    return [{**row, "domain": ("math", "code")[i % 2]} for i, row in enumerate(tiny.rows(n, completion=completion))]


def trainer(tmp_path: Path, teacher: Any, student: Any = None, **settings: Any) -> DistillationTrainer:
    method, engine = settings.pop("method", FULL), settings.pop("rollout_engine", None)
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", **settings}
    settings.setdefault("rollouts", RolloutConfig(max_new_tokens=6))
    return DistillationTrainer(
        student or tiny.llama(1),
        OPDConfig(output_dir=str(tmp_path / "run"), logging_steps=1, **settings),
        teacher,
        method=method,
        train_dataset=domain_rows(16),
        eval_dataset=domain_rows(4),
        processing_class=tiny.tokenizer(),
        rollout_engine=engine,
    )


def two(a: Any = None, b: Any = None) -> RoutedTeacher:
    return RoutedTeacher({"a": (a or local(2), ["math"]), "b": (b or local(3), ["code"])})


# ---------------------------------------------------------------- what is learnt


def test_loss_and_gradients_are_those_of_each_row_with_its_own_teacher(tmp_path: Path) -> None:
    """Position by position against the two teachers, over counted tokens of both together."""
    student = tiny.llama(1)
    t = trainer(tmp_path, two(), student)
    loss, gradients = loss_and_gradients(t, replace(batch(SEQUENCES), domain=DOMAINS))
    student.zero_grad()
    count = sum(len(c) for _, c in SEQUENCES)
    expected = torch.zeros(())
    for domain, seed in (("math", 2), ("code", 3)):
        own = [s for s, d in zip(SEQUENCES, DOMAINS, strict=True) if d == domain]
        mean = by_hand(student, tiny.llama(seed), own)
        expected = expected + mean * sum(len(c) for _, c in own) / count
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients, {n: p.grad for n, p in student.named_parameters()})


@pytest.mark.parametrize("size,steps", [(4, 2), (1, 8)])
def test_routing_does_not_depend_on_the_micro_batch_split(tmp_path: Path, size: int, steps: int) -> None:
    """Micro-batches cut through both teachers' rows; losses and gradient norms stay those of one batch."""
    runs = []
    for shape in ((8, 1), (size, steps)):
        t = trainer(
            tmp_path / str(shape),
            two(),
            per_device_train_batch_size=shape[0],
            gradient_accumulation_steps=shape[1],
            learning_rate=1e-2,
            optim="sgd",
        )
        t.train()
        runs.append([(x["loss"], x["grad_norm"]) for x in t.state.log_history if "loss" in x])
    assert len(runs[0]) == 2 and runs[0] == [pytest.approx(pair, rel=1e-5) for pair in runs[1]]


@pytest.mark.parametrize("estimator", ["full", "top_k", "sampled"])
def test_an_ensemble_trains_with_every_estimator(tmp_path: Path, estimator: Any) -> None:
    """Its loss is that of the averaged distribution; a student equal to all members has none."""
    text = Only("student" if estimator == "sampled" else "dataset")
    method = OPDConfig(
        output_dir=str(tmp_path), estimator=estimator, **({"top_k": 8} if estimator == "top_k" else {})
    ).build(text)
    same = EnsembleTeacher([(local(1), 1.0), (local(1), 2.0)], ["x", "y"])
    loss, _ = loss_and_gradients(trainer(tmp_path, same, method=method), batch(SEQUENCES))
    assert abs(loss) < 1e-5
    other = EnsembleTeacher([(local(2), 1.0), (local(3), 2.0)])
    t = trainer(tmp_path, other, method=method)
    t.train()
    losses = [x["loss"] for x in t.state.log_history if "loss" in x]
    assert len(losses) == 2 and all(abs(x) > 0.05 for x in losses)


# ---------------------------------------------------------------- what is logged, and when weights are pushed


class Wire:
    """A teacher elsewhere that counts 10 bytes for every token it scores."""

    def __init__(self, inner: LocalTeacher) -> None:
        self.inner, self.bytes_received = inner, 0
        self.info, self.generate, self.close = inner.info, inner.generate, inner.close

    def score(self, rollout: Any, top_k: int, chosen: Any = None) -> Any:
        self.bytes_received += 10 * rollout.num_rows
        return self.inner.score(rollout, top_k, chosen)


def test_bytes_per_token_are_of_training_only(tmp_path: Path) -> None:
    """Half of the rows' teachers are elsewhere; what held-out measurement receives does not count."""
    method = OPDConfig(output_dir=str(tmp_path), estimator="top_k", top_k=8).build(Only("dataset"))
    t = trainer(tmp_path, two(Wire(local(2)), Wire(local(3))), method=method)
    t.evaluate()
    t.train()
    logged = [x for x in t.state.log_history if "loss" in x]
    assert [x["teacher/bytes_per_token"] for x in logged] == [10.0, 10.0]
    alone = trainer(tmp_path, local(2), method=method)
    alone.train()
    assert not any("teacher/bytes_per_token" in x for x in alone.state.log_history)


class Pushed(HFRollouts):
    """An engine with weights of its own, as vLLM's are: it samples from those of the last sync."""

    pushes: list[int]

    def sync(self, model: Any, policy_version: int) -> None:
        self.pushes = [*getattr(self, "pushes", []), policy_version]
        super().sync(model, policy_version)


def test_weights_are_pushed_every_so_many_steps(tmp_path: Path) -> None:
    """Steps 0, 3 and 6; the staleness logged is the age of the samples; a measurement wants the newest weights."""
    engine = Pushed(eos_ids=[1], pad_id=0)
    args = OPDConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=7,
        logging_steps=1,
        save_strategy="no",
        per_device_train_batch_size=2,
        rollouts=RolloutConfig(engine="vllm", max_new_tokens=4, push_every=3),
    )
    t = OPDTrainer(
        tiny.llama(1),
        args,
        local(2),
        train_dataset=tiny.rows(16, completion=False),
        eval_dataset=tiny.rows(2, completion=False),
        processing_class=tiny.tokenizer(),
        rollout_engine=engine,
    )
    t.train()
    assert engine.pushes == [0, 3, 6]
    staleness = [x["rollout/staleness"] for x in t.state.log_history if "loss" in x]
    assert staleness == [0, 1, 2, 0, 1, 2, 0]
    t.evaluate()
    assert engine.pushes == [0, 3, 6, 7]


def test_evaluation_between_two_pushes_changes_nothing_that_is_trained_on(tmp_path: Path) -> None:
    """The engine keeps its older weights for the rest of the stretch, and yet the newest are what is measured."""

    class Copied(Pushed):
        def sync(self, model: Any, policy_version: int) -> None:
            super().sync(copy.deepcopy(model), policy_version)

    runs, measured = [], []
    method, rollouts = (
        Method(FULL.terms, {"main": Only("student")}),
        RolloutConfig(engine="vllm", max_new_tokens=6, push_every=3),
    )
    for looks in ("no", "steps"):
        engine = Copied(eos_ids=[1], pad_id=0)
        settings = {"eval_strategy": looks, "max_steps": 6, "learning_rate": 3e-2}
        settings |= {"eval_steps": 1} if looks == "steps" else {}
        t = trainer(tmp_path / looks, local(2), method=method, rollouts=rollouts, rollout_engine=engine, **settings)
        t.train()
        measured = [x["eval_student/reverse_kl"] for x in t.state.log_history if "eval_student/reverse_kl" in x]
        lines = [x for x in t.state.log_history if "loss" in x]
        runs.append(([(x["loss"], x["rollout/staleness"]) for x in lines], weights(t.model)))
    assert runs[0][0] == runs[1][0] and [age for _, age in runs[0][0]] == [0, 1, 2, 0, 1, 2]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())
    assert len(set(measured)) == 6  # of other weights each time
    assert measured[-1] == t.evaluate()["eval_student/reverse_kl"]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_run_that_starts_between_two_pushes_pushes_first(tmp_path: Path) -> None:
    """As a resumed one does; then it is back in the rhythm of the undisturbed one."""
    engine = Pushed(eos_ids=[1], pad_id=0)
    rollouts = RolloutConfig(engine="vllm", max_new_tokens=2, push_every=4)
    method = Method(FULL.terms, {"main": Only("student")})
    t = trainer(tmp_path, local(2), method=method, rollouts=rollouts, rollout_engine=engine)
    for step in (2, 3, 4, 5):
        t.state.global_step = step
        t.draw(t.train_dataset[:2])  # type: ignore[index]
    assert engine.pushes == [2, 4]


def test_the_remote_engine_gets_what_the_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token comes from the environment variable the recipe names, and a variable that is not there is an error."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        "llmdistill.rollouts.remote.RemoteRollouts", lambda url, **options: given.update(options, url=url)
    )
    make: Any = lambda config: make_rollout_engine(  # noqa: E731
        config, tiny.llama(1), None, eos_ids=[1], pad_id=0, longest=9, seed=0
    )
    monkeypatch.setenv("STUDENT_TOKEN", "secret")
    make(
        RolloutConfig(
            engine="remote", url="http://a,http://b", token_env="STUDENT_TOKEN", push_folder="w", batch_tokens=9
        )
    )
    expected = {"url": "http://a,http://b", "token": "secret", "folder": "w", "eos_ids": [1], "pad_id": 0}
    assert given == {**expected, "transfer": "http", "batch_tokens": 9}
    monkeypatch.delenv("LLMDISTILL_TOKEN", raising=False)
    make(RolloutConfig(engine="remote", url="http://a"))
    assert given["token"] is None and given["folder"] is None
    with pytest.raises(UserError, match=r"rollouts\.token_env is 'NOT_SET'.*export NOT_SET"):
        make(RolloutConfig(engine="remote", url="http://a", token_env="NOT_SET"))


# ---------------------------------------------------------------- from a recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Student, three teachers and rows of two domains."""
    made = tmp_path_factory.mktemp("several")
    for name, seed in (("student", 1), ("math", 2), ("code", 3), ("third", 4)):
        tiny.llama(seed).save_pretrained(made / name)
        tiny.tokenizer().save_pretrained(made / name)
    rows = domain_rows(20, completion=False)
    for name, part in (("train", rows[:16]), ("heldout", rows[16:])):
        (made / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    return made


def recipe(folder: Path, tmp_path: Path, teachers: list[dict[str, Any]], **sections: Any) -> list[str]:
    content: dict[str, Any] = {
        "student": {"model": str(folder / "student")},
        "teachers": [{"dtype": "float32", **t, "model": str(folder / t["model"])} for t in teachers],
        "data": {"train": str(folder / "train.jsonl"), "heldout": str(folder / "heldout.jsonl")},
        "rollouts": {"max_new_tokens": 5},
        "train": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_strategy": "no",
        },
        **sections,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return ["--config", str(tmp_path / "recipe.yaml")]


ROUTED = [{"model": "math", "name": "M", "domains": ["math"]}, {"model": "code", "domains": ["code"]}]


def test_the_front_door_with_two_teachers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the recipe to the report, and the recipe in the run folder says the same again."""
    words = recipe(folder, tmp_path, ROUTED)
    assert main(words) == 0
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    after = json.loads((run / "after.json").read_text())
    assert {"student", "teacher", "answers"} <= set(after) and len(after["teacher_answers"]) == 4
    again = parse(OPDConfig, ["--config", str(run / "config.yaml")])
    assert again.listed and [t.name for t in again.teachers] == ["M", ""]
    assert again.resolved()["teachers"] == yaml.safe_load((run / "config.yaml").read_text())["teachers"]
    page = write_report(run).read_text()
    assert f"<bdi>M + {folder / 'code'}</bdi>" in page
    capsys.readouterr()
    assert cli.main(["doctor", *words]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "8 rows for teacher 'M'" in out and "teacher 'M': teacher against itself" in out


def test_a_domain_nobody_has_stops_before_the_first_step(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        main(recipe(folder, tmp_path, [{**ROUTED[0], "domains": ["maths"]}, ROUTED[1]]))
    assert "domains: 8 training rows have no teacher; row 0 has domain 'math', and no teacher takes it" in str(
        error.value
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_composition_follows_domains_and_weights(folder: Path, tmp_path: Path) -> None:
    def built(*teachers: dict[str, Any]) -> Any:
        made = parse(OPDConfig, recipe(folder, tmp_path, list(teachers)))
        return load_teachers(made.teachers, "cpu", 100, made.teacher_sections)

    math, code, third = ({"model": m} for m in ("math", "code", "third"))
    assert isinstance(built(math), LocalTeacher)
    both = built({**math, "weight": 1}, {**code, "weight": 3, "name": "C"})
    assert isinstance(both, EnsembleTeacher) and both.weights == (0.25, 0.75)
    assert list(both.members) == [str(folder / "math"), "C"]
    mixed = built({**math, "domains": ["m"], "weight": 1}, {**code, "domains": ["m"], "weight": 1}, third)
    assert isinstance(mixed, RoutedTeacher) and mixed.default == str(folder / "third")
    (route, rest) = mixed.members.values()
    assert isinstance(route, EnsembleTeacher) and isinstance(rest, LocalTeacher)
    only = built({**math, "domains": ["math"]})
    assert isinstance(only, RoutedTeacher) and only.route("code") is None  # a domain given is a domain checked


def test_a_model_named_twice_is_loaded_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    load = LocalTeacher.load
    monkeypatch.setattr(LocalTeacher, "load", lambda config, device: loads.append(config.model) or load(config, device))
    twice = [
        {"model": "math", "domains": ["a"]},
        {"model": "math", "domains": ["b"]},
        {"model": "math", "dtype": "bfloat16"},
    ]
    made = parse(OPDConfig, recipe(folder, tmp_path, twice))
    teacher = load_teachers(made.teachers, "cpu", 100, made.teacher_sections)
    first, second, other = (t for _, t in leaves(teacher))
    assert first is second and first is not other and len(loads) == 2


def test_what_was_opened_is_closed_when_a_later_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the message names the entry that failed."""
    closed = []
    service = SimpleNamespace(close=lambda: closed.append("service"), info=local(2).info)
    monkeypatch.setattr("llmdistill.teachers.connecting.connect", lambda url, **options: service)
    configs = [TeacherConfig(url="http://one", domains=["a"]), TeacherConfig(model="nowhere/at-all")]
    with pytest.raises(UserError, match=r"^teachers\[1\]\.model 'nowhere/at-all' cannot be loaded"):
        load_teachers(configs, "cpu", 100, ["teachers[0]", "teachers[1]"])
    assert closed == ["service"]
    with pytest.raises(UserError, match=r"^teachers\[1\]\.model is empty.*--teachers\.1\.model PATH"):
        load_teachers([configs[0], TeacherConfig()], "cpu", 100, ["teachers[0]", "teachers[1]"])
    other = SimpleNamespace(
        close=lambda: closed.append("other"), info=lambda: replace(local(2).info(), tokenizer="another")
    )
    services = iter([service, other])
    monkeypatch.setattr("llmdistill.teachers.connecting.connect", lambda url, **options: next(services))
    closed.clear()
    with pytest.raises(UserError, match="different tokenizers"):
        load_teachers([configs[0], TeacherConfig(url="http://two")], "cpu", 100, ["teachers[0]", "teachers[1]"])
    assert sorted(closed) == ["other", "service"]


def test_the_service_gets_what_the_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    service = local(2)

    def connect(url: str, **options: Any) -> Any:
        given.update(options, url=url)
        return service

    monkeypatch.setattr("llmdistill.teachers.connecting.connect", connect)
    monkeypatch.setenv("LLMDISTILL_TOKEN", "secret")
    config = TeacherConfig(url="http://a,http://b", timeout_s=7.0, max_outage_s=9.0, in_flight=3, lossless=True)
    assert load_teachers([config], "cpu", 100, ["teacher"]) is service
    assert given == dict(
        url="http://a,http://b",
        token="secret",
        timeout_s=7.0,
        max_outage_s=9.0,
        in_flight=3,
        lossless=True,
        tokenizer=None,
        hidden="",
        device="cpu",
    )
    with pytest.raises(UserError, match=r"^teachers\[0\]\.token_env is 'NOT_SET'"):
        load_teachers([TeacherConfig(url="http://a", token_env="NOT_SET")], "cpu", 100, ["teachers[0]"])
