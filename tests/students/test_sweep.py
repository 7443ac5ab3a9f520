"""The sweep over architectures: all of them as a proof, a dozen in CI.

pytest -m proof tests/students                        # holds every architecture to the limits
pytest -m proof tests/students --students-table FILE  # and writes what was found into the table of FILE
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.students import sweep

# Text decoders of every kind: attention, latent attention, state spaces and recurrences, experts fused and scattered,
# scaled and capped heads, heads tied and not; an image-text class.
DOZEN = ["cohere", "deepseek_v3", "falcon_h1", "gemma2", "gemma3", "gpt2"]
DOZEN += ["hyperclovax", "jamba", "minicpm3", "mixtral", "qwen3_next", "rwkv"]


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> Iterator[list[sweep.Row]]:
    """The rows that are found; written where that was asked for, in the places of what was found before."""
    rows: list[sweep.Row] = []
    yield rows
    if (file := request.config.getoption("--students-table")) and rows:
        sweep.write(Path(file), rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", DOZEN)
def test_one_of_a_dozen(name: str) -> None:
    row = sweep.examine(name)
    assert row.right and not row.refused, row


@pytest.mark.proof
@pytest.mark.parametrize("name", sweep.names())
def test_every_architecture(name: str, found: list[sweep.Row]) -> None:
    """The few that a small config cannot be made of, in transformers, are named in eval/proof/students.md."""
    try:
        row = sweep.examine(name)
    except sweep.NotMade as error:
        pytest.skip(str(error))
    assert row.right, row
    found.append(row)


def test_the_table_takes_new_rows_in_the_places_of_the_old(tmp_path: Path) -> None:
    file, old = tmp_path / "students.md", [sweep.Row("gpt2", "A", *[0.0] * 5), sweep.Row("rwkv", "B", refused="no")]
    file.write_text(f"Words.\n\n{sweep.table(old)}\n\nMore words.\n")
    sweep.write(file, [sweep.Row("llama", "C", *[1e-7] * 5), sweep.Row("gpt2", "D", *[2e-7] * 5)])
    lines = file.read_text().splitlines()
    assert lines[0] == "Words." and lines[-1] == "More words."
    rows = [line for line in lines if line.startswith("| ") and "---" not in line]
    assert [row.split(" | ")[0] for row in rows] == ["| architecture", "| gpt2", "| llama", "| rwkv"]
    assert "| gpt2 | D | 2e-07 |" in rows[1] and rows[3].endswith("| refused: no |")
