"""Two evaluations of one suite, problem by problem: is B better than A, by how much, and on what.

    comparison = compare("runs/eval-student", "runs/eval-distilled")
    Console().print(comparison.table())

Differences are B - A. Problems are matched by id and must be the same items: same text, same gold answer. Two intervals
that overlap do not say that two models are alike: both see the same problems, and the paired difference is narrower.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmdistill.errors import UserError
from llmdistill.evals.differing import differing
from llmdistill.evals.metrics import McNemar, mcnemar_exact, paired_bootstrap, paired_permutation
from llmdistill.evals.records import EvalFolder, Problem
from llmdistill.evals.summary import drawn_with

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found. Scores are shares of right samples per problem.

    Attributes:
        a, b: the folders.
        problems: how many both have.
        avg_a, avg_b: mean score over those problems.
        drawn_a, drawn_b: temperature and mean length of each side's samples, in words; "" where results.json is not
            there.
        difference, low, high: mean of B - A and its 95% percentile bootstrap interval over problems.
        p_value: two-sided, of the sign-flip permutation test (valid at any number of problems).
        p_bootstrap: two-sided, of the bootstrap under the null; close to ``p_value`` for many problems.
        mcnemar: the exact test where both have one sample a problem, else None. Its ``only_a`` and ``only_b`` count
            the lists below.
        only_a, only_b: ids that only one of the two solves at least once.
        scores: {id: (score of A, score of B)}.
        notes: what else differs: problems that only one has, settings.
    """

    a: str
    b: str
    problems: int
    avg_a: float
    avg_b: float
    difference: float
    low: float
    high: float
    p_value: float
    p_bootstrap: float
    mcnemar: McNemar | None
    only_a: list[str]
    only_b: list[str]
    scores: dict[str, tuple[float, float]]
    notes: list[str] = field(default_factory=list)
    drawn_a: str = ""
    drawn_b: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def table(self) -> Table:
        """For a rich console."""
        from rich.table import Table
        from rich.text import Text

        table = Table("", "", title=Text(f"A {self.a}\nB {self.b}"), show_header=False)
        rows = [
            ("problems", str(self.problems)),
            ("A", f"{100 * self.avg_a:.1f}" + (f"  ({self.drawn_a})" if self.drawn_a else "")),
            ("B", f"{100 * self.avg_b:.1f}" + (f"  ({self.drawn_b})" if self.drawn_b else "")),
            ("B - A", f"{100 * self.difference:+.1f}  (95% {100 * self.low:+.1f} to {100 * self.high:+.1f})"),
            ("p", f"{self.p_value:.4f} permutation, {self.p_bootstrap:.4f} bootstrap"),
        ]
        if self.mcnemar:
            rows.append(("McNemar", f"p = {self.mcnemar.p_value:.4f}"))
        rows += [
            (f"only A solves ({len(self.only_a)})", _first(self.only_a)),
            (f"only B solves ({len(self.only_b)})", _first(self.only_b)),
            *(("note", note) for note in self.notes),
        ]
        for name, value in rows:
            table.add_row(Text(name), Text(value))
        return table


def compare(folder_a: str | Path, folder_b: str | Path, *, num_resamples: int = 10_000, seed: int = 0) -> Comparison:
    """Compares two graded evaluation folders.

    Args:
        folder_a, folder_b: run folders of one suite (see ``llmdistill.evals.records``).
        num_resamples: of the bootstrap and of the permutation test.
        seed: of both.

    Raises:
        UserError: a folder without grades, other suites, no problem in common, or a problem that is not the same in
            both (text or gold answer differ).
    """
    a, b = EvalFolder(folder_a), EvalFolder(folder_b)
    verdicts_a, verdicts_b = _verdicts(a), _verdicts(b)
    config_a, config_b = a.read_config() or {}, b.read_config() or {}
    if _suite(config_a) != _suite(config_b):
        raise UserError(
            f"{a.path} is suite {_suite(config_a)}, {b.path} is {_suite(config_b)}; both must be of one suite. "
            "Fix: compare suite by suite."
        )
    problems_a, problems_b = {p.id: p for p in a.problems()}, {p.id: p for p in b.problems()}
    shared = [i for i in problems_a if i in problems_b and i in verdicts_a and i in verdicts_b]
    if not shared:
        raise UserError(f"{a.path} and {b.path} have no graded problem in common: are they of the same suite?")
    changed = [i for i in shared if _digest(problems_a[i]) != _digest(problems_b[i])]
    if changed:
        raise UserError(
            f"{len(changed)} of {len(shared)} problems differ between {a.path} and {b.path} in text, gold or tests "
            f"({_first(changed)}): the suite's data has changed. Evaluate both on the same data."
        )
    notes = [
        f"{count} problems only in {folder.path}, left out"
        for folder, count in ((a, len(verdicts_a) - len(shared)), (b, len(verdicts_b) - len(shared)))
        if count
    ]
    notes += _other_settings(config_a, config_b)
    counts = {len(v[i]) for v in (verdicts_a, verdicts_b) for i in shared}
    x = [_mean(verdicts_a[i]) for i in shared]
    y = [_mean(verdicts_b[i]) for i in shared]
    if len(counts) > 1:
        notes.append(f"samples per problem differ: {min(counts)} to {max(counts)}")
    result = paired_bootstrap(y, x, num_resamples=num_resamples, seed=seed)
    return Comparison(
        a=str(a.path),
        b=str(b.path),
        problems=len(shared),
        avg_a=sum(x) / len(x),
        avg_b=sum(y) / len(y),
        difference=result.difference,
        low=result.low,
        high=result.high,
        p_value=paired_permutation(y, x, num_flips=num_resamples, seed=seed),
        p_bootstrap=result.p_value,
        mcnemar=mcnemar_exact([s > 0 for s in x], [s > 0 for s in y]) if counts == {1} else None,
        only_a=[i for i, s, t in zip(shared, x, y, strict=True) if s > 0 and t == 0],
        only_b=[i for i, s, t in zip(shared, x, y, strict=True) if t > 0 and s == 0],
        scores={i: (s, t) for i, s, t in zip(shared, x, y, strict=True)},
        notes=notes,
        drawn_a=_drawn(a),
        drawn_b=_drawn(b),
    )


def matched(folder_a: str | Path, folder_b: str | Path) -> list[tuple[Path, Path]]:
    """The evaluations to compare in two folders that are evaluations or hold some, one for each suite: all suites that
    both have, by name.

    Raises:
        UserError: one of them has no evaluation, or no suite is in both.
    """
    a, b = _suites_in(Path(folder_a)), _suites_in(Path(folder_b))
    for folder, found in ((folder_a, a), (folder_b, b)):
        if not found:
            raise UserError(f"{folder} has no grades.jsonl with verdicts. Fix: a folder of a finished evaluation.")
    if len(a) == len(b) == 1:  # whatever the suites are: what differs is said of the two
        return list(zip(a.values(), b.values(), strict=True))
    if not (shared := sorted(a.keys() & b.keys())):
        raise UserError(
            f"{folder_a} holds {', '.join(sorted(a))}, {folder_b} {', '.join(sorted(b))}: no suite is in both. "
            "Fix: evaluations of one suite."
        )
    return [(a[suite], b[suite]) for suite in shared]


def _suites_in(folder: Path) -> dict[str, Path]:
    """Suite -> folder of its evaluation: the folder itself, or those within it."""
    whole = folder.glob("*/grades.jsonl") if not (folder / "grades.jsonl").is_file() else [folder / "grades.jsonl"]
    return {_suite(EvalFolder(file.parent).read_config() or {}): file.parent for file in sorted(whole)}


def _verdicts(folder: EvalFolder) -> dict[str, list[bool]]:
    found: dict[str, dict[int, bool]] = defaultdict(dict)
    grades = folder.grades()
    for problem in grades.problems():
        found[problem] = {grade.index: grade.passed for grade in grades.of(problem)}
    if not found:
        below = sorted(file.parent.name for file in folder.path.glob("*/grades.jsonl"))
        raise UserError(
            f"{folder.path} holds the evaluations {', '.join(below)}; one suite is compared at a time. "
            f"Fix: {folder.path / below[0]}."
            if below
            else f"{folder.path} has no grades.jsonl with verdicts. Fix: a folder of a finished evaluation."
        )
    return {problem: list(verdicts.values()) for problem, verdicts in found.items()}


def _suite(config: Mapping[str, Any]) -> str:
    """The suite's name; whether its data is the same is read off the problems themselves."""
    suite = config.get("suite")
    return str(suite.get("name") if isinstance(suite, Mapping) else suite)


def _digest(problem: Problem) -> str:
    """Of what is asked and what counts as right; the groups do not matter."""
    parts = [problem.question, problem.kind, problem.gold, problem.tests]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _other_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What else may explain a difference: every setting on record that is not the model itself, field by field.

    The hash of prompts is of token ids: two tokenizers make two of one text. What makes other texts (template, data) is
    on record by itself.
    """
    told = {"model", "weights", "suite", "prompts"}
    left = [{key: value for key, value in settings.items() if key not in told} for settings in (a, b)]
    return [f"{key} differs: {first} and {second}" for key, first, second in differing(*left)]


def _drawn(folder: EvalFolder) -> str:
    results = folder.read_results()
    return drawn_with(results) if results.get("sampling") and results.get("lengths") else ""


def _mean(verdicts: list[bool]) -> float:
    return sum(verdicts) / len(verdicts)


def _first(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
