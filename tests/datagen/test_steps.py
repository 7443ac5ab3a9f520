"""A step is done once, its output appears whole, and its manifest tells how it came to be."""

from __future__ import annotations

import gzip
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from datasets import Dataset, DatasetDict

from llmdistill.datagen.steps import Step, run_step
from llmdistill.datagen.tables import Rejects, count_rows, read_rows, write_rows
from llmdistill.errors import UserError
from llmdistill.record.manifest import read_manifest

ROWS: list[dict[str, Any]] = [{"prompt": f"{n} + 1?", "completion": "x" * n} for n in range(1, 6)]


def shorter(src: Any, out: Path, characters: int = 3, **options: Any) -> Any:
    def work(step: Step) -> None:
        done.append(out.name)

        def kept() -> Any:
            for row in step.rows(("completion",)):
                if len(row["completion"]) > characters:
                    step.lose("too long")
                else:
                    yield row

        step.write(kept())

    return run_step("shorter", work, src=src, out=out, settings={"characters": characters}, **options)


done: list[str] = []


@pytest.fixture(autouse=True)
def forget() -> None:
    done.clear()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_rows(tmp_path / "in.jsonl", ROWS)
    return tmp_path / "in.jsonl"


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.parquet"])
def test_rows_come_back_as_they_were_written(tmp_path: Path, name: str) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": "Σ?"}], "completion": "a", "tokens": 1, "logprobs": None},
        {"prompt": [{"role": "user", "content": "b"}], "completion": "c", "tokens": 2, "logprobs": [-0.5, None]},
    ]
    assert write_rows(tmp_path / name, rows) == 2
    assert list(read_rows(tmp_path / name)) == rows


def test_columns_that_the_first_row_lacks_are_in_the_parquet_file(tmp_path: Path) -> None:
    """pyarrow alone takes the columns of the first row and drops the others, without a word."""
    rows = [{"a": 1}, {"a": None, "late": "x"}] + [{"a": 2}] * 2000 + [{"later": [1.5]}]
    write_rows(tmp_path / "o.parquet", rows)
    read = parquet.read_table(tmp_path / "o.parquet").to_pylist()
    assert read[1]["late"] == "x" and read[-1]["later"] == [1.5] and read[0] == {"a": 1, "late": None, "later": None}


def test_a_column_of_two_types_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written.*Fix: values of one type"):
        write_rows(tmp_path / "o.parquet", [{"a": 1}] * 1024 + [{"a": "x"}])
    assert not list(tmp_path.iterdir())


def test_equal_rows_are_equal_bytes_gzipped_too(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_rows(tmp_path / name, ROWS)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert len(gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).splitlines()) == 5


def test_a_manifest_counts_and_a_finished_step_is_skipped(source: Path, tmp_path: Path) -> None:
    made = shorter(source, tmp_path / "o.jsonl")
    assert (made.counts, made.lost) == ({"read": 5, "written": 3, "rejected": 0}, {"too long": 2})
    assert made.outputs[str(tmp_path / "o.jsonl")].rows == 3 and len(made.code) == 16
    assert shorter(source, tmp_path / "o.jsonl") == made == read_manifest(tmp_path / "o.jsonl")
    assert done == ["o.jsonl"]


def test_other_settings_are_refused_with_the_difference(source: Path, tmp_path: Path) -> None:
    shorter(source, tmp_path / "o.jsonl")
    with pytest.raises(UserError, match="characters 3, now it is 4"):
        shorter(source, tmp_path / "o.jsonl", characters=4)


def test_another_input_or_a_lost_output_makes_it_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    shorter(source, out)
    write_rows(source, ROWS[:2])
    assert shorter(source, out).counts["written"] == 2
    out.write_text("{}\n")  # not what was written
    assert shorter(source, out).counts["written"] == 2 and len(list(read_rows(out))) == 2
    assert len(done) == 3


def test_lineage_goes_down_the_chain(source: Path, tmp_path: Path) -> None:
    shorter(source, tmp_path / "a.jsonl", 4)
    made = shorter(tmp_path / "a.jsonl", tmp_path / "b.jsonl", 2)
    assert [(s["settings"]["characters"], s["lost"]) for s in made.history()] == [
        (4, {"too long": 1}),
        (2, {"too long": 2}),
    ]


def test_rows_that_are_none_go_to_the_rejects_with_the_reason(source: Path, tmp_path: Path) -> None:
    with source.open("a") as lines:
        lines.write('{"prompt": "no end\n[1]\n{"prompt": "p"}\n')
    made = shorter(source, tmp_path / "o.jsonl", max_rejected=0.5)
    assert made.counts == {"read": 5, "written": 3, "rejected": 3}
    rejects = [json.loads(line) for line in (tmp_path / "o.jsonl.rejects.jsonl").open()]
    assert [(r["row"], r["reason"]) for r in rejects] == [
        (6, "no JSON object"),
        (7, "no JSON object"),
        (8, "no completion"),
    ]
    assert rejects[0]["content"] == '{"prompt": "no end'
    write_rows(source, ROWS)  # mended
    assert shorter(source, tmp_path / "o.jsonl").counts["rejected"] == 0
    assert not (tmp_path / "o.jsonl.rejects.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("bad.json", b'[{"prompt": ', "bad.json cannot be read behind row 0: Expecting value"),
        ("cut.jsonl.gz", gzip.compress(b'{"prompt": "p"}\n' * 9, mtime=0)[:-9], "cut.jsonl.gz cannot be read behind"),
        ("no.jsonl.gz", b"text\n", "behind row 0: Not a gzipped file"),
        ("bad.parquet", b"PAR1 nothing", "behind row 0: Parquet magic bytes not found"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    for read in (lambda file: list(read_rows(file, Rejects.unheeded())), count_rows):
        with pytest.raises(UserError, match=said):
            read(tmp_path / name)


def test_dates_and_bytes_of_a_parquet_file_are_text(tmp_path: Path) -> None:
    when = datetime(2026, 1, 2, 3, 4)
    parquet.write_table(pa.Table.from_pylist([{"prompt": "p", "when": when, "raw": b"x"}]), tmp_path / "a.parquet")
    assert write_rows(tmp_path / "b.jsonl", read_rows(tmp_path / "a.parquet")) == 1
    assert list(read_rows(tmp_path / "b.jsonl")) == [{"prompt": "p", "when": "2026-01-02T03:04:00", "raw": "x"}]


def test_a_folder_of_splits_names_them(tmp_path: Path) -> None:
    table = Dataset.from_list([{"prompt": "p"}])
    DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "d")
    with pytest.raises(UserError, match=r"holds the splits train, test\. Fix: .*/d/train"):
        list(read_rows(tmp_path / "d"))
    assert list(read_rows(tmp_path / "d" / "train")) == [{"prompt": "p"}]


def test_above_a_share_of_rejects_the_step_stops_and_leaves_no_output(source: Path, tmp_path: Path) -> None:
    with source.open("a") as lines:
        lines.write("x\n")
    with pytest.raises(UserError, match=r"1 of 6 rows were rejected, more than the share 0\.05.*o\.jsonl\.rejects"):
        shorter(source, tmp_path / "o.jsonl")
    assert not (tmp_path / "o.jsonl").exists() and read_manifest(tmp_path / "o.jsonl") is None


def test_a_large_file_of_something_else_is_given_up_early(tmp_path: Path) -> None:
    (tmp_path / "o.jsonl").write_text("x\n" * 100_000)
    rejects = Rejects(tmp_path / "r.jsonl")
    with pytest.raises(UserError, match="rejected"):
        list(read_rows(tmp_path / "o.jsonl", rejects))
    assert rejects.read < 1000


def test_a_step_that_fails_leaves_what_was_there_without_a_manifest(source: Path, tmp_path: Path) -> None:
    def fails(step: Step) -> None:
        step.write(row for row in [*step.rows(), 1 / 0])  # type: ignore[list-item]

    with pytest.raises(ZeroDivisionError):
        run_step("fails", fails, src=source, out=tmp_path / "o.jsonl", settings={})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl"]
