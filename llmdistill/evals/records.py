"""What an evaluation leaves on disk, and reading it back.

    RUN/config.json        what was asked: suite, data and template hashes, model, sampling, versions
    RUN/problems.jsonl     one Problem a line, as asked
    RUN/prompts.jsonl      one Prompt a line: what the model read
    RUN/samples/*.jsonl    one Sample a line, appended as it is finished; one file per process
    RUN/grades.jsonl       one Grade a line; made again from the samples whenever grading is
    RUN/grading.jsonl      while that is under way: whose grades, then those that are there (llmdistill.evals.grades)
    RUN/results.json       the numbers
    RUN/report.html        the page

Samples are the expensive part: they are only ever appended to. A line that was being written when the process was
killed is dropped on reading.
"""

from __future__ import annotations

import fcntl
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar

from llmdistill.errors import UserError
from llmdistill.evals.lines import Lines
from llmdistill.files import atomic_write, full_disk_is_said, read_json

Kind = Literal["math", "choice", "code"]
Finish = Literal["stop", "length"]
Record = TypeVar("Record")


@dataclass(frozen=True)
class Problem:
    """One item of a suite.

    Attributes:
        id: unique in the suite.
        question: the item's own text; the prompt template goes around it.
        kind: how its answers are judged.
        gold: the right answer (maths, choice); for code the reference solution's program, if there is one.
        tests: of a code item, what llmdistill.evals.grading hands to llmdistill.verify.code; None otherwise.
        groups: the breakdowns it belongs to, {"subject": "Algebra", "level": "3"}.
    """

    id: str
    question: str
    kind: Kind
    gold: str | None = None
    tests: dict[str, Any] | None = None
    groups: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """What the model read before it answered a problem.

    Attributes:
        text: all of it, with what the chat template writes by itself (a system text of its own, special tokens); empty
            where an endpoint applies its template, out of our sight.
        messages: that such an endpoint is sent, the assistant's first words among them; else empty.
        tokens: of the text; 0 where that is not known.
    """

    problem: str
    text: str
    messages: list[dict[str, str]] = field(default_factory=list)
    tokens: int = 0


@dataclass(frozen=True)
class Sample:
    """One completion. ``text`` is the completion only, special tokens that matter (thinking tags) included."""

    problem: str
    index: int
    text: str
    tokens: int
    finish: Finish
    seed: int


@dataclass(frozen=True)
class Grade:
    """The verdict on one sample.

    Attributes:
        kind: "right"/"wrong"/"no_answer"/"timeout" for answers; a code verdict's kind ("pass", "wrong",
            "runtime_error", "timeout", "memory", "violation", "syntax_error", "no_program") for programs.
        extracted: the answer that was judged, or the program.
        stage: the extraction rule that found it ("boxed", "answer_line", "last_number", ...).
        detail: why, in a line or a few.
        cluster: number of the answer's equivalence class among the problem's samples, by first appearance; None
            without an answer.
    """

    problem: str
    index: int
    passed: bool
    kind: str
    extracted: str | None
    stage: str
    detail: str
    cluster: int | None = None


class EvalFolder:
    """The files of one suite's run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def results_file(self) -> Path:
        return self.path / "results.json"

    def read_config(self) -> dict[str, Any] | None:
        """config.json; None without one.

        Raises:
            UserError: it is damaged, as by a power loss.
        """
        return read_json(self.config_file, "the command of that evaluation once more; samples are kept")

    def read_results(self) -> dict[str, Any]:
        """results.json; empty without one.

        Raises:
            UserError: it is damaged.
        """
        return dict(read_json(self.results_file, f"llmdistill eval --grade {self.path}") or {})

    def write_json(self, file: Path, value: Mapping[str, Any]) -> None:
        atomic_write(file, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def problems(self) -> list[Problem]:
        return list(_records(Problem, self.path / "problems.jsonl"))

    def write_problems(self, problems: Iterable[Problem]) -> None:
        atomic_write(self.path / "problems.jsonl", "".join(as_line(p) for p in problems))

    def prompts(self) -> Lines[Prompt]:
        """By problem, one each; none in a folder that was begun before they were written."""
        lines = Lines(
            lambda: [self.path / "prompts.jsonl"],
            lambda row: Prompt(**row),
            lambda row: (row["problem"], 0),
            name="Prompt",
        )
        lines.look()
        return lines

    def write_prompts(self, prompts: Iterable[Prompt]) -> None:
        self._write_lines("prompts.jsonl", prompts)

    def samples(self) -> Lines[Sample]:
        """The finished samples, as they are now."""
        files = self.path / "samples"
        lines = Lines(lambda: files.glob("*.jsonl"), lambda row: Sample(**row), _key, name="Sample")
        lines.look()
        return lines

    def grades(self) -> Lines[Grade]:
        """The verdicts of grades.jsonl."""
        lines = Lines(lambda: [self.path / "grades.jsonl"], lambda row: Grade(**row), _key, name="Grade")
        lines.look()
        return lines

    def write_grades(self, grades: Iterable[Grade]) -> None:
        self._write_lines("grades.jsonl", grades)

    def _write_lines(self, name: str, records: Iterable[Any]) -> None:
        def write(file: Path) -> None:
            with file.open("w", encoding="utf-8") as lines:
                lines.writelines(map(as_line, records))

        atomic_write(self.path / name, write)

    @contextmanager
    def claimed(self, rank: int) -> Iterator[None]:
        """Held by a process for as long as the evaluation is its own: a second command would change what is asked
        while the first one draws, and leave it with samples of neither.

        Raises:
            UserError: another process has it.
        """
        file = self.path / "samples" / f"rank-{rank}.lock"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as held:
            _lock(held, self.path)
            yield

    def appender(self, rank: int) -> Appender:
        return Appender(self.path / "samples" / f"rank-{rank}.jsonl")


class Appender:
    """Appends records so that what was written survives the death of the process."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file: TextIO = file.open("a", encoding="utf-8")
        _lock(self.file, file)
        with file.open("rb+") as before:  # what was cut off in the middle of a line would swallow the next one
            before.truncate(sum(len(line) for line in before if line.endswith(b"\n")))

    def add(self, *records: Any) -> None:
        """Raises UserError where the disk is full; the records before are whole."""
        with full_disk_is_said(self.file.name):
            self.file.write("".join(map(as_line, records)))
            self.file.flush()

    def close(self) -> None:
        with full_disk_is_said(self.file.name):
            self.file.close()


def _key(row: dict[str, Any]) -> tuple[str, int]:
    return row["problem"], row["index"]


def _lock(opened: TextIO, what: Path) -> None:
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when the process ends, however it does
    except BlockingIOError:
        opened.close()
        raise UserError(
            f"{what} is being written by another process. Fix: wait for it, or another --output_dir."
        ) from None


def as_line(record: Any) -> str:
    """A dataclass or a dictionary as a line of JSON."""
    content = record if isinstance(record, dict) else asdict(record)
    text = json.dumps(content, ensure_ascii=False)
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):  # half a character, as endpoints may send
        text = json.dumps(content)
    return text + "\n"


def _records(kind: type[Record], file: Path) -> Iterator[Record]:
    for row in json_rows(file):
        try:
            yield kind(**row)
        except TypeError:
            warnings.warn(f"{file} holds a line that is no {kind.__name__}; it is left out", stacklevel=2)


def json_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file; one that cannot be read is left out with a warning."""
    if not file.is_file():
        return
    with file.open("rb") as lines:  # as bytes: what is being written may end in the middle of a character
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                continue
            try:
                yield json.loads(line)
            except ValueError:
                warnings.warn(f"{file} line {number} cannot be read and is left out", stacklevel=2)
