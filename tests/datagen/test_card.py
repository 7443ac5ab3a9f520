"""The card: valid front matter, numbers that are those of the data, and the chain behind it."""

import re

import pytest
import yaml

from llmdistill.datagen.cards import card, plot
from llmdistill.datagen.curation import curate
from llmdistill.datagen.tables import write_rows
from llmdistill.datagen.tell import summary
from llmdistill.errors import UserError


def rows():
    made = []
    for i in range(40):
        made.append(
            dict(
                prompt=f"question {i // 2}",
                completion="so " * (1 + i),
                teacher="big|one" if i % 4 else "small",
                tokens=2 ** (i % 10),
                finish="length" if i % 10 == 0 else "stop",
                passed=bool(i % 2),
                domain="sums",
                sampling={"temperature": 0.6, "top_p": 0.95},
            )
        )
    return made


def test_a_card(tmp_path):
    write_rows(tmp_path / "traces.jsonl", rows())
    curate(tmp_path / "traces.jsonl", tmp_path / "train.jsonl", steps=["finished", "right"])
    manifest = card(
        tmp_path / "train.jsonl",
        tmp_path / "README.md",
        title="Sums: worked",
        licence="apache-2.0",
        about="An example.",
        sources={"made by rule": "none"},
    )
    assert summary(manifest)[0] == "card: 20 rows read"  # it writes a page, and no rows that could be counted
    text = (tmp_path / "README.md").read_text()
    _, front, body = re.split(r"^---$", text, maxsplit=2, flags=re.M)
    told = yaml.safe_load(front)
    assert told["license"] == "apache-2.0" and told["pretty_name"] == "Sums: worked"
    assert told["configs"][0]["data_files"] == [{"split": "train", "path": "train.jsonl"}]
    assert told["size_categories"] == ["n<1K"]
    assert "20 rows, 20 different prompts" in body and manifest.details["rows"] == 20
    assert "| big\\|one | 20 | 100.0% of 20 judged | 0.0% |" in body
    assert "| curate | 40 | 20 | 16 wrong; 4 cut off |" in body
    assert "| big\\|one | temperature 0.6, top_p 0.95 | 20 |" in body
    assert "An example." in body and "| made by rule | none |" in body and "█" in body
    for table in re.findall(r"(?:^\|.*\n)+", body, re.M):  # every row of a table has as many cells as its head
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_the_card_of_two_splits(tmp_path):
    for name in ("pairs_train", "pairs_heldout"):
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": name, "chosen": "a", "rejected": "b"}])
    card(
        [tmp_path / "pairs_train.jsonl", tmp_path / "pairs_heldout.jsonl"], tmp_path / "R.md", title="t", licence="mit"
    )
    front = yaml.safe_load((tmp_path / "R.md").read_text().split("---")[1])
    assert [f["split"] for f in front["configs"][0]["data_files"]] == ["train", "validation"]


@pytest.mark.parametrize("lengths", [[1], [5, 5, 5], [0, 1, 2], [3, 10, 11, 4000], list(range(10, 30))])
def test_the_plot_counts_every_row(lengths):
    lines = plot(lengths, "tokens").splitlines()[1:]
    counted = [int(match[1]) for line in lines if (match := re.search(r" (\d+)$", line))]
    assert sum(counted) == len(lengths)


def test_what_a_card_needs(tmp_path):
    write_rows(tmp_path / "empty.jsonl", [])
    with pytest.raises(UserError, match="no rows"):
        card(tmp_path / "empty.jsonl", tmp_path / "R.md", title="t", licence="mit")
    with pytest.raises(UserError, match="title and the licence"):
        card(tmp_path / "empty.jsonl", tmp_path / "R.md", title="t", licence="")
