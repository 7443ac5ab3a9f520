"""What is wrong with a suite as a rule and may be meant: said before anything is drawn, and drawn all the same."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from llmdistill.evals.readers import COLUMNS, Row
from llmdistill.evals.records import Kind, Problem

OPTIONS = ("choices", "options")  # fields of rows in which benchmarks keep what there is to choose from
_LETTER = re.compile(r"\W*[A-Za-z](\W+[A-Za-z])*\W*")  # or several


class Doubts:
    """Collects while rows are read what :meth:`of` needs to know of them.

    Args:
        kind, reader, columns, groups: of the suite.
    """

    def __init__(self, kind: Kind, reader: str, columns: Mapping[str, str], groups: Sequence[str]) -> None:
        self.kind, self.reader, self.columns, self.groups = kind, reader, columns, groups
        self.fields: dict[str, None] = {}  # that any row has, in order
        self.hidden = 0  # rows with options that their question does not show

    def seen(self, row: Row, problem: Problem) -> None:
        """A row and what became of it."""
        self.fields |= dict.fromkeys(row.values)
        for name in OPTIONS if self.kind == "choice" else ():
            listed = row.values.get(name)
            if isinstance(listed, (list, tuple)) and any(str(one) not in problem.question for one in listed):
                self.hidden += 1

    def of(self, problems: Sequence[Problem]) -> list[str]:
        """A sentence for each doubt."""
        return [*self._columns(problems), *self._choices(problems), *self._duplicates(problems)]

    def _columns(self, problems: Sequence[Problem]) -> Iterable[str]:
        known = [*COLUMNS[self.reader], *self.groups]
        there = f"(they have {', '.join(self.fields)})"
        for name, column in self.columns.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it reads {', '.join(known)}."
                yield f"columns has {name!r}, which the reader {self.reader} does not read; {hint}"
            elif name not in self.groups and column not in self.fields:
                yield f"columns.{name} is {column!r}, and no row has such a field {there}."
        for group in self.groups:
            if not any(group in problem.groups for problem in problems):
                yield f"groups has {group!r}, and no row has anything in {self.columns.get(group, group)!r} {there}."

    def _choices(self, problems: Sequence[Problem]) -> Iterable[str]:
        if self.kind != "choice":
            return
        if self.hidden:
            yield (
                f"{self.hidden} of {len(problems)} rows have options in a field of their own that the question does "
                "not show, so the model never reads them. Fix: write them into the question, as 'A) ...'."
            )
        wrong = [p for p in problems if not _LETTER.fullmatch(p.gold or "")]
        if wrong:
            yield (
                f"kind is choice, and the answer of {len(wrong)} of {len(problems)} problems is no letter "
                f"({wrong[0].id!r}: {wrong[0].gold!r}): no option letter is right there. Fix: the letter of the right "
                "option, or kind math."
            )

    def _duplicates(self, problems: Sequence[Problem]) -> Iterable[str]:
        first: dict[str, str] = {}
        twice = [
            (first[words], problem.id)
            for problem in problems
            if first.setdefault(words := " ".join(problem.question.split()), problem.id) != problem.id
        ]
        if twice:
            a, b = twice[0]
            yield (
                f"{len(twice)} of {len(problems)} problems ask what another one asks ({b!r} as {a!r}): each counts, "
                "and the intervals take them for independent."
            )
