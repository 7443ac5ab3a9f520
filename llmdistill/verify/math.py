"""Verdicts on maths and multiple-choice answers.

    verify_answer("... so it is $\\\\boxed{0.5}$", "\\\\frac{1}{2}")   # True

An answer is found in the completion (extract.py), read as one of the types of answers/ and compared with the gold. What
takes algebra goes to a worker process with a hard limit on time and memory (workers.py), so that a verdict comes
whatever a model writes, from whatever thread it is asked for.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from llmdistill.verify import equal
from llmdistill.verify.equal import Kind
from llmdistill.verify.extract import Extraction
from llmdistill.verify.workers import Pool

VerdictKind = Literal["right", "wrong", "no_answer", "timeout"]
TIME_LIMIT_S = 5.0
# What a child may parse without a time limit of our own making is still bounded: longer answers are no answers.
LONGEST_ANSWER = 10_000
MOST_COMPARISONS = 400  # of one problem's answers with each other: some ten seconds


@dataclass(frozen=True)
class AnswerVerdict:
    """The verdict on one completion.

    Attributes:
        passed: whether the answer is right.
        kind: "right", "wrong", "no_answer", or "timeout" where the comparison had to be stopped.
        extracted: the answer that was judged.
        stage: the rule that found it (extract.py), or "concluding_word".
        detail: the rule that decided, or why nothing could.
    """

    passed: bool
    kind: VerdictKind
    extracted: str | None
    stage: str
    detail: str


class AnswerJudge:
    """Judges answers with worker processes of its own.

    Args:
        workers: verdicts that run at a time.
        time_limit_s: what one verdict may take before its worker is killed.
        memory_limit_mb: what one verdict may allocate.

    A context manager; ``close`` does the same. Safe from any thread and in forked children.
    """

    def __init__(self, workers: int = 1, time_limit_s: float = TIME_LIMIT_S, memory_limit_mb: int = 1024) -> None:
        self._pool = Pool(
            "llmdistill.verify.math:answer_request",
            warm_up=_WARM_UP,
            workers=workers,
            time_limit_s=time_limit_s,
            memory_limit_mb=memory_limit_mb,
        )

    def __enter__(self) -> AnswerJudge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._pool.close()

    def judge(
        self,
        prediction: str,
        gold: str,
        kind: Kind = "math",
        *,
        last_number: bool = True,
        tolerance: float | None = None,
    ) -> AnswerVerdict:
        """The verdict on a completion.

        Args:
            prediction: the completion.
            gold: the right answer, LaTeX or plain, or a solution that boxes it.
            kind: "choice" where the answer is an option letter.
            last_number: whether an unmarked last number counts (extract.extract).
            tolerance: how far a number may be from the gold, absolute (OlympiadBench's error_tolerance).
        """
        found = equal.judge_quickly(prediction, gold, kind=kind, last_number=last_number, tolerance=tolerance)
        if found is not None:
            return _verdict(found.extraction, found.decision)
        extraction = equal.find(prediction, gold, kind=kind, last_number=last_number)
        if len(extraction.answer or "") > LONGEST_ANSWER or len(gold) > LONGEST_ANSWER:
            shown = (extraction.answer or "")[:200]
            return AnswerVerdict(False, "wrong", shown, extraction.stage, f"longer than {LONGEST_ANSWER} characters")
        reply = self._pool.call(
            {
                "gold": gold,
                "answer": extraction.answer,
                "parts": extraction.parts,
                "kind": kind,
                "tolerance": tolerance,
            }
        )
        if "timeout" in reply or reply.get("memory"):
            why = reply.get("timeout", "ran out of memory")
            return AnswerVerdict(False, "timeout", extraction.answer, extraction.stage, why)
        if "failed" in reply:
            return AnswerVerdict(False, "wrong", extraction.answer, extraction.stage, reply["failed"])
        return _verdict(extraction, equal.Decision(reply["equal"], reply["rule"]))

    def judge_many(self, items: Iterable[tuple[Any, ...]]) -> Iterator[AnswerVerdict]:
        """Verdicts on (prediction, gold) or (prediction, gold, kind), in order."""
        return self._pool.map(lambda item: self.judge(*item), items)

    def equivalent(self, a: str, b: str, kind: Kind = "math") -> bool:
        """Whether two extracted answers say the same; False where that cannot be found out in time."""
        decision = equal.quickly(a, b, kind=kind)
        if decision is not None:
            return decision.equal
        if max(len(a), len(b)) > LONGEST_ANSWER:
            return False
        reply = self._pool.call({"gold": a, "answer": b, "parts": (), "kind": kind, "both_ways": True})
        return bool(reply.get("equal", False))

    def classes(self, answers: Iterable[str | None], kind: Kind = "math") -> list[int | None]:
        """The number of each answer's equivalence class, by first appearance; None where there is no answer.

        Answers are compared with the first of each class, so what is not transitive (0.333333 = 1/3) goes by it. After
        ``MOST_COMPARISONS`` that need the library, which grow with the square of what is distinct, what is not plainly
        equal is taken to be different.
        """
        left = MOST_COMPARISONS

        def same(a: str, b: str) -> bool:
            nonlocal left
            plainly = equal.quickly(a, b, kind=kind)
            if plainly is not None or left == 0:
                return plainly is not None and plainly.equal
            left -= 1
            return self.equivalent(a, b, kind)

        known: dict[str, int] = {}
        first: list[str] = []
        numbers: list[int | None] = []
        for answer in answers:
            if answer is None or not answer.strip():
                numbers.append(None)
                continue
            answer = answer.strip()
            if answer not in known:
                known[answer] = next((n for n, other in enumerate(first) if same(other, answer)), len(first))
                if known[answer] == len(first):
                    first.append(answer)
            numbers.append(known[answer])
        return numbers


def _verdict(extraction: Extraction, decision: equal.Decision | None) -> AnswerVerdict:
    if decision is None:
        return AnswerVerdict(False, "no_answer", None, extraction.stage, "no answer found")
    kind: VerdictKind = "right" if decision.equal else "wrong"
    return AnswerVerdict(decision.equal, kind, extraction.answer, extraction.stage, decision.rule)


def answer_request(request: dict[str, Any]) -> dict[str, Any]:
    """A worker's reply to one comparison."""
    decision = equal.compare_all(
        request["gold"],
        request["answer"],
        tuple(request["parts"]),
        kind=request["kind"],
        tolerance=request.get("tolerance"),
        both_ways=request.get("both_ways", False),
    )
    return {"equal": decision.equal, "rule": decision.rule}


# One of each kind of thing that takes algebra: mpmath is imported and its constants are known before the first fork.
_WARM_UP = [
    {"gold": gold, "answer": answer, "parts": (), "kind": "math"}
    for gold, answer in (
        ("\\frac{x+1}{2}", "x/2+\\frac12"),
        ("\\sqrt{2}+\\pi", "\\pi+\\sqrt{8}/2"),
        ("\\{1,2\\}", "2, 1"),
        ("(1,2]", "1<x\\le 2"),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\x\\end{pmatrix}"),
        ("y=2x+1", "2x-y+1=0"),
        ("\\sin x", "\\cos(x)"),
        ("1.5", "(3x)/(2x)"),
    )
]

_shared: AnswerJudge | None = None
_shared_lock = threading.Lock()


def _renew_lock() -> None:
    global _shared_lock
    _shared_lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)  # another thread of the parent may have held it


def _shared_judge() -> AnswerJudge:
    """The judge behind the module's functions, made when first needed. Its pool closes at exit and survives forks."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = AnswerJudge()
        return _shared


def judge_answer(
    prediction: str, gold: str, *, kind: Kind = "math", last_number: bool = True, tolerance: float | None = None
) -> AnswerVerdict:
    """The verdict on a completion, with what was extracted, by which rule, and what decided. See AnswerJudge.judge."""
    return _shared_judge().judge(prediction, gold, kind, last_number=last_number, tolerance=tolerance)


def verify_answer(prediction: str, gold: str) -> bool:
    """Whether a completion's answer is the gold one. Safe from any thread; takes TIME_LIMIT_S at most, then False."""
    return judge_answer(prediction, gold).passed


def equivalent(a: str, b: str) -> bool:
    """Whether two extracted answers say the same, for counting votes."""
    return _shared_judge().equivalent(a, b)
