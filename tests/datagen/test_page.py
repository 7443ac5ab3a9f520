"""The page data/README.md is true: its commands run as they stand, on a folder of the hub dataset's layout and with an
endpoint in the teacher's place. Training is the front doors' own tests' concern: here its words are read."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pandas
import pytest

from llmdistill.cli import main
from llmdistill.datagen.tables import read_rows, write_rows
from llmdistill.methods.redi_config import REDIConfig
from llmdistill.recipe.command_line import parse
from llmdistill.texts.loading import load_rows
from llmdistill.texts.pairs import pair_encoder
from tests import tiny
from tests.datagen.chat_endpoint import PROMPTS, ChatEndpoint, served
from tests.datagen.test_scripts import DATA, run

PAGE = DATA / "README.md"
MORE = {"subject": "s", "level": "1", "unique_id": "u"}  # what the suite groups by


def commands() -> list[list[str]]:
    """The words of each command of the first block."""
    block = re.search(r"^```\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    assert block is not None
    return [shlex.split(line, comments=True) for line in block[1].replace("\\\n", " ").splitlines() if line.strip()]


def gsm8k(folder: Path) -> str:
    """A copy of a hub dataset: two configurations, the columns question and answer."""
    rows = [{"question": p["prompt"], "answer": f"They add up.\n#### {p['answer']}"} for p in PROMPTS]
    (folder / "main").mkdir(parents=True)
    pandas.DataFrame(rows).to_parquet(folder / "main" / "train-00000-of-00001.parquet")
    files = "data_files: [{split: train, path: main/train-*}]"
    configs = "".join(f"- {{config_name: {name}, {files}}}\n" for name in ("main", "socratic"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return f"{folder}:main"


def test_the_page_takes_a_hub_dataset_to_the_rows_of_a_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").mkdir()
    write_rows(
        tmp_path / "benchmarks" / "math500.jsonl", [{"id": "1", "problem": PROMPTS[0]["prompt"], "answer": "5", **MORE}]
    )
    monkeypatch.setenv("LLMDISTILL_DATA", str(tmp_path))
    with served(ChatEndpoint()) as server:
        stand_ins = {"openai/gsm8k:main": gsm8k(tmp_path / "gsm8k"), "Qwen/Qwen3-8B": server.url, "4096": "64"}
        for words in filter(None, commands()):
            words = [stand_ins.get(word, word) for word in words]
            if words[0] == "llmdistill":
                assert main(words[1:]) == 0, words
            elif words[0] == "python":
                assert run(Path(words[1]).stem, *words[2:]) == 0, words
    assert words[:4] == ["accelerate", "launch", "-m", "llmdistill.redi"]  # the last one
    recipe = parse(REDIConfig, ["--config", str(DATA.parent / words[5]), *words[6:]])
    encoder = pair_encoder(tiny.tokenizer(), recipe.data)
    read = {"data.train": recipe.data.train, "data.heldout": recipe.data.heldout, "positives": recipe.args.positives}
    for setting, file in read.items():  # none is too long for the settings
        rows = load_rows(file, recipe.data, setting)
        assert len(encoder.encode_all(rows, setting, positive=setting == "positives")) == len(list(rows)) > 0
    assert len(list(read_rows("runs/data/traces.jsonl"))) == 4 * len(PROMPTS)
    assert "# Worked answers" in Path("runs/data/README.md").read_text()
