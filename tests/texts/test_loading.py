"""Rows as people have them: kinds of files, folders, configurations; columns under other names; rows that are none."""

from __future__ import annotations

import gzip
import json
import lzma
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from llmdistill.errors import UserError
from llmdistill.recipe.data_config import DataConfig
from llmdistill.texts.columns import Columns
from llmdistill.texts.loading import RowStream, load_rows
from llmdistill.texts.pairs import pair_encoder
from llmdistill.texts.prompts import PromptEncoder
from tests import tiny

ROWS = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(6)]


def lines(rows: list[Any]) -> str:
    return "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)


def read(source: Any, **settings: Any) -> list[Any]:
    rows = load_rows(source, DataConfig(**settings), "data.train")
    return [{k: row[k] for k in ("prompt", "completion")} for row in rows]


def encoder(**settings: Any) -> PromptEncoder:
    return PromptEncoder(tiny.tokenizer(), DataConfig(**settings))


@pytest.mark.parametrize("streaming", [False, True])
def test_kinds_of_files_and_folders(tmp_path: Path, streaming: bool) -> None:
    """All hold the same rows; a stream that is not shuffled gives them in the same order."""
    table = Dataset.from_list(ROWS)
    made: dict[str, Any] = {}
    for name, opener in (("a.jsonl", open), ("b.jsonl.gz", gzip.open), ("c.jsonl.xz", lzma.open)):
        with opener(tmp_path / name, "wt") as file:
            file.write(lines(ROWS))
        made[name] = tmp_path / name
    (tmp_path / "list.json").write_text(json.dumps(ROWS))
    made["list"] = tmp_path / "list.json"
    table.to_csv(tmp_path / "d.csv")
    made["csv"] = tmp_path / "d.csv"
    table.save_to_disk(tmp_path / "saved")
    made["save_to_disk"] = tmp_path / "saved"
    DatasetDict({"test": table.select([0]), "train": table}).save_to_disk(tmp_path / "splits")
    made["splits"] = tmp_path / "splits"
    for i in range(2):
        table.select(range(3 * i, 3 * i + 3)).to_parquet(tmp_path / f"shard-{i}.parquet")
    made["glob"] = tmp_path / "shard-*.parquet"
    made["several"] = [str(tmp_path / f"shard-{i}.parquet") for i in range(2)]
    for source in made.values():
        given = source if isinstance(source, list) else str(source)
        found = load_rows(given, DataConfig(streaming=streaming, shuffle_buffer=0), "data.train")
        assert [(str(r["prompt"]), str(r["completion"])) for r in found] == [tuple(r.values()) for r in ROWS], source
        assert isinstance(found, RowStream) == streaming
    assert len(read(str(made["list"]), limit=2, streaming=streaming)) == 2


def test_configurations_and_splits_of_a_dataset_are_named(tmp_path: Path) -> None:
    """As gsm8k's card declares them: without a name the ones that there are are told, with the setting."""
    for name in ("main", "socratic"):
        (tmp_path / f"{name}.jsonl").write_text(lines([{"prompt": name, "completion": ""}]))
    card = [
        f"  - config_name: {n}\n    data_files:\n      - split: test\n        path: {n}.jsonl\n"
        for n in ("main", "socratic")
    ]
    (tmp_path / "README.md").write_text("---\nconfigs:\n" + "".join(card) + "---\n")
    with pytest.raises(UserError, match=r"main.*socratic.*Fix: --data.subset NAME") as error:
        read(str(tmp_path), split="test")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"test.*Fix: --data.split NAME"):
        read(str(tmp_path), subset="main")
    assert read(str(tmp_path), subset="socratic", split="test")[0]["prompt"] == "socratic"


def test_mistakes_in_a_source_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    (tmp_path / "b.csv").write_text("prompt\nx\n")
    (tmp_path / "c.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict(a=Dataset.from_list(ROWS), b=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "two")
    cases = {
        "matches no file": str(tmp_path / "*.none"),
        "several kinds": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.csv")],
        r"has the splits a, b, not 'train'. Fix: --data.split a": str(tmp_path / "two"),
    }
    try:
        import zstandard  # noqa: F401
    except ImportError:
        cases["compressed with zstandard. Fix: pip install zstandard"] = str(tmp_path / "c.jsonl.zst")
    for line, source in cases.items():
        with pytest.raises(UserError, match=line) as error:
            read(source)
        assert "\n" not in str(error.value)
    assert len(read(str(tmp_path / "one"), split="validation")) == 6  # it has no splits


def test_a_list_and_a_mapping_come_from_a_recipe_or_the_command_line() -> None:
    assert DataConfig(train=["a", "b"]).train == ["a", "b"]  # type: ignore[arg-type]
    assert DataConfig(train="[a, b]").train == ["a", "b"]
    assert DataConfig(heldout="{math: a, code: [b, c]}").heldout == {"math": "a", "code": ["b", "c"]}
    with pytest.raises(UserError, match="data.train is .*; it must be files or a dataset"):
        DataConfig(train="{a: b}")


class TestUnreadable:
    rows = [
        ROWS[0],
        "\n",
        "{half\n",
        "5\n",
        ROWS[1],
        {"prompt": 7, "completion": "x"},
        {"prompt": "", "completion": ""},
    ]

    @pytest.fixture
    def file(self, tmp_path: Path) -> str:
        (tmp_path / "rows.jsonl").write_text(lines(self.rows))
        return str(tmp_path / "rows.jsonl")

    def test_a_line_that_is_no_row_is_named_with_the_reason(self, file: str) -> None:
        with pytest.raises(
            UserError, match=r"rows.jsonl, line 3 cannot be read: it is no JSON: .* --data.bad_rows skip"
        ):
            read(file)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_skipped_rows_are_counted_by_kind_of_trouble(self, file: str, streaming: bool) -> None:
        made = encoder(bad_rows="skip", streaming=streaming, shuffle_buffer=0)
        found = made.encode_all(load_rows(file, made.config, "data.train"))
        assert [p.text for p in found] == ["0+1=", "1+1="] and [p.row for p in found] == [0, 3]
        assert sorted(made.bad) == [1, 2, 4, 5]
        assert "row 2: it is '5', a int" in made.bad[2] and "line 4.)" in made.bad[2]
        assert "row 4: prompt is '7', a int" in made.bad[4] and "line 6.)" in made.bad[4]
        assert made.left_out()[0].startswith("4 rows cannot be read and are left out: 1, 2, 4, 5; the first: row 1: ")

    def test_a_row_of_a_sound_file_is_named_by_its_line(self, tmp_path: Path) -> None:
        files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"]
        files[0].write_text(lines(ROWS[:2]))
        with gzip.open(files[1], "wt") as file:
            file.write(lines([ROWS[2], "\n", {"prompt": "", "completion": ""}]))
        made = encoder()
        with pytest.raises(UserError, match=r"row 3: prompt is empty.*b.jsonl.gz, line 3"):
            made.encode_all(load_rows([str(f) for f in files], made.config, "data.train"))

    def test_pairs(self, tmp_path: Path) -> None:
        (tmp_path / "p.jsonl").write_text(
            lines(
                [{"prompt": "a", "chosen": "b", "rejected": "c"}, "{\n", {"prompt": "", "chosen": "b", "rejected": "c"}]
            )
        )
        data = DataConfig(bad_rows="skip")
        made = pair_encoder(tiny.tokenizer(), data)
        assert len(made.encode_all(load_rows(str(tmp_path / "p.jsonl"), data, "data.train"), "data.train")) == 1
        assert made.skipped == {"unreadable": 2}

    def test_none_that_can_be_read(self) -> None:
        with pytest.raises(UserError, match="no prompt is left: .*2 cannot be read; the first: row 0: prompt is empty"):
            encoder(bad_rows="skip").encode_all([{"prompt": ""}, {"prompt": 5}])


class TestColumns:
    """Rows of TRL, verl, slime, ShareGPT, Alpaca."""

    @pytest.mark.parametrize(
        ("row", "text", "answer", "domain"),
        [
            ({"question": "q", "answer": "4"}, "q", "4", None),
            ({"problem": "q", "solution": "s"}, "q", "s", None),
            ({"input": "q", "teacher_id": "m", "data_source": "d"}, "q", "", "m"),
            ({"instruction": "q", "input": "", "output": "s"}, "q", "", None),
            ({"instruction": "q", "input": "i"}, "q\n\ni", "", None),
            ({"prompt": "q", "question": "other", "ground_truth": 4, "domain": "d"}, "q", "4", "d"),
            (
                {
                    "data_source": "gsm8k",
                    "prompt": [{"role": "user", "content": "q"}],
                    "reward_model": {"style": "rule", "ground_truth": "4"},
                    "extra_info": {"index": 0, "answer": "long"},
                },
                "<user>q<assistant>", "4", "gsm8k",
            ),
            ({"conversations": [{"from": "human", "value": "q"}]}, "<user>q<assistant>", "", None),
            (
                {"messages": [{"role": "user", "content": "q"}], "extra_info": {"answer": 4}},
                "<user>q<assistant>", "4", None,
            ),
        ],
    )  # fmt: skip
    def test_what_is_read(self, row: dict[str, Any], text: str, answer: str, domain: str | None) -> None:
        (found,) = encoder().encode_all([row])
        assert (found.text, found.answer, found.domain) == (text, answer, domain)

    def test_paths_and_what_is_told(self) -> None:
        made = encoder(prompt_column="extra.q", answer_column="extra.a")
        (found,) = made.encode_all([{"extra": {"q": "x", "a": 3}}])
        assert (found.text, found.answer) == ("x", "3")
        told = encoder()
        told.encode_all([{"question": "x", "response": "y", "data_source": "d"}], completions=True)
        assert told.columns.read_as == {
            "prompt_column": "question", "completion_column": "response", "domain_column": "data_source"
        }  # fmt: skip

    def test_a_column_that_is_named_is_not_replaced(self) -> None:
        assert Columns(DataConfig(prompt_column="words")).found({"question": "x"}) == {}
        with pytest.raises(UserError, match="no column 'words'"):
            encoder(prompt_column="words").encode_all([{"question": "x"}])


class TestOverlong:
    """The tokenizer of the tests has a token for each byte, and its template one for each role."""

    def test_a_string_loses_its_beginning(self) -> None:
        made = encoder(max_prompt_tokens=5, overlong="truncate_prompt")
        found = made.encode_all([{"prompt": "0123456789"}, {"prompt": "ab"}, {"prompt": "ü" * 9}])
        assert [p.text for p in found] == ["56789", "ab", "üü"] and all(len(p.ids) <= 5 for p in found)
        assert made.truncated == {0, 2} and "2 prompts are shortened" in made.left_out()[0]

    def test_a_conversation_keeps_its_frame(self) -> None:
        """System message and template stay whole; the oldest turns go, then the beginning of the last question."""
        said = [
            {"role": "system", "content": "S"}, {"role": "user", "content": "first"},
            {"role": "assistant", "content": "A"}, {"role": "user", "content": "second"},
        ]  # fmt: skip
        tokenizer = tiny.tokenizer(tiny.TEMPLATE.replace("'<' + m['role'] + '>'", "'[' + m['role'][0] + ']'"))
        for limit, text in ((99, "[s]S[u]first[a]A[u]second"), (15, "[s]S[u]second"), (12, "[s]S[u]cond")):
            made = PromptEncoder(tokenizer, DataConfig(max_prompt_tokens=limit, overlong="truncate_prompt"))
            (found,) = made.encode_all([{"prompt": said, "completion": "yes"}], completions=True)
            assert found.text == f"{text}<assistant>" and len(found.ids) <= limit
            assert tokenizer.decode(found.completion) == "yes<eos>"  # behind the shortened prompt
        made = PromptEncoder(tokenizer, DataConfig(max_prompt_tokens=8, overlong="truncate_prompt"))
        with pytest.raises(UserError, match="row 0: without a word of the question"):
            made.encode_all([{"prompt": said}])

    def test_other_rows_are_refused_or_left_out(self) -> None:
        rows = [{"prompt": "0123456789"}, {"prompt": "ab"}]
        with pytest.raises(UserError, match="row 0: the prompt has 10 tokens.*drop or truncate_prompt"):
            encoder(max_prompt_tokens=5).encode_all(rows)
        made = encoder(max_prompt_tokens=5, overlong="drop")
        assert len(made.encode_all(rows)) == 1 and made.dropped == 1

    def test_completions(self) -> None:
        """A cut one is not closed: nothing teaches the student to stop there."""
        rows = [
            {"prompt": "a", "completion": "12345", "w": [1, 2, 3, 4, 5]},
            {"prompt": "a", "completion": "1", "w": 1.0},
        ]
        data = DataConfig(max_answer_tokens=3, weight_column="w")
        made = PromptEncoder(tiny.tokenizer(), data)
        long, short = made.encode_all(rows, completions=True)
        assert made.tokenizer.decode(long.completion) == "123" and long.weight == (1, 2, 3)
        assert made.tokenizer.decode(short.completion) == "1<eos>" and made.cut == 1
        assert "1 completions are cut after data.max_answer_tokens 3" in made.left_out()[0]
        dropping = PromptEncoder(tiny.tokenizer(), replace(data, completion_overlong="drop"))
        assert len(dropping.encode_all(rows, completions=True)) == 1 and dropping.dropped == 1
        with pytest.raises(UserError, match="row 0: completion has 6 tokens, data.max_answer_tokens is 3"):
            PromptEncoder(tiny.tokenizer(), replace(data, completion_overlong="error")).encode_all(
                rows, completions=True
            )

    def test_sides_of_pairs(self) -> None:
        rows = [
            {"prompt": "0123456789", "chosen": "12345", "rejected": "1"},
            {"prompt": "b", "chosen": "1", "rejected": "2"},
        ]
        data = DataConfig(max_prompt_tokens=4, overlong="truncate_prompt")
        pair, _ = pair_encoder(tiny.tokenizer(), data, max_completion_tokens=3).encode_all(rows, "data.train")
        assert pair.prompt.text == "6789" and len(pair.chosen) == 3 and pair.cut == 1
        dropping = pair_encoder(tiny.tokenizer(), replace(data, completion_overlong="drop"), max_completion_tokens=3)
        assert len(dropping.encode_all(rows, "data.train")) == 1
        refusing = pair_encoder(tiny.tokenizer(), replace(data, completion_overlong="error", max_answer_tokens=3))
        with pytest.raises(UserError, match="row 0: chosen has 6 tokens, 3 are allowed"):
            refusing.encode_all(rows, "data.train")
