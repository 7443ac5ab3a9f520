"""Benchmark problems in training data.

    llmdistill contamination --train train.jsonl traces.parquet --suite math500 aime24 --out contamination.json

A problem is hit by a training row that has 13 of its words in a row (the n-gram length of the GPT-3 report, Brown et
al. 2020, arXiv:2005.14165, appendix C). What a word is, and which differences of spelling do not matter, is told in
``llmdistill.evals.ngrams``. Three rules besides:

- A problem of fewer than n words is hit by its whole word sequence, if the signs + - / = < > ^ within it agree too:
  "compute 2 + 3" is not "compute 2 - 3". Problems of fewer than 4 words are not checked, and listed.
- n-grams in more than 10 different problems are the suite's boilerplate and no evidence by themselves.
- Only the question is looked for, not the gold answer or the solution.

Paraphrases, translations and the same exercise with other numbers are not found. A hit is a copy of words, not yet of a
problem: ``best`` says how much of the problem one single row holds.

Memory is the benchmark's index and a few batches of rows, whatever the size of the training data.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmdistill.errors import UserError
from llmdistill.evals.ngrams import Index, Match, batches
from llmdistill.evals.records import Problem
from llmdistill.evals.training_rows import TrainingFiles, row_text
from llmdistill.files import atomic_write
from llmdistill.options import OptionParser

if TYPE_CHECKING:
    from rich.table import Table

Problems = Iterable[Problem] | Mapping[str, Iterable[Problem]]
Row = TypeVar("Row", bound=Mapping[str, Any])

_EXAMPLES = 5


@dataclass(frozen=True)
class Hit:
    """A problem that occurs in the training data.

    Attributes:
        problem, suite: which; suite is "" where problems came without one.
        words: of the question.
        rows: how many training rows share an n-gram with it; ``examples`` are the ids of the first ones.
        exact_rows: how many of them hold the whole question, word for word.
        coverage: share of the question's n-grams that occur anywhere in the training data.
        best: the largest share of them in one row, and ``best_row`` its id. 1 for questions shorter than n words.
        longest: words of the longest run in a row.
    """

    problem: str
    suite: str
    words: int
    rows: int
    exact_rows: int
    examples: list[str]
    coverage: float
    best: float
    best_row: str
    longest: int


@dataclass(frozen=True)
class Report:
    """What :func:`check` found.

    Attributes:
        n: words in a row that count.
        documents: training rows looked at.
        seconds: wall time.
        problems: how many there are, by suite.
        unchecked: ids of problems too short to tell.
        boilerplate: number of n-grams set aside because more than ten problems share them.
        hits: the problems found, those with the most in a single row first.
    """

    n: int
    documents: int
    seconds: float
    problems: dict[str, int]
    unchecked: list[str]
    boilerplate: int
    hits: list[Hit]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"format": 1, **asdict(self), "suites": self.by_suite()}

    def by_suite(self) -> dict[str, dict[str, int]]:
        """{suite: {problems, hit: any n-gram, half: at least half in one row, exact: the whole question}}."""
        return {
            suite: {
                "problems": count,
                "hit": len(mine := [h for h in self.hits if h.suite == suite]),
                "half": sum(h.best >= 0.5 for h in mine),
                "exact": sum(h.exact_rows > 0 for h in mine),
            }
            for suite, count in self.problems.items()
        }

    def table(self) -> Table:
        """For a rich console: how much of each suite was found."""
        from rich.table import Table
        from rich.text import Text

        title = f"{self.documents:,} training rows against {sum(self.problems.values()):,} problems"
        table = Table("suite", "problems", f"any {self.n}-gram", "half in one row", "whole question", title=title)
        for suite, counts in self.by_suite().items():
            shares = [f"{v} ({v / max(counts['problems'], 1):.1%})" for v in list(counts.values())[1:]]
            table.add_row(Text(suite), str(counts["problems"]), *shares)
        return table

    def hit_table(self, most: int = 20) -> Table:
        """For a rich console: the ``most`` problems of which one row holds most."""
        from rich.table import Table
        from rich.text import Text

        more = f", the first {most} of {len(self.hits)}" if len(self.hits) > most else ""
        table = Table("problem", "rows", "most in row", "share", "longest run", title=f"problems found{more}")
        for hit in self.hits[:most]:
            run = "whole question" if hit.exact_rows else f"{hit.longest} of {hit.words} words"
            table.add_row(Text(hit.problem), str(hit.rows), Text(hit.best_row), f"{hit.best:.0%}", run)
        for column in table.columns[::2]:
            column.overflow = "fold"  # ids are for copying
        return table


def check(
    train: Iterable[tuple[str, str]],
    problems: Problems,
    *,
    n: int = 13,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Looks for problems in training documents.

    Args:
        train: (id, text) of each row; see ``llmdistill.evals.training_rows`` for files and datasets. Read once.
        problems: the benchmark's, or several by the name of their suite.
        n: words in a row that count as a match.
        workers: processes that search; with 1 it is this one. More of them are spawned while this one reads, and a
            script that asks for them needs the usual ``if __name__ == "__main__"``.
        progress: called with the number of rows done, after each batch.

    Raises:
        ValueError: no problems, or n < 2.
    """
    start = time.perf_counter()
    by_suite = _by_suite(problems)
    known = [(suite, p) for suite, ps in by_suite.items() for p in ps]
    if not known:
        raise ValueError("no problems to look for")
    index = Index([p.question for _, p in known], n)
    tally = _Tally(index)
    for ids, matches in _searched(batches(train, lambda d: d[1]), index, workers):
        tally.add(ids, matches)
        if progress:
            progress(tally.documents)
    return Report(
        n=n,
        documents=tally.documents,
        seconds=time.perf_counter() - start,
        problems={suite: len(ps) for suite, ps in by_suite.items()},
        unchecked=[known[i][1].id for i in index.unchecked],
        boilerplate=index.boilerplate,
        hits=tally.hits(known),
    )


def filter_contaminated(
    rows: Iterable[Row],
    problems: Problems,
    *,
    columns: Sequence[str] | None = None,
    n: int = 13,
    least: float = 0.0,
    dropped: Callable[[Row, list[str]], None] | None = None,
) -> Iterator[Row]:
    """The rows that hold no problem, in order, as a stream.

    Args:
        rows: of a dataset.
        problems: as :func:`check`.
        columns: where their text is; all string columns when None.
        n: words in a row that count as a match.
        least: a row is dropped if it holds at least this share of a problem's n-grams; any n-gram will do by default.
        dropped: called with each row that is left out and the ids of the problems in it.

    Raises:
        ValueError: no problems, n < 2, or ``least`` outside [0, 1].
    """
    if not 0 <= least <= 1:
        raise ValueError(f"least is {least}; it must be in [0, 1]")
    known = [p for ps in _by_suite(problems).values() for p in ps]
    index = Index([p.question for p in known], n)
    for batch in batches(((row, row_text(row, columns)) for row in rows), lambda pair: pair[1]):
        found: dict[int, list[str]] = defaultdict(list)
        for (document, text), grams in _grams(index, index.search([text for _, text in batch])).items():
            if len(grams) >= least * _count(index, text):
                found[document].append(known[text].id)
        for i, (row, _) in enumerate(batch):
            if i not in found:
                yield row
            elif dropped:
                dropped(row, found[i])


class _Tally:
    """What was found so far, by problem."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.documents = 0
        self.rows: dict[int, int] = defaultdict(int)
        self.exact: dict[int, int] = defaultdict(int)
        self.longest: dict[int, int] = defaultdict(int)
        self.best: dict[int, tuple[int, str]] = defaultdict(lambda: (0, ""))
        self.examples: dict[int, list[str]] = defaultdict(list)
        self.covered: dict[int, set[int]] = defaultdict(set)

    def add(self, ids: Sequence[str], matches: Sequence[Match]) -> None:
        self.documents += len(ids)
        whole = {(m.document, m.text) for m in matches if m.length == self.index.lengths[m.text]}
        for m in matches:
            self.longest[m.text] = max(self.longest[m.text], m.length)
        for (document, text), grams in _grams(self.index, matches).items():
            self.rows[text] += 1
            self.exact[text] += (document, text) in whole
            self.covered[text] |= grams
            if len(grams) > self.best[text][0]:
                self.best[text] = (len(grams), ids[document])
            if len(self.examples[text]) < _EXAMPLES:
                self.examples[text].append(ids[document])

    def hits(self, known: Sequence[tuple[str, Problem]]) -> list[Hit]:
        found = [
            Hit(
                problem=known[t][1].id,
                suite=known[t][0],
                words=int(self.index.lengths[t]),
                rows=self.rows[t],
                exact_rows=self.exact[t],
                examples=self.examples[t],
                coverage=len(self.covered[t]) / _count(self.index, t),
                best=self.best[t][0] / _count(self.index, t),
                best_row=self.best[t][1],
                longest=self.longest[t],
            )
            for t in sorted(self.rows)
        ]
        return sorted(found, key=lambda hit: (-hit.best, -hit.longest))


def _count(index: Index, text: int) -> int:
    """n-grams of a text; one, the whole, where it is shorter."""
    return max(int(index.lengths[text]) - index.n + 1, 1)


def _grams(index: Index, matches: Iterable[Match]) -> dict[tuple[int, int], set[int]]:
    """Which n-grams (by their first word) of which text are in which document."""
    found: dict[tuple[int, int], set[int]] = defaultdict(set)
    for m in matches:
        found[m.document, m.text].update(range(m.start, m.start + max(m.length - index.n + 1, 1)))
    return found


def _by_suite(problems: Problems) -> dict[str, list[Problem]]:
    if isinstance(problems, Mapping):
        return {suite: list(ps) for suite, ps in problems.items()}
    return {"": list(problems)}


def _searched(
    batches: Iterator[list[tuple[str, str]]], index: Index, workers: int
) -> Iterator[tuple[list[str], list[Match]]]:
    """Ids and matches of each batch, in order. No more than a few batches a worker are under way."""
    if workers <= 1:
        for batch in batches:
            yield [i for i, _ in batch], index.search([text for _, text in batch])
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _receive, (index,)) as pool:
        waiting: deque[tuple[list[str], Future[list[Match]]]] = deque()
        for batch in batches:
            waiting.append(([i for i, _ in batch], pool.submit(_search, [text for _, text in batch])))
            if len(waiting) > 3 * workers:
                ids, future = waiting.popleft()
                yield ids, future.result()
        for ids, future in waiting:
            yield ids, future.result()


_index: Index  # of a worker process


def _receive(index: Index) -> None:
    global _index
    _index = index


def _search(texts: list[str]) -> list[Match]:
    return _index.search(texts)


def read_problems(file: str | Path) -> list[Problem]:
    """Problems of a JSON Lines file with "id" and one of "question", "problem" or "prompt".

    Raises:
        UserError: no such file, or a line without text.
    """
    problems = []
    for number, (identity, question) in enumerate(_questions(Path(file)), 1):
        problems.append(Problem(identity or f"{Path(file).name}:{number}", question, "math"))
    return problems


def _questions(file: Path) -> Iterator[tuple[str, str]]:
    if not file.is_file():
        raise UserError(f"--suite {file}: no such file")
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            text = next((row[key] for key in ("question", "problem", "prompt") if isinstance(row.get(key), str)), None)
            if text is None:
                raise UserError(f"{file} line {number} has none of the columns question, problem, prompt")
            yield str(row.get("id") or ""), text


def main(argv: Sequence[str] | None = None) -> int:
    """``llmdistill contamination``. Returns 0, or 3 with ``--fail`` if a whole question is in the training data.

    Raises:
        UserError: a file or suite that is not there, or of no known kind.
    """
    words = _parser().parse_args(argv)
    problems = {Path(name).name.split(".")[0]: list(suite_problems(name)) for name in words.suite}
    files = TrainingFiles(words.train, words.column or None)
    train: Iterable[tuple[str, str]] = islice(files, words.limit)
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True, markup=False)) as bar:
        task = bar.add_task("reading", total=files.total)
        start = time.perf_counter()

        def show(rows: int) -> None:
            rate = rows / max(time.perf_counter() - start, 1e-9)
            bar.update(task, completed=files.done, description=f"{rows:,} rows, {rate:,.0f}/s")

        report = check(train, problems, n=words.n, workers=words.workers, progress=show)
    if words.out:
        atomic_write(words.out, json.dumps(report.to_dict(), indent=1, ensure_ascii=False) + "\n")
    Console(markup=False).print(report.table())
    if report.hits and words.show:
        Console(markup=False).print(report.hit_table(words.show))
    if report.unchecked:
        Console(markup=False).print(f"too short to check: {', '.join(report.unchecked)}", markup=False)
    return 3 if words.fail and any(hit.exact_rows for hit in report.hits) else 0


def suite_problems(name: str) -> Iterable[Problem]:
    """The problems of a suite, or of a .jsonl file as :func:`read_problems` reads it.

    Raises:
        UserError: no such suite or file, or data that cannot be had.
    """
    if name.endswith((".jsonl", ".jsonl.gz")):
        return read_problems(name)
    from llmdistill.evals.suite import load_problems, load_suite

    return load_problems(load_suite(name))


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(
        prog="llmdistill contamination",
        description="Which benchmark problems are in the training data: the same words in a row.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--train", nargs="+", required=True, metavar="FILE", help=".jsonl, .jsonl.gz, .json, .parquet, saved dataset")
    add("--suite", nargs="+", required=True, metavar="SUITE", help="suites, or .jsonl[.gz] files of problems")
    add("--column", nargs="+", metavar="NAME", help="columns of the training rows to read [all with text]")
    add("--n", type=int, default=13, help="words in a row that count as a match [13]")
    add("--workers", type=int, default=1, help="processes that search [1: this one, some 25,000 rows a second]")
    add("--limit", type=int, metavar="ROWS", help="look at the first ROWS training rows only")
    add("--show", type=int, default=20, metavar="N", help="problems to list, worst first [20]")
    add("--out", metavar="FILE", help="write all findings as JSON")
    add("--fail", action="store_true", help="exit status 3 if a whole question is in the training data")
    return parser
