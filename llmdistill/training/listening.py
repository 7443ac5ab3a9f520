"""Judges that are services, asked about sequences as they are finished."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from llmdistill.composition.batch import Text
from llmdistill.composition.term import OTHER_TOKENIZER
from llmdistill.teachers.base import Teacher, max_top_k
from llmdistill.teachers.mixture import is_elsewhere
from llmdistill.teachers.prescored import Prescored
from llmdistill.texts import Prompt, Rollout
from llmdistill.training.rounds import RoundTexts


@dataclass(frozen=True)
class Question:
    """What a term asks of one judge about every sequence of its texts."""

    judge: str
    top_k: int  # tokens listed; 0: the sequence's own alone
    context: str


@dataclass(frozen=True)
class AskedAhead:
    """The questions that are there before the student is trained on the answers, by text."""

    questions: Mapping[str, frozenset[Question]]

    def remembering(self, name: str, judge: Teacher) -> Teacher:
        """The judge, which remembers its answers where there are such questions."""
        asked = any(q.judge == name for of_text in self.questions.values() for q in of_text)
        return Prescored(judge) if asked else judge


def asked_ahead(trainer: RoundTexts) -> AskedAhead:
    """What can be asked of services about a text as it was drawn.

    Not of judges in this process, which would compete with the step for it; not about a list that the student chooses,
    or a context that is made of samples, which are there when the step is.
    """
    found: dict[str, set[Question]] = {name: set() for name in trainer.method.texts}
    for term in trainer.method.terms:
        for k, ask in enumerate(term.asks):
            judge = trainer.judges.get(ask.judge)
            if judge is None or not is_elsewhere(judge) or term.hidden is not None:
                continue
            if ask.kind in OTHER_TOKENIZER or ask.context in trainer.context_functions:
                continue
            if ask.kind == "top_k" and (term.support != "teacher" or any(a.kind == "top_k" for a in term.asks[:k])):
                continue  # the second judge is asked about the first one's list
            vocab = judge.info().vocab_size
            if ask.kind == "full" and max_top_k(judge) < vocab:
                continue  # which is refused where it is asked
            listed = {"full": vocab, "top_k": term.top_k, "sampled": 0}[ask.kind]
            for name in term.texts:
                found[name].add(Question(ask.judge, listed, ask.context))
    return AskedAhead({name: frozenset(questions) for name, questions in found.items()})


class Listening:
    """Inside, judges are asked about what is heard, by a thread of its own; it ends when all is answered.

    Raises:
        Exception: what a judge raised.
    """

    def __init__(self, trainer: RoundTexts, judges: Mapping[str, Teacher]) -> None:
        self.trainer, self.judges = trainer, judges
        self.asked = asked_ahead(trainer)
        of_student = (q for name, q in self.asked.questions.items() if "student" in trainer.method.texts[name].uses)
        self._of_student = frozenset().union(*of_student)
        self._heard: SimpleQueue[tuple[Text, frozenset[Question]] | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._ask, name="listening", daemon=True)

    def __enter__(self) -> Listening:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._heard.put(None)
        if error is None:
            self._thread.join()
            if self._error is not None:
                raise self._error

    def hear(self, rollout: Rollout, prompts: Sequence[Prompt]) -> None:
        """Sequences that the student has finished."""
        readable, _ = rollout.within(self.trainer.vocab_size, self.trainer.pad_id)
        self._heard.put((Text(readable, list(prompts)), self._of_student))

    def hear_all(self, texts: Mapping[str, Text]) -> None:
        """The texts of a round: judges are asked about what they have not heard yet."""
        for name, text in texts.items():
            self._heard.put((text, self.asked.questions[name]))

    def _ask(self) -> None:
        t = self.trainer
        try:
            while (heard := self._heard.get()) is not None:
                text, questions = heard
                for q in sorted(questions, key=lambda q: (q.judge, q.top_k, q.context)):
                    rollout = text.view(q.context, t.pad_id).rollout
                    if t.args.rollouts.mask_truncated:
                        rollout = rollout.without_truncated()
                    with t.meters.timed("time/teacher", 0):
                        self.judges[q.judge].score(rollout, q.top_k)
        except BaseException as error:  # raised by the thread that makes the round
            self._error = error
