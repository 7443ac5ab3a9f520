"""Ten thousand problems with sixteen samples each: what is read, what is held, and what is done meanwhile."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmdistill.evals import runner
from llmdistill.evals.config import EvalConfig
from llmdistill.evals.engines.base import Asked
from llmdistill.evals.engines.make import Source, load_tokenizer
from llmdistill.evals.lines import Lines
from llmdistill.evals.records import EvalFolder, Problem, Sample
from llmdistill.texts.rollout import Sampling
from tests.evals import made

QUIET = Console(file=StringIO())


def test_looking_again_reads_what_was_written_since(tmp_path: Path) -> None:
    folder, read = EvalFolder(tmp_path), list[int]()

    def counted(row: dict[str, Any]) -> Sample:
        read.append(1)
        return Sample(**row)

    lines = Lines(lambda: (tmp_path / "samples").glob("*.jsonl"), counted, lambda row: (row["problem"], row["index"]))
    ranks = [folder.appender(rank) for rank in (0, 1)]
    for i in range(50):
        ranks[i % 2].add(Sample("p", i, f"text {i}", 1, "stop", 0))
    assert sorted(lines.look()) == [("p", i) for i in range(50)] and len(read) == 50
    assert lines.look() == [] and len(read) == 50
    with (tmp_path / "samples" / "rank-0.jsonl").open("ab") as file:
        file.write(b'{"problem": "q"')  # being written
    assert lines.look() == []
    ranks[1].add(Sample("q", 0, "new", 1, "stop", 0))
    assert lines.look() == [("q", 0)] and len(read) == 51
    assert [s.text for s in lines.of("q")] == ["new"] and [s.index for s in lines.of("p")] == list(range(50))
    assert len(lines) == 51 and ("p", 49) in lines and ("p", 50) not in lines and ("r", 0) not in lines


def test_of_two_samples_the_one_of_the_first_file_counts(tmp_path: Path) -> None:
    """Whichever was found first: a folder says the same to who comes later."""
    folder = EvalFolder(tmp_path)
    early = folder.samples()
    for rank in (1, 0):
        writer = folder.appender(rank)
        writer.add(Sample("p", 0, f"of rank {rank}", 1, "stop", 0), Sample("p", 0, "again", 1, "stop", 0))
        writer.close()
        early.look()
    assert [s.text for s in early] == [s.text for s in folder.samples()] == ["of rank 0"]


def peak_of(path: Path, count: int) -> tuple[int, int]:
    """(bytes of all samples, most that grading, summing up and the page held at one time)."""
    folder, problems = EvalFolder(path), [Problem(f"p{i}", f"{i} + {i}?", "math", str(2 * i)) for i in range(count)]
    folder.write_problems(problems)
    settings = {"suite": "s", "model": "m", "n": 4, "pass_at": [1], "maj_at": [2], "thinking": None, "seed": 0}
    template = {"name": "t", "version": 1, "hash": "h", "prefill": ""}
    about = {key: None for key in runner.ABOUT} | {"sampling": {"temperature": 1.0}, "versions": {}}
    folder.write_json(folder.config_file, {**about, **settings, "template": template})
    writer, text = folder.appender(0), "Let us see. " * 1700
    for problem in problems:
        writer.add(*(Sample(problem.id, i, f"{text}\\boxed{{{problem.gold}}}", 9, "stop", i) for i in range(4)))
    writer.close()
    tracemalloc.start()
    try:
        done = runner.regrade(folder.path, workers=1, console=QUIET)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert done.score == 1.0 and done.results["samples"] == 4 * count
    return (path / "samples" / "rank-0.jsonl").stat().st_size, peak


@pytest.mark.slow
def test_grading_and_the_page_hold_the_texts_of_a_few_problems(tmp_path: Path) -> None:
    """Five times the problems: hardly more is held."""
    peak_of(tmp_path / "first", 2)  # what is imported
    (few, low), (many, high) = (peak_of(tmp_path / str(count), count) for count in (16, 80))
    assert many - few > 5e6 and high - low < 0.25 * (many - few), (few, low, many, high)


class Waiting:
    """Draws the first problem, then waits until it is graded, then the rest."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "sums" / "grading.jsonl"

    def draw(self, asked: Sequence[Asked], sampling: Sampling, stop: Sequence[str]) -> Iterator[Sample]:
        first = asked[0].problem
        for one in asked:
            if one.problem != first:
                end = time.monotonic() + 60
                while f'"{first}"' not in (self.file.read_text() if self.file.is_file() else ""):
                    assert time.monotonic() < end, "nothing was graded while samples were drawn"
                    time.sleep(0.05)
            yield one.sample("\\boxed{0}", 4, "stop")

    def close(self) -> None: ...


def test_a_problem_is_graded_while_others_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = made.model(tmp_path), tmp_path / "out"
    source = Source("m", "f", None, load_tokenizer(str(model)), 256, lambda longest: Waiting(out))
    monkeypatch.setattr(runner, "open_source", lambda config: source)
    config = EvalConfig(model=str(model), engine="hf", output_dir=str(out), workers=1)
    done = runner.evaluate(made.suite(tmp_path), config=config, console=QUIET)
    assert not isinstance(done, list) and done.score == pytest.approx(1 / 6)  # 0 + 0 = 0
    assert not (out / "sums" / "grading.jsonl").exists()


SLOW = """def f(n):
    total = 0
    for i in range(4_000_000):
        total += i % 7
    return n + 1
"""


@pytest.mark.slow
def test_a_limit_is_measured_against_the_reference(tmp_path: Path) -> None:
    """On a machine so slow that the reference itself exceeds the row's limit: what does the same work passes, what
    does not end does not."""
    tests = {"style": "asserts", "test": "assert f(1) == 2", "entry_point": "f", "time_limit_s": 0.1}
    endless = "def f(n):\n    while True:\n        pass\n"
    for gold, program, kind in ((SLOW, SLOW, "pass"), (None, SLOW, "timeout"), (SLOW, endless, "timeout")):
        problem = Problem("p", "q", "code", gold, tests)
        text = f"```python\n{program}```"
        (grade,) = made.graded([problem], [Sample("p", 0, text, 1, "stop", 0)], allow_unsafe_exec=True, workers=1)
        assert grade.kind == kind, (grade, gold)
