"""Rounds of a recipe: what a student of one round wrote trains the next one's. Runs are processes, models are tiny."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmdistill.datagen.chain import read_chain, run_chain
from llmdistill.datagen.tables import read_rows, write_rows
from llmdistill.datagen.training import train
from llmdistill.errors import UserError
from llmdistill.record.manifest import read_manifest
from tests import tiny


def has_letter(completion: str, row: dict[str, Any]) -> bool:
    """A judge: about half of what a random model writes."""
    return bool(completion.strip()) and sum(map(ord, completion)) % 2 == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.llama(1).save_pretrained(tmp_path / "start")
    tiny.tokenizer().save_pretrained(tmp_path / "start")
    write_rows(tmp_path / "p.jsonl", [{"prompt": f"Say {i}.", "answer": str(i)} for i in range(6)])
    return tmp_path


def recipe(folder: Path, *, student: str = "$student", **rounds: Any) -> Path:
    role = {"model": "$student", "engine": "hf", "dtype": "float32", "batch_size": 4}
    settings = {
        "student.model": student,
        "objective.method": "sft",
        "objective.stage1_epochs": 1,
        "objective.stage1_batch_size": 4,
        "objective.heldout_sequences": 0,
        "train.use_cpu": True,
        "train.report_to": "none",
    }
    steps = [
        {
            "generate": {
                "from": {"source": str(folder / "p.jsonl")},
                "writer": "plain",
                "roles": {"teacher": role},
                "n": 4,
                "seed": "$round",
                "sampling": {"max_new_tokens": 8, "temperature": 1.0},
            }
        },
        {"verify": {"judge": f"{__name__}:has_letter"}},
        {"curate": {"steps": ["right", {"first": {"k": 2}}]}},
        {"train": {"door": "redi", "settings": settings}},
    ]
    file = folder / "rounds.yaml"
    content = {"times": 2, "start": str(folder / "start"), "steps": steps, **rounds}
    file.write_text(yaml.safe_dump({"folder": str(folder / "out"), "rounds": content}))
    return file


def test_the_steps_of_all_rounds_are_known_before_any_is_done(folder: Path) -> None:
    links = {link.name: link for link in read_chain(recipe(folder))}
    assert list(links)[:4] == [f"round-1/{name}" for name in ("generate", "verify", "curate", "train")]
    assert len(links) == 8 and not (folder / "out").exists()
    models = [links[f"round-{i}/generate"].settings["roles"]["teacher"]["model"] for i in (1, 2)]
    assert models == [str(folder / "start"), str(folder / "out" / "round-1" / "train" / "student")]
    assert [links[f"round-{i}/generate"].settings["seed"] for i in (1, 2)] == [1, 2]
    assert links["round-2/verify"].source == folder / "out" / "round-2" / "generate.jsonl"
    afresh = {link.name: link for link in read_chain(recipe(folder, student="$start"))}
    assert [afresh[f"round-{i}/train"].settings["settings"]["student.model"] for i in (1, 2)] == [
        str(folder / "start")
    ] * 2


def test_steps_before_the_rounds_are_done_once_and_their_student_can_begin(folder: Path) -> None:
    file = recipe(folder)
    content = yaml.safe_load(file.read_text())
    content["steps"] = [{"train": {"from": str(folder / "p.jsonl"), "name": "imitate"}}]
    content["rounds"]["start"] = "$imitate"
    file.write_text(yaml.safe_dump(content))
    links = {link.name: link for link in read_chain(file)}
    assert links["imitate"].out == folder / "out" / "imitate.json" and len(links) == 9
    role = links["round-1/generate"].settings["roles"]["teacher"]
    assert role["model"] == str(folder / "out" / "imitate" / "student")


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        ({"times": 0}, "rounds.times is 0"),
        ({"more": 1}, "rounds has the keys times, start and steps"),
        ({"steps": [{"verify": {"from": "x.jsonl"}}]}, "the rounds train no student"),
        ({"steps": [{"nothing": {}}]}, "round 1, step 1: there is no step 'nothing'"),
    ],
)
def test_rounds_that_cannot_work(folder: Path, rounds: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_chain(recipe(folder, **rounds))


def test_a_step_of_the_rounds_hides_one_before_them(folder: Path) -> None:
    file = recipe(folder)
    content = yaml.safe_load(file.read_text())
    content["steps"] = [
        {"curate": {"from": str(folder / "p.jsonl"), "steps": ["finished"]}},
        {"train": {"name": "imitate"}},
    ]
    file.write_text(yaml.safe_dump(content))
    links = {link.name: link for link in read_chain(file)}
    assert links["imitate"].source == folder / "out" / "curate.jsonl"
    assert links["round-1/train"].source == folder / "out" / "round-1" / "curate.jsonl"


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "recipes" / "data").glob("*.yaml")), ids=lambda f: f.stem
)
def test_every_recipe_can_be_read(file: Path) -> None:
    if "steps" in (content := yaml.safe_load(file.read_text())) or "rounds" in content:
        assert read_chain(file)
    assert f"llmdistill data run recipes/data/{file.name}" in file.read_text() or "student" in content


def test_dollars_of_mathematics_stay(folder: Path) -> None:
    file = recipe(folder)
    file.write_text(file.read_text().replace("plain", "'$x$ costs $5, round ${round} of $rounds'"))
    links = {link.name: link for link in read_chain(file)}
    assert links["round-2/generate"].settings["writer"] == "$x$ costs $5, round 2 of $rounds"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"door": "none"}, "there is no door 'none'"),
        ({"settings": {"data.train": "x"}}, "data.train is the chain's"),
        ({"config": "no/such.yaml"}, "config no/such.yaml is not there"),
    ],
)
def test_training_that_cannot_begin(folder: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        train(folder / "p.jsonl", folder / "t.json", **settings)


def test_a_run_that_failed_says_its_last_line(folder: Path) -> None:
    failing = shlex.join([sys.executable, "-c", "print('first'); print('why'); raise SystemExit(3)"])
    with pytest.raises(UserError, match=r"the run ended with status 3: why \(all of it in"):
        train(folder / "p.jsonl", folder / "t.json", launch=failing)
    assert not (folder / "t.json").exists() and "first\nwhy" in (folder / "t.log").read_text()


@pytest.mark.slow
def test_two_rounds(folder: Path) -> None:
    """Each round's texts are of the student before; run again, nothing is done."""
    made = run_chain(recipe(folder))
    assert [m.step for m in made] == ["generate", "verify", "curate", "train"] * 2
    assert run_chain(recipe(folder)) == made
    out = folder / "out"
    for i in (1, 2):
        curated = read_manifest(out / f"round-{i}" / "curate.jsonl")
        assert curated is not None and 0 < curated.counts["written"] <= 12
        assert all(row["passed"] for row in read_rows(out / f"round-{i}" / "curate.jsonl"))
    first, second = (next(read_rows(out / f"round-{i}" / "generate.jsonl")) for i in (1, 2))
    assert first["fingerprint"] != second["fingerprint"]
