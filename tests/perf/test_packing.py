"""The benchmark of passes by sequence length runs in all its modes, and its lines say what they are of."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from eval.perf import packing


def test_rounds_are_long_tailed_and_hold_one_sequence_of_the_longest() -> None:
    lengths = packing.lengths_of_a_round(4096)
    assert max(lengths) == lengths[0] == 4096 and min(lengths) >= 32
    assert 4 * 4096 <= sum(lengths) < 5 * 4096 and sorted(lengths)[len(lengths) // 2] < 4096 / 4
    assert lengths == packing.lengths_of_a_round(4096)


def test_every_mode_reads_the_same_tokens_and_packing_no_padding(tmp_path: Path, monkeypatch: Any) -> None:
    for name, small in {"VOCAB": 300, "HIDDEN": 32, "LAYERS": 1, "HEADS": 2}.items():
        monkeypatch.setattr(packing, name, small)
    seen = dict[str, dict[str, Any]]()

    def here(mode: str, longest: int, options: argparse.Namespace) -> dict[str, Any]:
        seen[mode] = packing.measured(mode, longest, options)
        return seen[mode]

    monkeypatch.setattr(packing, "in_a_process", here)
    results = tmp_path / "results.csv"
    given = ["--lengths", "128", "--modes", *packing.MODES, "--budget", "256", "--runs", "2", "--threads", "1"]
    packing.main([*given, "--results", str(results)])
    assert len({found["tokens"] for found in seen.values()}) == len({found["work"] for found in seen.values()}) == 1
    assert all(len(found["seconds"]) == 2 for found in seen.values())
    assert seen["packed"]["padding"] == 0 < seen["rows"]["padding"] < seen["padded"]["padding"]
    lines = list(csv.DictReader(results.open()))
    assert [line["unit"] for line in lines[:4]] == ["tokens/s", "GiB", "MFU", "share of padding"]
    assert lines[4]["cell"] == "packed, up to 128 tokens, passes of 256, 1 threads"
