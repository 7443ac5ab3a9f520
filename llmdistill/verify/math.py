"""Verdicts on maths and multiple-choice answers.

    verify_answer("... so it is $\\\\boxed{0.5}$", "\\\\frac{1}{2}")   # True

An answer is found in the completion (extract.py), read as one of the types of answers/ and compared with the gold, in
worker processes with a hard limit on time and memory (workers.py, answer_requests.py): a verdict comes whatever a model
writes, from whatever thread it is asked for, and the process that asks parses none of it. Many answers go to a worker
together; what takes algebra goes alone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeVar

from llmdistill.verify.asked import LONGEST_COMPLETION, WARM_UP, Asked, Kind
from llmdistill.verify.workers import Pool, Reply, Request

T = TypeVar("T")
VerdictKind = Literal["right", "wrong", "no_answer", "timeout"]
TIME_LIMIT_S = 5.0
WORK = "llmdistill.verify.answer_requests:reply_to"
# What goes to a worker together: well within the limits of one call, where nothing of it is written against them.
MOST_TOGETHER = 64
MOST_CHARACTERS = 400_000
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
            WORK,
            warm_up=WARM_UP,
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
        return self.judge_all([Asked(prediction, gold, kind, last_number, tolerance)])[0]

    def judge_all(self, asked: Sequence[Asked]) -> list[AnswerVerdict]:
        """The verdicts on some completions, which go to a worker together, in order."""
        items = [{"do": "find", **vars(a), "prediction": a.prediction[-LONGEST_COMPLETION:]} for a in asked]
        return [self._decided(a, reply) for a, reply in zip(asked, self._answered(items), strict=True)]

    def judge_many(self, items: Iterable[tuple[Any, ...]]) -> Iterator[AnswerVerdict]:
        """Verdicts on (prediction, gold) or (prediction, gold, kind), in order."""
        together = _together((Asked(*item) for item in items), lambda a: len(a.prediction))
        for verdicts in self._pool.map(self.judge_all, together):
            yield from verdicts

    def equivalent(self, a: str, b: str, kind: Kind = "math") -> bool:
        """Whether two extracted answers say the same; False where that cannot be found out in time."""
        return self._same([a], b, kind, [1]) == 0

    def _decided(self, asked: Asked, found: Reply) -> AnswerVerdict:
        """The verdict on a completion whose answer was looked for, by algebra where plain rules have none."""
        if "stage" not in found:
            return _stopped(found, None, "none")
        answer, stage = found["answer"], found["stage"]
        if answer is None:
            return AnswerVerdict(False, "no_answer", None, stage, "no answer found")
        decision = found
        if found["equal"] is None:
            compared = {"do": "compare", "gold": asked.gold, "answer": answer, "parts": found["parts"]}
            decision = self._answered([{**compared, "kind": asked.kind, "tolerance": asked.tolerance}])[0]
        if "equal" not in decision:
            return _stopped(decision, answer, stage)
        kind: VerdictKind = "right" if decision["equal"] else "wrong"
        return AnswerVerdict(decision["equal"], kind, answer, stage, decision["rule"])

    def _answered(self, items: Sequence[Request]) -> list[Reply]:
        """The reply to each item; {"timeout": why} and the like where there is none.

        Where a call fails, its items are asked about one by one: each has the limits for itself, and what one of them
        does to its worker is its own verdict alone.
        """
        replies = list[Reply]()
        for together in _together(items, _characters):
            reply = self._pool.call({"items": together})
            if "replies" in reply:
                replies += reply["replies"]
            elif len(together) == 1:
                replies.append(reply)
            else:
                alone = (self._pool.call({"items": [item]}) for item in together)
                replies += [reply["replies"][0] if "replies" in reply else reply for reply in alone]
        return replies

    def _same(self, others: Sequence[str], answer: str, kind: Kind, left: list[int]) -> int | None:
        """The number of the first of ``others`` that says the same; ``left`` holds how often algebra may be asked."""
        asked = {"answer": answer, "kind": kind}
        for n, plainly in enumerate(self._answered([{"do": "plainly", "gold": other, **asked} for other in others])):
            equal = plainly.get("equal", False)  # what had to be stopped is not equal
            if equal is None and left[0] > 0:
                left[0] -= 1
                compared = {"do": "compare", "gold": others[n], "parts": (), "tolerance": None, "both_ways": True}
                equal = self._answered([{**compared, **asked}])[0].get("equal", False)
            if equal:
                return n
        return None

    def classes(self, answers: Iterable[str | None], kind: Kind = "math") -> list[int | None]:
        """The number of each answer's equivalence class, by first appearance; None where there is no answer.

        Answers are compared with the first of each class, so what is not transitive (0.333333 = 1/3) goes by it. After
        ``MOST_COMPARISONS`` that need the library, which grow with the square of what is distinct, what is not plainly
        equal is taken to be different.
        """
        left = [MOST_COMPARISONS]
        known: dict[str, int] = {}
        first: list[str] = []
        numbers: list[int | None] = []
        for answer in answers:
            if answer is None or not answer.strip():
                numbers.append(None)
                continue
            answer = answer.strip()
            if answer not in known:
                same = self._same(first, answer, kind, left)
                known[answer] = len(first) if same is None else same
                if same is None:
                    first.append(answer)
            numbers.append(known[answer])
        return numbers


def _stopped(reply: Reply, answer: str | None, stage: str) -> AnswerVerdict:
    """The verdict where a worker had none: it took too long, ran out of memory, ended, or the rules raised."""
    if "timeout" in reply or reply.get("memory"):
        return AnswerVerdict(False, "timeout", answer, stage, reply.get("timeout", "ran out of memory"))
    return AnswerVerdict(False, "wrong", answer, stage, reply.get("failed", "no verdict"))


def _characters(item: Request) -> int:
    return sum(len(item.get(name) or "") for name in ("prediction", "gold", "answer"))


def _together(items: Iterable[T], characters: Callable[[T], int]) -> Iterator[list[T]]:
    """The items as they go to a worker together, in order."""
    together, size = list[T](), 0
    for item in items:
        if together and (len(together) == MOST_TOGETHER or size + characters(item) > MOST_CHARACTERS):
            yield together
            together, size = [], 0
        together.append(item)
        size += characters(item)
    if together:
        yield together


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


def judge_answers(asked: Sequence[Asked]) -> list[AnswerVerdict]:
    """The verdicts on some completions, in order. See AnswerJudge.judge_all."""
    return _shared_judge().judge_all(asked)


def verify_answer(prediction: str, gold: str) -> bool:
    """Whether a completion's answer is the gold one. Safe from any thread; takes TIME_LIMIT_S at most, then False."""
    return judge_answer(prediction, gold).passed


def equivalent(a: str, b: str) -> bool:
    """Whether two extracted answers say the same, for counting votes."""
    return _shared_judge().equivalent(a, b)
