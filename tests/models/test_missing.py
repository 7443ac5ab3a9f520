"""A model that is not there: what is said is about what was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmdistill.errors import UserError
from llmdistill.models.loading import load_model
from llmdistill.models.missing import is_a_path
from tests import tiny


def test_a_folder_that_is_not_there_is_no_name_on_the_hub(tmp_path: Path) -> None:
    for path in (str(tmp_path / "gone"), "./gone", "runs/a/student"):
        with pytest.raises(UserError) as caught:
            load_model(path, "float32", "student")
        where = "" if path.startswith("/") else f" in {Path.cwd()}"
        assert str(caught.value) == f"student.model {path!r} cannot be loaded: there is no such folder{where}."
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_model(str(tmp_path / "empty"), "float32", "student")
    assert "http" not in str(caught.value) and "it has no tokenizer: neither tokenizer.json" in str(caught.value)


def test_a_name_whose_first_half_is_a_folder_here_may_have_been_meant_as_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"there is no such folder in {tmp_path}; taken for a hub name: "):
        load_model("runs/studnt", "float32", "student")


def test_a_damaged_file_is_said_to_be_one(tmp_path: Path) -> None:
    tiny.llama(1).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded: one of its JSON files is damaged"):
        load_model(str(tmp_path), "float32", "student")


@pytest.mark.parametrize(
    ("name", "path"),
    [("gpt2", False), ("Qwen/Qwen3-0.6B", False), ("/gone", True), ("../a", True), ("~/a", True), ("a/b/c", True)],
)
def test_names_of_the_hub_are_told_from_paths(name: str, path: bool) -> None:
    assert is_a_path(name) == path
