"""The three walkthroughs of CONTRIBUTING.md run as they stand there."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from llmdistill.opd import main
from tests import tiny

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
FILES = dict(re.findall(r"```python\n# mymethods/(\w+)\.py\n(.*?)```", TEXT, re.DOTALL))


def test_there_are_three() -> None:
    assert sorted(FILES) == ["annealed", "hinted", "le_cam"]


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_method_of_ones_own_is_one_file(
    name: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_run: Path
) -> None:
    package = tmp_path / "mymethods"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / f"{name}.py").write_text(FILES[name])
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in [m for m in sys.modules if m.partition(".")[0] == "mymethods"]:
        del sys.modules[module]
    rows = [{**row, "hint": f"the hint {i}"} for i, row in enumerate(tiny.rows(8, completion=False))]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    contexts = ["--data.contexts", json.dumps({"hint": "hint"})] if name == "hinted" else []
    assert main([*command, "--method", f"mymethods:{name}", "--data.train", str(data), *contexts]) == 0
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)
    if name == "annealed":
        assert all("distill/beta" in line for line in lines if "loss" in line)
    if name == "hinted":
        assert all(line["distill/hinted/loss"] > 0 for line in lines if "loss" in line)
