"""Verdicts on traces: by llmdistill.verify (math, choice, code), by reasoning-gym's own scorer, or by a function."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from importlib import import_module
from types import TracebackType
from typing import Any, TypeVar

from llmdistill.datagen.schema import digest
from llmdistill.errors import UserError
from llmdistill.verify.asked import Kind
from llmdistill.verify.boxes import last_boxes
from llmdistill.verify.code import find_program, judge_program
from llmdistill.verify.math import AnswerJudge
from llmdistill.verify.sandbox import Sandbox

Verdict = dict[str, Any]  # passed, verdict, extracted, found_by, reason
Judging = Callable[[str, Mapping[str, Any]], Any]  # (completion, row) -> bool, number or Verdict
NAMES = ("auto", "math", "choice", "code", "reasoning_gym")
T = TypeVar("T")
RIGHT = 1.0  # the score of a function from which on a completion is right


class Judge:
    """Judges completions, several at a time, in confined processes where a model's words are run or parsed.

    Args:
        name: math, choice or code; auto: code where the row has tests, else math; reasoning_gym: the task's own scorer,
            of which some evaluate what a model wrote, so it needs ``allow_unsafe_exec``; or package.module:function,
            which is given the completion and its row and returns whether it is right, a score (right from 1 on), or
            a mapping of ``passed``, ``verdict`` and ``reason``.
        workers: verdicts at one time; 0: one for each usable core.
        allow_unsafe_exec: run programs where nothing confines them.

    Raises:
        UserError: no such judge, or one that is not safe here.
    """

    def __init__(self, name: str = "auto", *, workers: int = 0, allow_unsafe_exec: bool = False) -> None:
        if name == "reasoning_gym" and not allow_unsafe_exec:
            raise UserError(
                "judge is reasoning_gym, and some of its scorers evaluate what a model wrote in this process. "
                "Fix: judge math where answers are numbers or expressions, or --allow_unsafe_exec."
            )
        self.name = name
        self._function = None if name in NAMES else _function(name)
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.workers, self._unsafe = workers or usable, allow_unsafe_exec
        self._open, self._threads = ExitStack(), ThreadPoolExecutor(self.workers)
        self._answers: AnswerJudge | None = None
        self._sandbox: Sandbox | None = None

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._open.close()

    def key(self, row: Mapping[str, Any]) -> str:
        """A name for the verdict on a row: equal for equal things judged in the same way."""
        entry = _more(row).get("entry")
        judged = [self.name, row["completion"], row.get("answer"), row.get("tests"), row.get("finish"), entry]
        return digest(judged) * 2

    def submit(self, row: Mapping[str, Any]) -> Future[Verdict]:
        """The verdict to come."""
        kind = self._kind(row)
        if kind in ("math", "choice") and self._answers is None:
            self._answers = self._open.enter_context(AnswerJudge(workers=self.workers))
        if kind == "code" and self._sandbox is None:
            self._sandbox = self._open.enter_context(Sandbox(self.workers, allow_unsafe_exec=self._unsafe))
        return self._threads.submit(self.verdict, row)

    def verdicts(self, rows: Iterable[T], of: Callable[[T], Mapping[str, Any]]) -> Iterator[tuple[T, Verdict]]:
        """Each with its verdict, in order; a few are under way, the rest is not read yet."""
        running = deque[tuple[T, Future[Verdict]]]()
        for row in rows:
            running.append((row, self.submit(of(row))))
            while running and (len(running) >= 16 * self.workers or running[0][1].done()):
                first, future = running.popleft()
                yield first, future.result()
        for first, future in running:
            yield first, future.result()

    def verdict(self, row: Mapping[str, Any]) -> Verdict:
        """On one completion.

        Raises:
            UserError: programs that nothing confines here.
        """
        kind, text = self._kind(row), str(row["completion"])
        if self._function is not None:
            return _told(self._function(text, row), self.name)
        if kind == "code":
            return self._of_program(text, row)
        if kind == "reasoning_gym":
            return _of_gym(text, row)
        if row.get("answer") in (None, ""):
            return _nothing("no right answer to compare with")
        assert self._answers is not None
        asked: Kind = "choice" if kind == "choice" else "math"
        cut = row.get("finish") == "length"  # of a text that was cut off, the last number is no answer
        found = self._answers.judge(text, str(row["answer"]), asked, last_number=not cut)
        return _verdict(found.passed, found.kind, found.extracted, found.stage, found.detail)

    def _kind(self, row: Mapping[str, Any]) -> str:
        if self.name != "auto":
            return self.name
        return "code" if row.get("tests") else "math"

    def _of_program(self, text: str, row: Mapping[str, Any]) -> Verdict:
        if not row.get("tests"):
            return _nothing("no tests to run")
        tests = {k: v for k, v in _mapping(row["tests"]).items() if v is not None}
        confined: dict[str, Any] = {"allow_unsafe_exec": self._unsafe, "sandbox": self._sandbox}
        program = find_program(text, entry_point=tests.get("entry_point"), prompt=tests.get("setup"), **confined)
        ran = judge_program(program, tests, **confined)
        return _verdict(ran.passed, "right" if ran.passed else ran.kind, program, "program", ran.detail)


def _of_gym(text: str, row: Mapping[str, Any]) -> Verdict:
    """By the task's own scorer, of what stands in the last box, in <answer>, or in the last line."""
    import reasoning_gym

    more = _more(row)
    if not more.get("entry"):
        return _nothing("no reasoning-gym entry to score with")
    task, entry = str(more["reasoning_gym"]), json.loads(more["entry"])
    said = text.rpartition("</think>")[2]
    boxed = next(reversed(last_boxes(said)[0]), None)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    tagged = said.rpartition("<answer>")[2].partition("</answer>")[0].strip() if "</answer>" in said else None
    answer = tagged or boxed or (lines[-1].rpartition(":")[2].strip(" .*$") if lines else None)
    if not answer:
        return _verdict(False, "no_answer", None, "none", "no answer found")
    score = float(reasoning_gym.create_dataset(task, size=1, seed=0).score_answer(answer, entry))
    found_by = "answer_tag" if tagged else "boxed" if boxed else "last_line"
    return _verdict(score >= RIGHT, "right" if score >= RIGHT else "wrong", answer, found_by, f"score {score:g}")


def _told(found: Any, name: str) -> Verdict:
    """What a function returned, as a verdict."""
    if isinstance(found, Mapping):
        passed = found.get("passed")
        kind = str(found.get("verdict") or ("right" if passed else "wrong"))
        return _verdict(None if passed is None else bool(passed), kind, None, name, str(found.get("reason", "")))
    if found is None:
        return _nothing(f"{name} has no verdict")
    score = float(found)
    return _verdict(score >= RIGHT, "right" if score >= RIGHT else "wrong", None, name, f"score {score:g}")


def _verdict(passed: bool | None, kind: str, extracted: str | None, found_by: str, reason: str) -> Verdict:
    return {"passed": passed, "verdict": kind, "extracted": extracted, "found_by": found_by, "reason": reason}


def _nothing(reason: str) -> Verdict:
    return _verdict(None, "unjudged", None, "none", reason)


def _more(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The prompt's other columns, where a trace keeps them."""
    return {**_mapping(row.get("meta") or "{}"), **{k: row[k] for k in ("reasoning_gym", "entry") if row.get(k)}}


def _mapping(value: Any) -> dict[str, Any]:
    try:
        found = json.loads(value) if isinstance(value, str) else dict(value)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _function(name: str) -> Judging:
    module, _, function = name.partition(":")
    try:
        return getattr(import_module(module), function)  # type: ignore[no-any-return]
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"judge {name!r} is not there: {error}. Fix: one of {', '.join(NAMES)}, or module:function."
        ) from error
