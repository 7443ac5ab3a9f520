"""What people get wrong at the front door across tokenizers, and at ``llmdistill transfer``: one line each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from llmdistill import cli, cross_tokenizer
from llmdistill.recipe.command_line import run_front_door
from tests import tiny
from tests.methods.test_chunks import other_teacher, teacher_tokenizer
from tests.tokenization import vocabularies


def of_no_family() -> Any:
    tok = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<u>": 1}, unk_token="<u>")), unk_token="<u>"
    )
    tok.chat_template = teacher_tokenizer().chat_template
    return tok


def of_words() -> Any:
    tok = vocabularies.wordpiece(["ok", "add"])
    tok.pad_token, tok.chat_template = "[UNK]", teacher_tokenizer().chat_template
    return tok


def without_template() -> Any:
    tok = teacher_tokenizer()
    tok.chat_template = None
    return tok


ROWS = {
    "prompts": [{"prompt": row["prompt"]} for row in tiny.rows(4)],
    "blank": [{**row, "completion": " \n"} for row in tiny.rows(4)],
    "halves": [{**row, "completion": "so \ud83d"} for row in tiny.rows(4)],
    "numbers": [{**row, "completion": 7} for row in tiny.rows(4)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound recipe, and models and rows that are not."""
    made = tmp_path_factory.mktemp("door")
    for name, model, tok in (
        ("student", tiny.llama(1), tiny.tokenizer()),
        ("teacher", other_teacher().model, teacher_tokenizer()),
        ("untemplated", other_teacher().model, without_template()),
        ("unfamiliar", tiny.llama(2, vocab=4), of_no_family()),
        ("words", tiny.llama(2, vocab=len(of_words())), of_words()),
        ("damaged", other_teacher().model, teacher_tokenizer()),
    ):
        model.save_pretrained(made / name)
        tok.save_pretrained(made / name)
    (made / "damaged" / "tokenizer.json").write_text("{")
    other_teacher().model.save_pretrained(made / "silent")
    (made / "empty").mkdir()
    for name, rows in {"train": tiny.rows(8), **ROWS}.items():
        (made / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "student": {"model": str(made / "student"), "dtype": "float32"},
        "teacher": {"model": str(made / "teacher"), "dtype": "float32"},
        "data": {"train": str(made / "train.jsonl")},
        "train": {"max_steps": 1, "save_strategy": "no", "per_device_train_batch_size": 4},
    }
    (made / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return made


REFUSED: list[tuple[list[str], str]] = [
    # the teacher
    (["--teacher.model", "{}/nowhere"], "teacher.model '{}/nowhere' cannot be loaded: there is no such folder."),
    (["--teacher.model", "{}/empty"], "teacher.model '{}/empty' cannot be loaded: it has no tokenizer: neither"),
    (["--teacher.model", "{}/silent"], "teacher.model '{}/silent' cannot be loaded: it has no tokenizer: neither"),
    (
        ["--teacher.model", "{}/damaged"],
        "teacher.model '{}/damaged' cannot be loaded: one of its JSON files is damaged",
    ),
    (["--teacher.model", "{}/untemplated"], "row 0: teacher's tokenizer has no chat template, and the prompts are"),
    (["--teacher.model", "{}/unfamiliar"], "is neither byte-level BPE, SentencePiece, WordPiece nor bytes"),
    (["--teacher.model", "{}/words"], "the teacher's tokenizer has no token for what comes after"),
    (["--teacher.model="], "teacher.model"),
    (
        ["--teacher.tokenizer", "{}/nowhere"],
        "teacher.tokenizer '{}/nowhere' cannot be loaded: there is no such",
    ),
    (["--teacher.stored", "{}/nothing", "--teacher.model="], "{}/nothing"),
    (["--teacher.stored", "{}/empty", "--teacher.model="], "{}/empty"),
    (["--teacher.url", "no address", "--teacher.model="], "teacher.url"),
    (["--teacher.view", "classes"], "teacher.view is classes, and no term compares tokens with teacher"),
    (["--teacher.view", "bytes"], "teacher.view: invalid choice: 'bytes'"),
    (["--min_aligned", "1.5"], "teacher.min_aligned is 1.5; it must be in [0, 1]"),
    (["--min_aligned", "-1"], "teacher.min_aligned is -1.0; it must be in [0, 1]"),
    (["--min_aligned", "nan"], "teacher.min_aligned is nan; it must be in [0, 1]"),
    (["--min_aligned", "much"], "teacher.min_aligned: invalid float value: 'much'"),
    # the method
    (["--method", "gkd"], "objective.method is 'gkd', and there is no module"),
    (["--method", "tip"], "objective.method is 'tip', which compares tokens that student and teacher share"),
    (["--chunk_temperature", "0"], "objective.chunk_temperature is 0.0; it must be > 0"),
    (["--merge_threshold", "1"], "objective.merge_threshold is 1.0; it must be >= 0 and < 1"),
    (["--divergence", "kl"], "objective.divergence: invalid choice: 'kl'"),
    (["--debias", "maybe"], "objective.debias: Truthy value expected"),
    (["--hidden_weight", "1", "--hidden_layers", "[9]"], "names layer 9, and LlamaForCausalLM has 2"),
    (["--hidden_weight", "1", "--hidden_layers", "[]"], "objective.hidden_weight is 1 and hidden_layers empty"),
    (["--ce_weight", "-1"], "objective.ce_weight is -1.0; it must be >= 0"),
    (["--balance", "gradients"], "objective.balance is gradients, and there is one term"),
    (["--sequences", "teacher"], "objective.sequences: invalid choice: 'teacher'"),
    (["--method", "chunk_opd", "--rollouts.temperature", "0.5"], "rollouts.temperature is 0.5"),
    (["--method", "p_kl", "--direction", "sideways"], "objective.direction: invalid choice: 'sideways'"),
    # the rows
    (["--data.train", "{}/prompts.jsonl"], "row 0: completion is empty"),
    (["--data.train", "{}/blank.jsonl"], "row 0: completion is empty"),
    (["--data.train", "{}/halves.jsonl"], "row 0: completion holds '\\ud83d', half of a character"),
    (["--data.train", "{}/numbers.jsonl"], "row 0: completion is '7', a int; it must be text or messages"),
]


@pytest.mark.parametrize(("words", "line"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_it_is_refused_in_a_line(words: list[str], line: str, folder: Path, tmp_path: Path, capsys: Any) -> None:
    given = ["--config", str(folder / "recipe.yaml"), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        run_front_door(cross_tokenizer.main, [*given, *(word.replace("{}", str(folder)) for word in words)])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in err, err
    said = err.rpartition("error: ")[2]
    assert line.replace("{}", str(folder)) in said, said
    assert all(more.startswith("  ") for more in said.rstrip().splitlines()[1:])  # of failed checks, one each
    assert not (tmp_path / "run" / "student").exists()


TRANSFERS: list[tuple[dict[str, str], str]] = [
    ({"model": "nowhere"}, "--model '{}/nowhere' cannot be loaded: there is no such folder."),
    ({"tokenizer": "nowhere"}, "--tokenizer '{}/nowhere' cannot be loaded: there is no such folder."),
    ({"tokenizer": "empty"}, "--tokenizer '{}/empty' cannot be loaded: it has no tokenizer"),
    ({"tokenizer": "damaged"}, "--tokenizer '{}/damaged' cannot be loaded: one of its JSON files is damaged"),
    ({"tokenizer": "unfamiliar"}, "is neither byte-level BPE, SentencePiece, WordPiece nor bytes"),
    ({"tokenizer": "student"}, "--tokenizer '{}/student' is the tokenizer that --model has"),
    ({"out": "student"}, "--out {}/student"),
    ({"out": "train.jsonl"}, "--out {}/train.jsonl"),
]


@pytest.mark.parametrize(("changed", "line"), TRANSFERS)
def test_a_transfer_is_refused_in_a_line(changed: dict[str, str], line: str, folder: Path, capsys: Any) -> None:
    words = {"model": "student", "tokenizer": "teacher", "out": "made", **changed}
    given = [part for name, value in words.items() for part in (f"--{name}", str(folder / value))]
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert cli.main(["transfer", *given]) == 2
    err = capsys.readouterr().err
    assert line.replace("{}", str(folder)) in err and "Traceback" not in err, err
    assert len(err.rpartition("error: ")[2].strip().splitlines()) == 1
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
