"""Rows encoded into Arrow are the prompts and pairs that they are as Python objects, now and at the next start."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from llmdistill.errors import UserError
from llmdistill.recipe.data_config import DataConfig
from llmdistill.texts import encoded_rows
from llmdistill.texts.encoded import Encoded
from llmdistill.texts.facts import facts_of
from llmdistill.texts.findings import taken
from llmdistill.texts.loading import Rows, load_rows
from llmdistill.texts.pairs import PairEncoder, pair_encoder
from llmdistill.texts.prompts import PromptEncoder
from tests import tiny

LONG = "x" * 300
TALK = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "6"},
]
MARKED = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROWS: list[dict[str, Any]] = [
    {"prompt": f"{i}+1=", "completion": str(i + 1) * i + "!", "domain": ("math", None)[i % 2], "answer": str(i)}
    for i in range(9)
]
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "plain": (ROWS, {}),
    "conversations": ([{"prompt": TALK}, {"prompt": TALK[:2]}], {"assistant_turns": "all"}),
    "weights of rows": ([{**row, "w": i / 2} for i, row in enumerate(ROWS)], {"weight_column": "w"}),
    "weights of tokens": ([{**r, "w": [0.1] * len(r["completion"])} for r in ROWS], {"weight_column": "w"}),
    "contexts": (
        [{**row, "hint": None if i % 3 else f"it is {i}"} for i, row in enumerate(ROWS)],
        {"contexts": {"told": "hint", "later": "tests.texts.test_encoded_rows:later"}},
    ),
    "too long": ([*ROWS[:4], {**ROWS[0], "prompt": LONG}, *ROWS], {"overlong": "drop", "max_prompt_tokens": 99}),
    "shortened": ([{**ROWS[0], "prompt": LONG}], {"overlong": "truncate_prompt", "max_prompt_tokens": 99}),
    "cut": (ROWS, {"max_answer_tokens": 3}),
    "unreadable": ([*ROWS, {**ROWS[0], "prompt": ""}], {"bad_rows": "skip"}),
    "documents": ([{"doc": "a b c d e f g"}, {"doc": "h"}], {"text_column": "doc", "max_text_tokens": 4}),
    "other names": ([{"question": row["prompt"], "response": row["completion"]} for row in ROWS], {}),
}


def later(*_: Any) -> None:
    """A context that is built from what was sampled."""


def file_of(folder: Path, rows: list[dict[str, Any]]) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def encoder(settings: Mapping[str, Any], template: str = tiny.TEMPLATE) -> PromptEncoder:
    other = tiny.tokenizer("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    return PromptEncoder(tiny.tokenizer(template), DataConfig(**settings), {"foreign": other})


def in_table(file: str, made: PromptEncoder) -> Encoded:
    found = made.encode_all(load_rows(file, made.config, "data.train"), completions=True)
    assert isinstance(found, Encoded)
    return found


def same_facts(found: Any, examples: list[Any]) -> None:
    of_table, of_objects = facts_of(found), facts_of(examples)
    for field in fields(of_table):
        ours, theirs = getattr(of_table, field.name), getattr(of_objects, field.name)
        if isinstance(ours, np.ndarray):
            assert ours.tolist() == theirs.tolist(), field.name
    assert of_table.names == of_objects.names


@pytest.mark.parametrize("case", CASES)
def test_prompts_and_findings_are_those_of_python_objects_at_every_start(tmp_path: Path, case: str) -> None:
    rows, settings = CASES[case]
    template = MARKED if case == "conversations" else tiny.TEMPLATE
    file, plain = file_of(tmp_path, rows), encoder(settings, template)
    expected = list(plain.encode_all(list(load_rows(file, plain.config, "data.train")), completions=True))
    told = taken(plain)
    for _ in range(2):  # the second time from the cache
        made = encoder(settings, template)
        found = in_table(file, made)
        assert list(found) == expected and len(found) == len(expected)
        assert [found[i] for i in range(len(found))] == expected and found[-1] == expected[-1]
        assert found[1:3] == expected[1:3] and found[5:5] == []
        same_facts(found, expected)
        seen = taken(made)
        seen.bad = {row: why.split(" (Row")[0] for row, why in seen.bad.items()}  # with its place in the file
        assert seen == told
    token = expected[0].ids[0]
    assert found.rows_with(token) == [p.row for p in expected if token in {*p.ids, *p.completion}]


class Unwilling(PromptEncoder):
    """Encodes nothing."""

    def kept(self, row: Any, index: int, *_: Any, **__: Any) -> list[Any]:
        raise AssertionError("a row is encoded")


def test_a_second_start_encodes_nothing_and_anything_that_matters_does(tmp_path: Path) -> None:
    file, tokenizer = file_of(tmp_path, ROWS), tiny.tokenizer()
    first = in_table(file, PromptEncoder(tokenizer, DataConfig()))
    again = in_table(file, Unwilling(tiny.tokenizer(), DataConfig(train="elsewhere.jsonl")))
    assert list(again) == list(first)
    other_tokens = tiny.tokenizer()
    other_tokens.add_tokens(["+1"])
    others = [
        Unwilling(tiny.tokenizer(tiny.TEMPLATE + " "), DataConfig()),
        Unwilling(other_tokens, DataConfig()),
        Unwilling(tiny.tokenizer(), DataConfig(max_prompt_tokens=50)),
        Unwilling(tiny.tokenizer(), DataConfig(limit=3)),
        Unwilling(tiny.tokenizer(), DataConfig(), {"foreign": other_tokens}),
    ]
    for changed in others:
        with pytest.raises(AssertionError, match="a row is encoded"):
            in_table(file, changed)
    with pytest.raises(AssertionError, match="a row is encoded"):
        rows = load_rows(file, DataConfig(), "data.train")
        Unwilling(tiny.tokenizer(), DataConfig()).encode_all(rows, completions=False)
    file_of(tmp_path, [*ROWS, ROWS[0]])
    with pytest.raises(AssertionError, match="a row is encoded"):
        in_table(file, Unwilling(tiny.tokenizer(), DataConfig()))


def test_a_damaged_cache_is_made_anew(tmp_path: Path) -> None:
    file = file_of(tmp_path, ROWS)
    first = in_table(file, encoder({}))
    (cache,) = {entry["filename"] for entry in first.data.cache_files}
    assert Path(cache).name.startswith("cache-")
    expected = list(first)
    Path(cache).write_bytes(b"no Arrow")
    assert list(in_table(file, encoder({}))) == expected


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs a folder that not even root can write")
def test_where_no_cache_can_be_written_rows_are_encoded_in_memory(tmp_path: Path, caplog: Any) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    with next((tmp_path / "saved").glob("*.arrow")).open("rb") as file:
        rows = Dataset.from_file(f"/proc/self/fd/{file.fileno()}")
        with caplog.at_level(logging.WARNING):
            found = encoder({}).encode_all(rows, completions=True)
    assert [p.text for p in found] == [row["prompt"] for row in ROWS]
    (line,) = [r.getMessage() for r in caplog.records if "cannot be written" in r.getMessage()]
    assert line.startswith("/proc/self/fd cannot be written (") and line.endswith("at every start, in memory")


@pytest.mark.parametrize("table", [False, True])
def test_parts_of_which_no_row_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: bool) -> None:
    """Also a long list, which becomes a table in memory."""
    monkeypatch.setattr(encoded_rows, "PART", 3)
    monkeypatch.setattr(encoded_rows, "OBJECTS", 2)
    monkeypatch.setattr(encoded_rows, "SHORT", 5)
    rows = [{**row, "prompt": LONG} if 3 <= i < 6 or i == 8 else row for i, row in enumerate(ROWS)]
    made = encoder({"overlong": "drop", "max_prompt_tokens": 99})
    found: Any = made.encode_all(Dataset.from_list(rows) if table else rows, completions=True)
    assert isinstance(found, Encoded) and made.dropped == 4
    assert [p.row for p in found] == [found[i].row for i in range(5)] == [0, 1, 2, 6, 7]
    same_facts(found, list(found))
    token = found[4].ids[0]
    assert found.rows_with(token) == [p.row for p in found if token in {*p.ids, *p.completion}]
    assert [p.row for p in pickle.loads(pickle.dumps(found))] == [0, 1, 2, 6, 7]  # for the loader's processes


def test_nothing_left_and_no_rows(tmp_path: Path) -> None:
    made = encoder({"overlong": "drop", "max_prompt_tokens": 2})
    with pytest.raises(UserError, match="no prompt is left: 9 are longer than data.max_prompt_tokens"):
        made.encode_all(load_rows(file_of(tmp_path, ROWS), made.config, "data.train"))
    with pytest.raises(UserError, match="there are no rows"):
        encoder({}).encode_all(Dataset.from_dict({"prompt": []}))


def test_pairs(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+1=", "chosen": str(i + 1) * 4, "rejected": str(i) * 9} for i in range(5)]
    rows += [{"prompt": "5+1=", "chosen": "6", "rejected": "6"}, {"prompt": "", "chosen": "6", "rejected": "5"}]
    file, data = file_of(tmp_path, rows), DataConfig(bad_rows="skip")

    def pairs() -> PairEncoder:
        return pair_encoder(tiny.tokenizer(), data, max_completion_tokens=7, bad_pairs="skip")

    plain = pairs()
    expected = list(plain.encode_all(list(load_rows(file, data, "data.train")), "data.train"))
    for _ in range(2):
        made = pairs()
        found: Any = made.encode_all(load_rows(file, data, "data.train"), "data.train")
        assert isinstance(found, Encoded) and list(found) == expected and len(expected) == 5
        assert made.skipped == plain.skipped == {"identical": 1, "unreadable": 1}
        assert found.numbers("cut").tolist() == [pair.cut for pair in expected]


def test_rows_of_a_folder_keep_what_names_them(tmp_path: Path) -> None:
    """A row that cannot be read is named as before, through datasets' own reading of parts."""
    file = file_of(tmp_path, [*ROWS, {**ROWS[0], "prompt": ""}])
    made = encoder({})
    rows = load_rows(file, made.config, "data.train")
    assert isinstance(rows, Rows)
    with pytest.raises(UserError, match=r"row 9: prompt is empty.*rows.jsonl, line 10"):
        made.encode_all(rows, completions=True)
    assert not made.bad and os.path.exists(file)


PROGRAM = """
import os, sys
import torch
from llmdistill.errors import UserError
from llmdistill.recipe.data_config import DataConfig
from llmdistill.texts.loading import load_rows
from llmdistill.texts.prompts import PromptEncoder
from tests import tiny

rank, folder = int(sys.argv[1]), sys.argv[2]
os.environ["LOCAL_RANK"] = str(rank)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)

class Counting(PromptEncoder):
    rows = 0

    def kept(self, *args, **kwargs):
        self.rows += 1
        return super().kept(*args, **kwargs)

for name in ("good", "bad"):
    made = Counting(tiny.tokenizer(), DataConfig())
    try:
        found = made.encode_all(load_rows(f"{folder}/{name}.jsonl", made.config, "data.train"), completions=True)
        print(made.rows, len(found), found[3].row, made.chats)
    except UserError as error:
        print(made.rows, error)
"""


@pytest.mark.slow
def test_the_first_process_of_a_node_encodes_and_its_error_is_everybodys(tmp_path: Path) -> None:
    talks = [{"prompt": [{"role": "user", "content": row["prompt"]}], "completion": row["completion"]} for row in ROWS]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "", "completion": "x"}) + "\n")
    words = [sys.executable, "-c", PROGRAM]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parents[2])}
    ranks = [
        subprocess.Popen([*words, str(rank), str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    first, second = (rank.communicate(timeout=300)[0].splitlines() for rank in ranks)
    assert first[0] == "9 9 3 9" and second[0] == "0 9 3 9"
    assert first[1].startswith("1 row 0: prompt is empty") and second[1] == first[1].replace("1 ", "0 ", 1)
