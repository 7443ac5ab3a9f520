"""``--resume`` from the command line: what may change, what may not, and what becomes of config.yaml."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmdistill import UserError, opd
from llmdistill.pipeline.resumed import MAY_CHANGE, rows_hash
from llmdistill.recipe.command_line import parse
from tests import tiny


@pytest.fixture(scope="module")
def base(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished run of two steps with its checkpoints, and the words it was started with."""
    folder = tmp_path_factory.mktemp("resumed")
    shutil.copy(tiny_run / "train.jsonl", folder / "train.jsonl")
    for name in ("student", "teacher"):
        shutil.copytree(tiny_run / name, folder / name)
    words = {
        "student.model": folder / "student",
        "teacher.model": folder / "teacher",
        "teacher.dtype": "float32",
        "data.train": folder / "train.jsonl",
        "max_new_tokens": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "output_dir": folder / "run",
    }
    argv = [text for key, value in words.items() for text in (f"--{key}", str(value))]
    assert opd.main(argv) == 0
    return folder, argv


@pytest.fixture
def started(base: tuple[Path, list[str]], tmp_path: Path) -> tuple[Path, list[str]]:
    """A copy of that run, to be resumed; two steps are done, three are asked for."""
    folder, argv = base
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = copy / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(folder), str(copy)))
    return copy, [word.replace(str(folder), str(copy)) for word in argv] + ["--max_steps", "3"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


REFUSED: dict[str, tuple[list[str], str]] = {
    "divergence": (
        ["--divergence", "forward_kl"],
        r"objective\.divergence is 'forward_kl'; .*started with 'reverse_kl'\. Fix: --objective\.divergence reverse_kl",
    ),
    "estimator": (["--estimator", "top_k"], r"objective\.estimator is 'top_k'; .* 'full'\."),
    "seed": (["--seed", "7"], r"train\.seed is 7; the run was started with 42\. Fix: --train\.seed 42"),
    "sampling": (["--rollouts.temperature", "0.5"], r"rollouts\.temperature is 0\.5; .*with 1\.0\."),
    "length": (["--max_new_tokens", "5"], r"rollouts\.max_new_tokens is 5; .* 4\."),
    "batch": (["--per_device_train_batch_size", "4"], r"train\.per_device_train_batch_size is 4; .* 2\."),
    "optimizer": (["--weight_decay", "0.1"], r"train\.weight_decay is 0\.1; .* 0\.0\. Fix: --train\.weight_decay 0\.0"),
    "adapter": (["--lora_r", "4"], r"student\.lora_r is 4; .* 0\."),
    "rows": (["--data.limit", "3"], r"data\.limit is 3; .* 0\."),
    "teacher's dtype": (["--teacher.dtype", "bfloat16"], r"teacher\.dtype is 'bfloat16'; .* 'float32'\."),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_another_run_is_refused_before_anything_is_loaded(
    kind: str, started: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, argv = started
    (change, message), before = REFUSED[kind], files(folder)
    monkeypatch.setattr("llmdistill.pipeline.run.build", lambda *_: pytest.fail("it went on"))
    with pytest.raises(UserError, match=message):
        opd.main([*argv, "--resume", *change])
    assert files(folder) == before


def test_every_difference_has_a_line(started: tuple[Path, list[str]]) -> None:
    folder, argv = started
    with pytest.raises(UserError) as error:
        opd.main([*argv, "--resume", "--seed", "7", "--divergence", "forward_kl", "--learning_rate", "1e-3"])
    first, *lines, last = str(error.value).splitlines()
    assert first == f"--resume goes on with the run in {folder / 'run'}, and this would be another one:"
    assert len(lines) == 2 and all(" Fix: --" in line for line in lines)
    assert last == "Or leave --resume out: a new run begins, and this one is moved aside."


@pytest.mark.parametrize("elsewhere", [True, False])
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_another_model_is_refused(who: str, elsewhere: bool, started: tuple[Path, list[str]]) -> None:
    """Under another path, and in its place: weights are compared, not names."""
    folder, argv = started
    tiny.llama(9).save_pretrained(folder / "another")
    tiny.tokenizer().save_pretrained(folder / "another")
    if not elsewhere:
        shutil.rmtree(folder / who)
        (folder / "another").rename(folder / who)
    before = files(folder / "run")
    change = [f"--{who}.model", str(folder / "another")] if elsewhere else []
    message = rf"{who} is '.*another', whose weights are not what those of '.*{who}' were.*Fix: give '.*{who}'"
    with pytest.raises(UserError, match=message if elsewhere else "whose weights are not what they were at the start"):
        opd.main([*argv, "--resume", *change])
    assert files(folder / "run") == before


@pytest.mark.parametrize("elsewhere", [True, False])
def test_another_dataset_is_refused(elsewhere: bool, started: tuple[Path, list[str]]) -> None:
    folder, argv = started
    rows = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    target = folder / ("other.jsonl" if elsewhere else "train.jsonl")
    target.write_text("".join(rows[::-1]))  # the order counts: it decides what the rest of the epoch is
    before = files(folder / "run")
    change = ["--data.train", str(target)] if elsewhere else []
    message = r"data\.train is '.*other\.jsonl', whose rows are not what those of '.*train\.jsonl' were"
    with pytest.raises(UserError, match=message if elsewhere else "whose rows are not what they were at the start"):
        opd.main([*argv, "--resume", *change])
    assert files(folder / "run") == before


def test_moved_is_not_changed(started: tuple[Path, list[str]]) -> None:
    """The same weights and the same rows at other places, twice the devices' share and half the accumulation."""
    folder, argv = started
    (folder / "teacher").rename(folder / "moved")
    (folder / "train.jsonl").rename(folder / "moved.jsonl")
    moved = ["--teacher.model", str(folder / "moved"), "--data.train", str(folder / "moved.jsonl")]
    moved += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"]
    assert opd.main([*argv, "--resume", *moved]) == 0
    config = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    assert config["teacher"]["model"] == str(folder / "moved") and config["train"]["max_steps"] == 3
    changed = json.loads((folder / "run" / "resumed.jsonl").read_text())["changed"]
    assert set(changed) == {
        *("teacher.model", "data.train", "train.max_steps"),
        *("train.per_device_train_batch_size", "train.gradient_accumulation_steps"),
    }
    assert changed["train.max_steps"] == [2, 3]
    assert json.loads((folder / "run" / "summary.json").read_text())["steps"] == 3


def test_what_may_change_is_recorded_and_the_rest_stays(started: tuple[Path, list[str]]) -> None:
    folder, argv = started
    allowed = [
        "--learning_rate",
        "1e-4",
        "--logging_steps",
        "2",
        "--chunk_tokens",
        "64",
        "--teacher.batch_tokens",
        "99",
    ]
    before = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    assert opd.main([*argv, "--resume", *allowed]) == 0
    after = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    before["train"] |= {"learning_rate": 1e-4, "logging_steps": 2, "max_steps": 3}
    before["objective"]["chunk_tokens"], before["teacher"]["batch_tokens"] = 64, 99
    assert after == before
    changed = json.loads((folder / "run" / "resumed.jsonl").read_text())["changed"]
    assert changed["train.learning_rate"] == [1e-5, 1e-4] and len(changed) == 5


def test_an_unchanged_run_keeps_its_config_to_the_byte(started: tuple[Path, list[str]]) -> None:
    folder, argv = started
    file = folder / "run" / "config.yaml"
    file.write_text(f"# mine\n{file.read_text()}")
    before = file.read_bytes()
    assert opd.main([*argv[:-2], "--resume"]) == 0
    assert file.read_bytes() == before and not (folder / "run" / "resumed.jsonl").exists()


def test_a_setting_that_came_later_is_no_difference_at_its_default(started: tuple[Path, list[str]]) -> None:
    """Runs of earlier versions: config.yaml lacks what is new, and has what is gone."""
    folder, argv = started
    file = folder / "run" / "config.yaml"
    config = yaml.safe_load(file.read_text())
    del config["rollouts"]["top_p"], config["objective"]["support"]
    config["objective"]["gone"] = 3
    file.write_text(yaml.safe_dump(config))
    before = file.read_bytes()
    assert opd.main([*argv[:-2], "--resume"]) == 0
    assert file.read_bytes() == before
    with pytest.raises(UserError, match=r"rollouts\.top_p is 0\.9; the run was started with 1\.0"):
        opd.main([*argv, "--resume", "--rollouts.top_p", "0.9"])


def test_without_inputs_json_names_are_compared(started: tuple[Path, list[str]]) -> None:
    """A run that was begun by an earlier version."""
    folder, argv = started
    (folder / "run" / "inputs.json").unlink()
    shutil.copytree(folder / "teacher", folder / "same")
    with pytest.raises(UserError, match=r"teacher\.model is '.*same'; the run was started with '.*teacher'"):
        opd.main([*argv, "--resume", "--teacher.model", str(folder / "same")])


def test_several_teachers_are_compared_one_by_one(started: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, argv = started
    entry = {"model": str(folder / "teacher"), "dtype": "bfloat16"}
    recipe = tmp_path / "several.yaml"
    words = [w for i, w in enumerate(argv) if not argv[i - i % 2].startswith("--teacher.")]
    for entries, message in (
        ([{**entry, "domains": ["a"]}, {**entry, "name": "rest"}], "has 2 teachers; the run was started with 1"),
        ([entry], r"teacher\.dtype is 'bfloat16'; the run was started with 'float32'"),
    ):
        recipe.write_text(yaml.safe_dump({"teachers": entries}))
        with pytest.raises(UserError, match=message) as error:
            opd.main(["--config", str(recipe), *words, "--resume"])
        assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("content", ["{", ""])
def test_a_config_that_was_damaged_does_not_block_a_run_whose_checkpoint_is_whole(
    content: str, started: tuple[Path, list[str]]
) -> None:
    folder, argv = started
    (folder / "run" / "config.yaml").write_text(content)
    with pytest.warns(UserWarning, match=r"config\.yaml is damaged: it holds no settings"):
        assert opd.main([*argv, "--resume"]) == 0


def test_nothing_to_resume_starts_and_is_recorded(base: tuple[Path, list[str]], tmp_path: Path) -> None:
    _, argv = base
    assert opd.main([*argv, "--output_dir", str(tmp_path / "new"), "--max_steps", "1", "--resume"]) == 0
    inputs = json.loads((tmp_path / "new" / "inputs.json").read_text())
    assert set(inputs) == {"processes", "data.train", "student", "teacher"}


def test_the_names_that_may_change_are_settings() -> None:
    """A typo in the list would refuse what it means to allow."""
    from llmdistill.opd import OPDConfig
    from llmdistill.redi import REDIConfig

    recipes = [parse(OPDConfig, []), parse(REDIConfig, [])]
    missing: Any = object()
    for name in MAY_CHANGE:
        section, key = name.split(".")
        known = [section == "evals" if key == "*" else r.default(section, key, missing) is not missing for r in recipes]
        assert any(known), name


def test_rows_are_equal_by_content_and_order() -> None:
    rows = [{"a": 1, "b": [{"role": "user"}]}, {"a": None, "b": []}]
    assert rows_hash(rows) == rows_hash([dict(reversed(row.items())) for row in rows])
    assert len({rows_hash(rows), rows_hash(rows[::-1]), rows_hash(rows[:1]), rows_hash([])}) == 4
