"""A suite: which problems, how they are asked, how they are judged. Read from YAML; the data from a folder or the hub.

    suite: my_suite
    kind: math                        # math | choice | code
    data: {file: my_suite.jsonl}      # beside this file; or hub: {path: ORG/NAME, split: test}
    columns: {id: id, question: problem, answer: answer}
    groups: [subject, level]          # columns to break the score down by
    template: boxed                   # a name, or {user: "...{question}...", system: ...}
    few_shot: my_examples.jsonl       # solved examples before every question (llmdistill.evals.examples)
    sampling: {n: 4, temperature: 0.6, top_p: 0.95, max_new_tokens: 4096}
    pass_at: [1, 4]
    maj_at: [4]

A row of the data is one JSON object. ``question`` and, but for code, ``answer`` are text; a row of kind ``code`` has an
object ``tests``, which :func:`llmdistill.verify.code.judge_program` describes.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import os
import random
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml

from llmdistill.errors import UserError
from llmdistill.evals.doubts import Doubts
from llmdistill.evals.readers import READERS, Row
from llmdistill.evals.records import Kind, Problem
from llmdistill.evals.templates import Template, find_template

DATA_ENV = "LLMDISTILL_DATA"  # folder with the benchmarks' files, instead of the hub
SAMPLING = {"n": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 2048}


@dataclass(frozen=True)
class Suite:
    """A suite as its file says it. ``folder`` is where that file lies; a relative ``file`` is looked for there."""

    name: str
    kind: Kind
    template: Template
    file: str = ""
    hub: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    reader: str = "rows"
    sampling: dict[str, Any] = field(default_factory=dict)
    pass_at: tuple[int, ...] = (1,)
    maj_at: tuple[int, ...] = ()
    folder: Path = Path(".")
    few_shot: str = ""


def load_suite(given: str | Path) -> Suite:
    """Reads a suite's YAML. A bare name (``math500``) is a suite that comes with the package.

    Raises:
        UserError: no such file, an unknown key, a value of the wrong kind; the file and key are named.
    """
    file = _find(given)
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"suite {str(file)!r} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise UserError(f"suite {str(file)!r} is no mapping of keys to values. Fix: begin with 'suite: NAME'.")
    allowed = {
        *("suite", "about", "kind", "data", "columns", "groups", "reader", "template", "sampling"),
        *("pass_at", "maj_at", "few_shot"),
    }
    _only(values, allowed, file, "")
    for key in ("suite", "kind", "data"):
        if not values.get(key):
            raise UserError(f"{file}: {key} is missing; every suite needs suite, kind and data.")
    name = str(values["suite"])
    if not re.fullmatch(r"\w[\w.+-]*", name):  # it becomes a folder of results
        raise UserError(f"{file}: suite is {name!r}; it must be one word of letters, digits and _ . + -.")
    if values["kind"] not in get_args(Kind):
        raise UserError(f"{file}: kind is {values['kind']!r}; it must be one of {', '.join(get_args(Kind))}.")
    reader = values.get("reader", "rows")
    if reader not in READERS:
        raise UserError(f"{file}: reader is {reader!r}; it must be one of {', '.join(READERS)}.")
    data, sampling, columns = values["data"], values.get("sampling") or {}, values.get("columns") or {}
    _only(data, {"file", "hub"}, file, "data.")
    _only(data.get("hub") or {}, {"path", "name", "split", "columns", "reader"}, file, "data.hub.")
    if (hub := data.get("hub")) and not isinstance(hub.get("path"), str):
        raise UserError(f"{file}: data.hub.path is {hub.get('path')!r}; it must be the dataset's name on the hub.")
    _only(sampling, set(SAMPLING), file, "sampling.")
    for key, value in sampling.items():
        _check_number(key, value, file)
    groups = values.get("groups") or []
    for key, value in (("columns", list(columns)), ("groups", groups)):
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise UserError(f"{file}: {key} is {values[key]!r}; it must be {'a list' if key == 'groups' else 'names'}.")
    if not isinstance(columns, Mapping):
        raise UserError(f"{file}: columns is {columns!r}; it must be a mapping of fields to columns.")
    few_shot = values.get("few_shot") or ""
    if not isinstance(few_shot, str):
        raise UserError(f"{file}: few_shot is {few_shot!r}; it must be the name of a file of solved examples.")
    return Suite(
        name=name,
        kind=values["kind"],
        template=find_template(values.get("template", "plain" if values["kind"] == "code" else "boxed")),
        file=data.get("file", ""),
        hub=dict(data.get("hub") or {}),
        columns=dict(columns),
        groups=tuple(groups),
        reader=reader,
        sampling=dict(sampling),
        pass_at=_counts(values, "pass_at", file) or (1,),
        maj_at=_counts(values, "maj_at", file),
        folder=file.parent,
        few_shot=few_shot,
    )


def load_problems(suite: Suite, data_dir: str | Path | None = None) -> list[Problem]:
    """All problems of a suite, from ``data_dir`` (default: the folder ``LLMDISTILL_DATA`` names), or from the hub.

    Warns of what is a mistake as a rule (:mod:`llmdistill.evals.doubts`).

    Raises:
        UserError: the data is not there, or a row lacks a field: file, line and field are named.
    """
    folder = data_dir or os.environ.get(DATA_ENV) or None
    columns, reader = suite.columns, suite.reader
    if (file := _data_file(suite, folder)) is not None:
        rows = rows_of(file)
    else:
        rows = _hub_rows(suite)
        columns = suite.hub.get("columns", columns)
        reader = suite.hub.get("reader", reader)
    problems, doubts = [], Doubts(suite.kind, reader, columns, suite.groups)
    for row in rows:
        problems.append(READERS[reader](row, suite.kind, columns, suite.groups))
        doubts.seen(row, problems[-1])
    if not problems:
        raise UserError(f"suite {suite.name!r} has no problems: {file or suite.hub['path']} is empty.")
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise UserError(f"suite {suite.name!r} has two problems with the id {problem.id!r}. Fix: make ids unique.")
        seen.add(problem.id)
    for doubt in doubts.of(problems):
        warnings.warn(f"suite {suite.name!r}: {doubt}", stacklevel=2)
    return problems


def subsample(problems: list[Problem], limit: int, seed: int = 0) -> list[Problem]:
    """``limit`` problems drawn at random (the first ones of a benchmark are often the easy ones), in suite order. A
    larger limit draws the same ones and more."""
    if not 0 < limit < len(problems):
        return problems
    generator, picked = random.Random(seed), set[int]()
    while len(picked) < limit:  # sample() of random draws otherwise for a small share than for a large one
        picked.add(generator.randrange(len(problems)))
    return [problems[i] for i in sorted(picked)]


def data_hash(problems: list[Problem]) -> str:
    """Of all ids, questions, answers and tests: equal hashes, equal problems."""
    text = json.dumps([asdict(p) for p in problems], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def bundled_suites() -> dict[str, Path]:
    """Name -> file of the suites that come with the package (in a checkout: the folder ``eval``)."""
    here = Path(__file__).resolve()
    for folder in (here.parent / "suites", here.parents[2] / "eval"):
        if found := {file.stem: file for file in sorted(folder.glob("*.yaml"))}:
            return found
    return {}


def _find(given: str | Path) -> Path:
    if (file := Path(given)).is_file():
        return file
    bundled = bundled_suites()
    if str(given) in bundled:
        return bundled[str(given)]
    near = difflib.get_close_matches(str(given), bundled, n=1)
    raise UserError(
        f"suite {str(given)!r} is neither a file nor one of {', '.join(bundled) or 'none bundled'}."
        + (f" Fix: {near[0]}." if near else "")
    )


def _only(values: Any, allowed: set[str], file: Path, prefix: str) -> None:
    if not isinstance(values, Mapping):
        raise UserError(f"{file}: {prefix.rstrip('.')} is {values!r}; it must be a mapping.")
    if unknown := sorted(set(values) - allowed):
        raise UserError(f"{file}: unknown key {prefix}{unknown[0]}; known are {', '.join(sorted(allowed))}.")


def _check_number(key: str, value: Any, file: Path) -> None:
    whole = key in ("n", "top_k", "max_new_tokens")
    good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    lowest = 1 if key in ("n", "max_new_tokens") else 0
    if not good or not lowest <= value < float("inf") or (key == "top_p" and not 0 < value <= 1):
        needed = "in (0, 1]" if key == "top_p" else f"a {'whole ' if whole else ''}number from {lowest}"
        raise UserError(f"{file}: sampling.{key} is {value!r}; it must be {needed}.")


def _counts(values: Mapping[str, Any], key: str, file: Path) -> tuple[int, ...]:
    given = values.get(key) or []
    if not isinstance(given, list) or any(not isinstance(k, int) or k < 1 for k in given):
        raise UserError(f"{file}: {key} is {given!r}; it must be a list of whole numbers from 1.")
    return tuple(given)


def _data_file(suite: Suite, folder: str | Path | None) -> Path | None:
    if not suite.file:
        return None
    beside = suite.folder / suite.file
    if beside.is_file():
        return beside
    if folder is not None:
        for place in (Path(folder), Path(folder) / "benchmarks"):
            for name in (suite.file, f"{suite.file}.gz", suite.file.removesuffix(".gz")):
                if (place / name).is_file():
                    return place / name
    if not suite.hub:
        raise UserError(
            f"suite {suite.name!r}: its data {suite.file!r} is not in {folder or suite.folder}, and it names no hub "
            f"dataset. Fix: --data_dir FOLDER or {DATA_ENV}=FOLDER with that file."
        )
    if folder is not None:
        raise UserError(
            f"suite {suite.name!r}: {suite.file!r} is not in the data folder {str(folder)!r}. Fix: put it there, or "
            f"leave --data_dir and {DATA_ENV} out to read {suite.hub['path']} from the hub."
        )
    return None


def rows_of(file: Path) -> Iterator[Row]:
    """The rows of a JSONL file, packed or not. Raises :class:`UserError` that names the line."""
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file.name} line {number}"
            try:
                value = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:  # a line that is not UTF-8 is one too
                raise UserError(f"{where} is not JSON: {error}. Fix: one JSON object a line.") from error
            if not isinstance(value, dict):
                raise UserError(f"{where} is {type(value).__name__}, not an object. Fix: one JSON object a line.")
            yield Row(value, where, number - 1)


def _hub_rows(suite: Suite) -> Iterator[Row]:
    from datasets import load_dataset

    hub = suite.hub
    try:
        rows = load_dataset(hub["path"], hub.get("name"), split=hub.get("split", "test"))
    except Exception as error:  # datasets raises whatever its readers raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"suite {suite.name!r}: {hub['path']} cannot be loaded: {reason}. "
            f"Fix: --data_dir FOLDER (or {DATA_ENV}) with {suite.file!r}."
        ) from error
    for number, value in enumerate(rows):
        yield Row(dict(value), f"{hub['path']} row {number}", number)
