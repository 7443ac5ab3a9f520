"""Where prompts come from: a file, a hub dataset, or procedural problems of reasoning-gym.

prompts.jsonl                          JSONL, gzipped JSONL, JSON, Parquet, or a folder of datasets.save_to_disk
openai/gsm8k:main                      a hub dataset (or a copy's folder) and its configuration, read as a stream
reasoning_gym:chain_sum,leg_counting   so many problems of each of these tasks, with their answers
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from llmdistill.datagen.schema import as_messages, check_prompt, digest, prompt_id
from llmdistill.datagen.tables import Rejects, Row, count_rows, read_rows
from llmdistill.errors import UserError
from llmdistill.evals.templates import find_template
from llmdistill.texts.messages import from_json, is_chat, read_messages

PROMPTS = ("prompt", "messages", "conversations", "question", "problem", "instruction")
ANSWERS = ("answer", "gold", "final_answer")
GYM = "reasoning_gym:"
GSM8K_MARK = "####"  # before the answer in GSM8K's solutions


@dataclass(frozen=True)
class Prompts:
    """A source of prompts and how its rows are read. Iterating gives rows as writers take them, each prompt once.

    Attributes:
        source: see the module.
        column: of the prompt, a text or messages; empty: the first of ``PROMPTS`` that there is.
        answer_column: of the right answer; empty: the first of ``ANSWERS`` that there is.
        template: a prompt template of the evaluations by name ("boxed"), around prompts that are text.
        system_prompt: before conversations that have none.
        split: of a hub dataset.
        size, settings: of reasoning-gym: problems of each task, and the settings of its generator.
        seed: of reasoning-gym.
        limit: the first so many prompts; 0: all.
        shard: (i, n): every n-th row from the i-th on, for n processes that know nothing of each other.
    """

    source: str
    column: str = ""
    answer_column: str = ""
    template: str = ""
    system_prompt: str = ""
    split: str = "train"
    size: int = 100
    settings: Mapping[str, Any] | None = None
    seed: int = 0
    limit: int = 0
    shard: tuple[int, int] = (0, 1)

    @property
    def file(self) -> Path | None:
        """The file they are read from, if it is one."""
        return Path(self.source) if Path(self.source).is_file() else None

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides what they are beside the file's content, and how many of them there are."""
        found = {k: v for k, v in asdict(self).items() if k not in ("limit", "size", "shard")}
        found["shard"] = list(self.shard)
        if self.template:
            found["template"] = {"name": self.template, "hash": find_template(self.template).hash}
        return found

    def count(self) -> int:
        """How many rows there are; 0 where that is not known."""
        if self.source.startswith(GYM):
            return self.size * len(self.source.split(","))
        return count_rows(self.source) // self.shard[1] if self.file else 0

    def rows(self, rejects: Rejects | None = None) -> Iterator[Row]:
        """Rows for writers. Those without a prompt go to the rejects; prompts that came before are passed over.

        Raises:
            UserError: nothing there, no column with prompts, too many rejects.
        """
        seen, no_column = set[str](), None
        index, count = self.shard
        for number, row in enumerate(self._raw(rejects), 1):
            if (number - 1) % count != index:
                continue
            try:
                made = self.read(row)
            except ValueError as error:
                if rejects is None:
                    raise
                no_column = error if isinstance(error, _NoColumn) else no_column
                rejects.add(self.source, number, str(error), row)
                continue
            if made["prompt_id"] in seen:
                continue
            seen.add(made["prompt_id"])
            yield made
            if self.limit and len(seen) == self.limit:
                return
        if no_column is not None and not seen:  # a fault of the settings, not of some rows
            raise no_column

    def read(self, row: Mapping[str, Any]) -> Row:
        """A row as writers take it.

        Raises:
            UserError: it has no such column.
            ValueError: its prompt says nothing.
        """
        column = self.column or _first_column(PROMPTS, row)
        if column not in row:
            raise _NoColumn(
                f"{self.source} has no column {repr(self.column) if self.column else 'of prompts'} "
                f"(it has {', '.join(map(str, row))}). "
                "Fix: --prompt_column NAME."
            )
        if row[column] is None:
            raise ValueError(f"{column} is empty")
        prompt = from_json(row[column])
        messages = read_messages(prompt, column) if is_chat(prompt) else None
        answer = self._answer(row)
        if messages and messages[-1]["role"] == "assistant":  # a conversation with its answer
            answer, messages = answer or messages[-1]["content"], messages[:-1]
        check_prompt(prompt if messages is None else messages)
        if messages is None:
            messages = as_messages(str(prompt))
            if self.template:
                messages = find_template(self.template).messages(str(prompt), self.system_prompt)
        if self.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        tests = row.get("tests")
        known = {column, self.answer_column or "answer", "tests", "domain", "solution"}
        more = {k: v for k, v in row.items() if k not in known and _plain(v)}
        said = [{"role": m["role"], "content": m["content"]} for m in messages]
        return {
            "prompt": said,
            "prompt_id": prompt_id(said),
            "answer": answer,
            "tests": tests if tests is None or isinstance(tests, str) else json.dumps(tests, sort_keys=True),
            "domain": None if row.get("domain") is None else str(row["domain"]),
            "solution": row.get("solution") or self._worked(row),
            "more": more,
        }

    def _answer(self, row: Mapping[str, Any]) -> str | None:
        name = self.answer_column or _first_column(ANSWERS, row)
        if self.answer_column and name not in row:
            raise _NoColumn(f"{self.source} has no column {name!r}. Fix: --answer_column NAME.")
        if row.get(name) is None or row[name] != row[name]:  # what pandas writes where there is nothing: not a number
            return None
        found = str(row[name])
        return found.rpartition(GSM8K_MARK)[2].strip() if GSM8K_MARK in found else found

    def _worked(self, row: Mapping[str, Any]) -> str | None:
        """The solution before the answer, where one column holds both, as GSM8K's does."""
        found = str(row.get(self.answer_column or "answer") or "")
        return found.partition(GSM8K_MARK)[0].strip() if GSM8K_MARK in found else None

    def _raw(self, rejects: Rejects | None) -> Iterator[Mapping[str, Any]]:
        if self.source.startswith(GYM):
            yield from self._problems(self.source.removeprefix(GYM).split(","), rejects)
        elif _is_read_here(Path(self.source)) or self.source.endswith((".jsonl", ".parquet", ".gz", ".json")):
            yield from read_rows(self.source, rejects)
        else:
            for row in self._hub():
                if rejects is not None:
                    rejects.read += 1
                yield row

    def _problems(self, tasks: Sequence[str], rejects: Rejects | None) -> Iterator[Mapping[str, Any]]:
        import reasoning_gym

        for task in tasks:
            try:
                problems = reasoning_gym.create_dataset(task, size=self.size, seed=self.seed, **(self.settings or {}))
            except (ValueError, TypeError, AssertionError) as error:
                raise UserError(f"reasoning-gym's task {task!r}: {error}. Fix: its name and settings.") from error
            for entry in islice(problems, self.size):
                if rejects is not None:
                    rejects.read += 1
                entry_json = json.dumps(entry, sort_keys=True, default=str)
                yield {
                    "prompt": entry["question"],
                    "answer": entry["answer"],
                    "domain": f"reasoning_gym/{task}",
                    "reasoning_gym": task,
                    "entry": entry_json,
                }

    def _hub(self) -> Iterator[Mapping[str, Any]]:
        from datasets import load_dataset

        name, _, configuration = self.source.partition(":")
        try:
            yield from load_dataset(name, configuration or None, split=self.split, streaming=True)
        except Exception as error:  # datasets raises whatever its readers raise
            reason = " ".join(str(error).split())[:400].rstrip(".") or type(error).__name__
            raise UserError(
                f"prompts {self.source!r} cannot be read: {reason}. Fix: a file or a hub dataset, NAME:CONFIGURATION."
            ) from error


def rows_given(rows: Sequence[Mapping[str, Any]], settings: Prompts) -> Iterator[Row]:
    """Rows that are at hand, as writers take them, each prompt once."""
    seen = set[str]()
    for row in rows:
        made = settings.read(row)
        if made["prompt_id"] not in seen:
            seen.add(made["prompt_id"])
            yield made


def rows_digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """16 hex digits over rows that stand in no file."""
    return digest([dict(row) for row in rows])


class _NoColumn(UserError):
    """A row without the column; a fault of the settings where all are."""


def _first_column(names: Sequence[str], row: Mapping[str, Any]) -> str:
    """The first that says something in this row, or else that it has."""
    there = [name for name in names if name in row]
    return next((name for name in there if row[name] is not None), there[0] if there else "")


def _is_read_here(path: Path) -> bool:
    """A file or a folder of save_to_disk. Other folders are hub datasets, of which datasets reads the card."""
    return path.is_file() or any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _plain(value: Any) -> bool:
    """Whether a column goes along with a trace: what is short and plain data."""
    return isinstance(value, str | int | float | bool) and (not isinstance(value, str) or len(value) <= 20_000)
