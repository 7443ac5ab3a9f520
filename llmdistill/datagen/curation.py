"""Traces in, the traces worth training on out: rules one after the other, with what each of them took.

    curate("verified.jsonl", "curated.jsonl",
           steps=["finished", "no_loops", {"tokens": {"most": 16384}}, {"pass_rate": {"most": 0.75}}, "right",
                  {"near_duplicates": {"of": "prompt"}}, {"diverse": {"k": 4}}])

The order is the recipe's: a band of pass rates must be asked before the wrong traces go. Rows are never in memory
together; what a rule must remember of them is (a hash, a count, for ``diverse`` the texts of a prompt).
"""

from __future__ import annotations

import inspect
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np

from llmdistill.datagen import rules, rules_over_rows
from llmdistill.datagen.steps import Paths, Step, run_step
from llmdistill.datagen.tables import MOST_REJECTED, Row
from llmdistill.errors import UserError
from llmdistill.record.manifest import Manifest

Rule = Callable[..., Any]
Asked = tuple[str, Rule, dict[str, Any]]
COLUMNS = ("prompt", "completion")


def curate(
    src: Paths,
    out: str | Path,
    *,
    steps: Sequence[str | Mapping[str, Any]],
    max_rejected: float = MOST_REJECTED,
) -> Manifest:
    """Writes the rows that all rules let pass, in order.

    Args:
        src: traces (``llmdistill.datagen.schema``), or any rows with prompt and completion.
        out: .jsonl, .jsonl.gz or .parquet.
        steps: the rules: names of ``llmdistill.datagen.rules`` and ``rules_over_rows``, or "package.module:function"
            for one of your own that looks at one row; with settings as {name: {setting: value}}.
        max_rejected: the largest share of rows without prompt or completion.

    Returns:
        The manifest; ``lost`` has the number of rows by reason, ``details["rules"]`` by rule, in order.

    Raises:
        UserError: a rule that is not there, a setting it does not have or out of range, a row that a rule cannot judge.
    """
    asked = [read_rule(step) for step in steps]
    if not asked:
        raise UserError("curate was given no rules. Fix: steps: [finished, no_loops, ...].")

    def work(step: Step) -> None:
        _Curation(step).run(asked)

    said = {"steps": [{name: settings} for name, _, settings in asked]}
    return run_step("curate", work, src=src, out=out, settings=said, max_rejected=max_rejected)


class _Curation:
    """The rules at work: a mask over the rows of the inputs, and passes over those that are left."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.read = False
        self.gone = np.zeros(0, bool)  # [rows], once they were read
        self.took: list[dict[str, Any]] = []

    def run(self, asked: Sequence[Asked]) -> None:
        rest = list(asked)
        while rest:
            alone = list(takewhile(lambda rule: not _over_rows(rule), rest))
            if alone:
                self._look(alone)
            else:
                self._compare(*rest[0])
            rest = rest[max(len(alone), 1) :]
        self.step.details["rules"] = self.took
        self.step.write(row for _, row in self.rows())

    def rows(self) -> Iterator[tuple[int, Row]]:
        """(number, row) of those that are left. The first time rows are counted, and rejects written."""
        if self.read:
            yield from ((number, row) for number, row in enumerate(self.step.again(COLUMNS)) if not self.gone[number])
            return
        number = -1
        for number, row in enumerate(self.step.rows(COLUMNS)):
            yield number, row
        self.read, self.gone = True, np.zeros(number + 1, bool)

    def _look(self, asked: Sequence[Asked]) -> None:
        """Rules that look at one row each, in one pass."""
        lost, numbers = [Counter[str]() for _ in asked], list[int]()
        for number, row in self.rows():
            for (name, rule, settings), mine in zip(asked, lost, strict=True):
                try:
                    reason = rule(row, **settings)
                except (ValueError, ImportError) as error:
                    raise UserError(f"rule {name}, row {number + 1}: {error}.") from error
                if reason is not None:
                    mine[reason] += 1
                    numbers.append(number)
                    break
        self._take([name for name, _, _ in asked], lost, numbers)

    def _compare(self, name: str, rule: Rule, settings: Mapping[str, Any]) -> None:
        """A rule that needs all rows."""
        lost, numbers = Counter[str](), list[int]()
        if not self.read:
            deque(self.rows(), maxlen=0)
        try:
            for number, reason in rule(self.rows, **settings):
                lost[reason] += 1
                numbers.append(number)
        except (ValueError, ImportError) as error:
            raise UserError(f"rule {name}: {error}.") from error
        self._take([name], [lost], numbers)

    def _take(self, names: Sequence[str], lost: Sequence[Counter[str]], numbers: Sequence[int]) -> None:
        left = int((~self.gone).sum())
        self.gone[np.array(numbers, int)] = True
        for name, mine in zip(names, lost, strict=True):
            left -= mine.total()
            self.took.append({"rule": name, "lost": dict(mine), "left": left})
            for reason, count in mine.items():
                self.step.lose(reason, count)


def read_rule(step: str | Mapping[str, Any]) -> Asked:
    """Name, function and settings of a rule as a recipe writes it."""
    if isinstance(step, Mapping):
        if len(step) != 1:
            raise UserError(f"a rule is a name, or one name with its settings; this one is {dict(step)!r}.")
        ((name, given),) = step.items()
    else:
        name, given = step, {}
    settings = dict(given or {}) if isinstance(given, Mapping) or given is None else None
    if settings is None:
        raise UserError(f"the settings of rule {name} are {given!r}. Fix: {{setting: value}}.")
    rule = _found(name)
    own = list(inspect.signature(rule).parameters.values())[1:]
    known = [p.name for p in own]
    if unknown := [key for key in settings if key not in known]:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise UserError(f"rule {name} has no setting {unknown[0]!r}; {has}.")
    if missing := [p.name for p in own if p.default is p.empty and p.name not in settings]:
        raise UserError(f"rule {name} needs a value for {missing[0]}. Fix: {name}: {{{missing[0]}: ...}}.")
    return name, rule, settings


def _found(name: str) -> Rule:
    if ":" in name:
        module, _, function = name.partition(":")
        try:
            return _callable(getattr(import_module(module), function), name)
        except (ImportError, AttributeError) as error:
            raise UserError(f"there is no rule {name}: {error}. Fix: package.module:function.") from error
    for module_ in (rules, rules_over_rows):
        if name in names(module_):
            return _callable(getattr(module_, name), name)
    known = ", ".join([*names(rules), *names(rules_over_rows)])
    raise UserError(f"there is no rule {name!r}; there are {known}. Fix: one of them, or package.module:function.")


def names(module: ModuleType) -> list[str]:
    """The rules that a module of rules holds."""
    return [
        n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__ and n[0] != "_"
    ]


def _callable(found: Any, name: str) -> Rule:
    if not callable(found):
        raise UserError(f"rule {name} is a {type(found).__name__}, no function. Fix: package.module:function.")
    return cast(Rule, found)


def _over_rows(asked: Asked) -> bool:
    return asked[1].__module__ == rules_over_rows.__name__
