"""kill -9 at any point of a step behind generation: its output is whole or absent, and the step done again equals one
that nobody disturbed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from llmdistill import datagen
from llmdistill.datagen.tables import write_rows
from llmdistill.record.manifest import manifest_file, read_manifest
from tests.datagen.processes import PROCESSES

SUITE = [{"problem": "How many apples does Ada have when she buys nine more of them at the market?", "answer": "12"}]
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "verify": ("o.jsonl", {"judge": f"{__name__}:says"}),
    "build_pairs": ("o.jsonl", {"choose": "closest_length"}),
    "curate": ("o.jsonl", {"steps": ["finished", "no_loops", {"pass_rate": {"most": 0.9}}, "exact_duplicates"]}),
    "decontaminate": ("o.jsonl", {"suites": "suite.jsonl", "n": 5}),
    "card": ("o.md", {"title": "Sums", "licence": "mit"}),
}


def says(completion: str, row: dict[str, Any]) -> bool:
    """A judge in this process: the others' are slow to start, and another step's concern."""
    return f"boxed{{{row['answer']}}}" in completion


def traces() -> list[dict[str, Any]]:
    made = []
    for n in range(12):
        for index in range(4):
            right = (n + index) % 3 != 0
            about = {"prompt_id": str(n), "teacher": "ab"[index % 2], "answer": str(n + 1), "tokens": 8 + index}
            text = f"{n} + 1 is {n + 1 if right else n}. The answer is \\boxed{{{n + 1 if right else n}}}."
            verdict = {"passed": right, "verdict": "right" if right else "wrong", "finish": "stop"}
            made.append({"id": f"{n}/{index}", "prompt": f"What is {n} + 1?", "completion": text, **about, **verdict})
    made[5]["prompt"] = SUITE[0]["problem"]
    return made


def killed_at(move: int, kind: str, src: Path, out: Path, settings: dict[str, Any]) -> None:
    """The step, in a process that is killed at the n-th time a file is put in its place: just before it (even), or just
    after (odd)."""
    replace, moves = os.replace, 0

    def dying(*names: Any) -> None:
        nonlocal moves
        for after in (False, True):
            if after:
                replace(*names)
            if moves == move:
                os.kill(os.getpid(), signal.SIGKILL)
            moves += 1

    os.replace = dying  # type: ignore[assignment]
    getattr(datagen, kind)(src, out, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    """The data files: manifests tell the time that was spent, and what a kill leaves behind has no name of its own."""
    files = (file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    return {file.name: file.read_bytes() for file in files if not file.name.endswith(".manifest.json")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", STEPS)
def test_a_step_that_is_killed_again_and_again(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, settings = STEPS[kind]
    monkeypatch.chdir(tmp_path)
    write_rows("in.jsonl", traces())
    write_rows("suite.jsonl", SUITE)
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    calm.mkdir()
    killed.mkdir()
    made = getattr(datagen, kind)("in.jsonl", calm / name, **settings)
    kills = 0
    while True:
        process = PROCESSES.Process(target=killed_at, args=(kills, kind, Path("in.jsonl"), killed / name, settings))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        there = contents(killed)
        assert there.items() <= contents(calm).items(), "half a file, or another one"
        if manifest_file(killed / name).exists():
            assert there == contents(calm), "a manifest before all files are there"
    assert kills >= 4 and contents(killed) == contents(calm)
    again = read_manifest(killed / name)
    assert again is not None
    assert (again.counts, again.lost, again.details) == (made.counts, made.lost, made.details)
