"""A chain does each step once, from the first prompt to pairs; what cannot work is said before anything is begun."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmdistill import datagen
from llmdistill.cli import main
from llmdistill.datagen.chain import read_chain, run_chain
from llmdistill.datagen.command import step_parser
from llmdistill.datagen.generate_command import roles_of, shard_of
from llmdistill.datagen.tables import read_rows, write_rows
from llmdistill.errors import UserError
from llmdistill.record.manifest import read_manifest
from tests.datagen.chat_endpoint import PROMPTS, ChatEndpoint, served


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    write_rows(tmp_path / "p.jsonl", PROMPTS)

    def write(url: str = "http://127.0.0.1:9", *steps: Any, **first: Any) -> Path:
        generated = {"from": {"source": str(tmp_path / "p.jsonl")}, "writer": "plain", "roles": {"teacher": url}}
        chain = [{"generate": {**generated, "n": 3, "sampling": {"max_new_tokens": 32}, **first}}, *steps]
        file = tmp_path / "sums.yaml"
        file.write_text(yaml.safe_dump({"folder": str(tmp_path / "out"), "steps": chain}))
        return file

    return write


CHAIN: tuple[Any, ...] = (
    {"verify": {"judge": "math"}},
    {"split": {"heldout": 0.3}},
    "build_pairs",
    {"curate": {"from": "verify", "steps": ["finished", "right"]}},
    {"export": {"from": "build_pairs", "name": "for_trl"}},
)


def test_a_chain_runs_through_and_skips_what_is_finished(
    recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint, out = ChatEndpoint(), tmp_path / "out"
    with served(endpoint) as server:
        file = recipe(server.url, *CHAIN)
        assert main(["data", "run", str(file)]) == 0
        written = {f.name: f.read_bytes() for f in out.glob("*.jsonl")}
        capsys.readouterr()
        (out / "curate.jsonl").unlink()
        assert main(["data", "run", str(file)]) == 0
        assert endpoint.seeds.total() == 3 * len(PROMPTS)
    assert {f.name: f.read_bytes() for f in out.glob("*.jsonl")} == written
    said = capsys.readouterr().out
    assert said.count("finished before") == 5 and "curate: 72 rows read" in said
    names = {"generate", "verify", "split", "build_pairs", "curate", "for_trl"}
    assert {f"{name}.jsonl" for name in names} | {"split.heldout.jsonl", "build_pairs.positives.jsonl"} == set(written)
    manifest = read_manifest(out / "for_trl.jsonl")
    assert manifest is not None
    assert [s["step"] for s in manifest.history()] == ["generate", "verify", "split", "build_pairs", "export"]
    assert manifest.authors()["name:adder"]["name"] == "adder"
    assert all(row["passed"] for row in read_rows(out / "curate.jsonl"))


def test_a_changed_setting_of_a_step_is_refused_and_the_others_stand(recipe: Any, tmp_path: Path) -> None:
    with served(ChatEndpoint()) as server:
        run_chain(recipe(server.url, *CHAIN))
        with pytest.raises(UserError, match=r"split\.jsonl was made with heldout 0\.3, now it is 0\.5"):
            run_chain(recipe(server.url, CHAIN[0], {"split": {"heldout": 0.5}}))


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([{"veryfy": {}}], "step 2: there is no step 'veryfy'. Fix: verify."),
        ([{"verify": {"judje": "math"}}], "step 2: verify takes no 'judje'. Fix: one of judge"),
        ([{"verify": {}}, {"verify": {}}], "step 3: a step before it is named 'verify' too"),
        ([{"verify": {"out": "x.jsonl"}}, {"split": {"out": "x.jsonl"}}], "is written to x.jsonl too"),
        ([{"verify": {}, "split": {}}], "must be NAME: {settings}"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_anything_is_asked(recipe: Any, steps: Any, said: str) -> None:
    with pytest.raises(UserError) as refusal:
        read_chain(recipe("http://127.0.0.1:9", *steps))
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("steps: [", "is no YAML"),
        ("folder: x", "has no list of steps"),
        ("steps: [verify]", "step 1 has nothing to read"),
        ("steps: [verify]\nstep: 1", "the unknown key 'step'"),
        ("steps: [{generate: {from: {sauce: x}}}]", "from has the unknown key 'sauce'"),
    ],
)
def test_a_file_that_is_no_recipe_says_why(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(UserError, match=said):
        read_chain(tmp_path / "r.yaml")


def plainest(src: Any, out: Path, *, times: int, names: list[str] = [], loud: bool = False) -> Any:  # noqa: B006
    """A step of one's own."""


def test_a_steps_settings_are_its_options() -> None:
    parser = step_parser("plainest", plainest, "data")
    words = parser.parse_args(["a", "b", "out", "--times", "3", "--names", '["x"]', "--loud"])
    assert (words.src, words.out, words.times, words.names, words.loud) == (["a", "b"], "out", 3, ["x"], True)
    with pytest.raises(UserError, match="--times"):
        parser.parse_args(["a", "out"])


def test_the_command_writes_traces_of_procedural_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(ChatEndpoint()) as server:
        words = ["generate", "--prompts", "reasoning_gym:basic_arithmetic,chain_sum", "--size", "5", "--judge", "math"]
        words += ["--template", "boxed", "--n", "2", "--teacher", server.url, "--teacher.concurrency", "3"]
        assert main([*words, "--out", str(tmp_path / "t.jsonl"), "--shard", "1/2"]) == 0
    assert "10 rows read, 10 written" in capsys.readouterr().out
    rows = list(read_rows(tmp_path / "t.00001-of-00002.jsonl"))
    assert {row["domain"] for row in rows} == {"reasoning_gym/basic_arithmetic", "reasoning_gym/chain_sum"}
    assert "\\boxed{}" in rows[0]["prompt"][0]["content"] and json.loads(rows[0]["meta"])["reasoning_gym"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--techer", "m"], "does not know --techer; did you mean --teacher"),
        (["--teacher.concurency", "3"], "did you mean --teacher.concurrency"),
        (["--teacher.concurrency", "many"], "--teacher.concurrency is 'many'; it must be int"),
        (["--teacher.engine", "tgi"], "it must be one of auto, vllm"),
        (["--teacher"], "--teacher was given no value"),
    ],
)
def test_what_is_mistyped_of_a_role_is_said(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        roles_of(words)


def test_roles_and_shards_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--teacher", "http://h:1", "--teacher.model", "m", "--critic.model=c", "--critic.trust_remote_code"]
    expected = {"teacher": {"url": "http://h:1", "model": "m"}, "critic": {"model": "c", "trust_remote_code": True}}
    assert roles_of(words) == expected
    assert shard_of("2/8") == (2, 8)
    for name, value in {"ID": "5", "COUNT": "4", "MIN": "3"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert shard_of("auto") == (2, 4)
    with pytest.raises(UserError, match="shard is '8/8'"):
        shard_of("8/8")


def test_every_public_name_stays_a_step_when_its_module_is_imported() -> None:
    """A module named as its step would take the step's place in the package."""
    for name, module in datagen._HOME.items():
        import_module(f"llmdistill.datagen.{module}")
        assert getattr(datagen, name).__name__ == name and name != module
