"""The scripts in data/ whose options are not those of the step: what is said there reaches it."""

import importlib.util
import json
from pathlib import Path

import pytest

from llmdistill.datagen.tables import read_rows, write_rows
from llmdistill.record.manifest import read_manifest

DATA = Path(__file__).parents[2] / "data"
QUESTION = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def run(name, *words):
    spec = importlib.util.spec_from_file_location(f"script_{name}", DATA / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(word) for word in words])


def test_curate_decontaminate_card(tmp_path, capsys):
    source, curated, clean, page = (
        tmp_path / name for name in ("in.jsonl", "curated.jsonl", "clean.jsonl", "README.md")
    )
    rows = [{"prompt": "a", "completion": c, "tokens": n} for c, n in (("x", 2), ("x", 2), ("y", 90), (QUESTION, 14))]
    write_rows(source, rows)
    write_rows(tmp_path / "own.jsonl", [{"id": "p", "question": QUESTION}])
    assert run("curate", source, curated, "--rule", "exact_duplicates", "--rule", "tokens: {most: 50}") == 0
    assert list(read_rows(curated)) == [rows[0], rows[3]]
    assert run("decontaminate", curated, clean, "--suite", tmp_path / "own.jsonl", "--column", "completion") == 0
    assert list(read_rows(clean)) == [rows[0]]
    assert (
        run("card", clean, page, "--title", "true", "--licence", "mit", "--language", "de", "--source", "own=cc0") == 0
    )
    said = read_manifest(page).settings
    assert (said["title"], said["language"], said["sources"]) == ("true", ["de"], {"own": "cc0"})
    assert "curate: 4 rows read, 2 written" in capsys.readouterr().out


def test_what_is_wrong_is_one_line(tmp_path, capsys):
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a", "completion": "b"}])
    assert run("curate", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--rule", "nope") == 2
    assert capsys.readouterr().err.startswith("error: there is no rule 'nope'")
    with pytest.raises(SystemExit):
        run("card", tmp_path / "in.jsonl", tmp_path / "R.md", "--title", "t", "--licence", "mit", "--source", "nothing")
    assert json.loads((tmp_path / "in.jsonl").read_text())
