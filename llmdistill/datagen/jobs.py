"""What ``generate`` is to write: which rows, by which writer, of whom, and how each sample of a row is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from llmdistill.datagen.asking import Ask, Desk
from llmdistill.datagen.calls import DRAWN_BY
from llmdistill.datagen.prompts import Prompts, rows_digest, rows_given
from llmdistill.datagen.roles import Role, RoleConfig, described, role_config
from llmdistill.datagen.schema import Trace
from llmdistill.datagen.tables import Rejects, Row
from llmdistill.datagen.writing import Writer, find_writer
from llmdistill.errors import UserError
from llmdistill.texts.rollout import Sampling

Given = str | Path | Prompts | Sequence[Mapping[str, Any]]
RoleGiven = Role | RoleConfig | Mapping[str, Any] | str
MAX_NEW_TOKENS = 1024


@dataclass(frozen=True)
class Task:
    """One sample of one prompt."""

    row: Row
    sample: int
    sampling: Sampling


@dataclass(frozen=True)
class Job:
    """See the module."""

    prompts: Prompts
    given: Sequence[Mapping[str, Any]] | None  # rows that stand in no file
    write: Writer
    roles: Mapping[str, Role | RoleConfig]
    schedule: Sequence[Sampling]
    options: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        rows: Given,
        writer: str | Writer,
        roles: Mapping[str, RoleGiven],
        schedule: Sequence[Sampling],
        options: Mapping[str, Any],
    ) -> Job:
        """From what ``generate`` takes.

        Raises:
            UserError: no such writer, or settings of a role that there are not.
        """
        named = isinstance(rows, str | Path)
        return cls(
            rows if isinstance(rows, Prompts) else Prompts(str(rows) if named else "rows"),
            None if named or isinstance(rows, Prompts) else rows,  # type: ignore[arg-type]
            find_writer(writer),
            {name: model if isinstance(model, Role) else role_config(model, name) for name, model in roles.items()},
            schedule,
            dict(options),
        )

    def settings(self) -> dict[str, Any]:
        """What the traces depend on, for the manifest."""
        return {
            "prompts": self.source,
            "options": self.options,
            "roles": {r: m.identity if isinstance(m, Role) else described(m) for r, m in self.roles.items()},
            "sampling": {name: getattr(self.schedule[0], name) for name in DRAWN_BY},
            "limit": self.prompts.limit,
            "size": self.prompts.size if self.given is None else len(self.given),
        }

    @property
    def source(self) -> dict[str, Any]:
        """The prompts, for the manifest."""
        return self.prompts.identity if self.given is None else {"rows": rows_digest(self.given)}

    def tasks(self, rejects: Rejects | None = None) -> Iterator[Task]:
        """All samples in the order of the file: temperature by temperature, row by row.

        ``rejects``: where rows go that are no prompts, the first time through them.
        """
        for stage in _stages(self.schedule):
            for row in self._rows(rejects):
                for sample in stage:
                    yield Task(row, sample, self.schedule[sample])
            if rejects is not None:
                rejects.check()
            rejects = None

    def total(self) -> int:
        """Samples there will be; 0 where that is not known."""
        known = len(self.given) if self.given is not None else self.prompts.count()
        return len(self.schedule) * (min(known, self.prompts.limit) if self.prompts.limit else known)

    def _rows(self, rejects: Rejects | None) -> Iterator[Row]:
        if self.given is not None:
            return rows_given(self.given, self.prompts)
        return self.prompts.rows(Rejects.unheeded() if rejects is None else rejects)

    async def traces(self, desk: Desk, task: Task) -> list[Trace]:
        """What the writer makes of a task."""
        return await self.write(task.row, Ask(desk, task.sample, task.sampling, self.options))


def read_sampling(given: Sampling | Mapping[str, Any] | None, seed: int) -> Sampling:
    """How calls are drawn, from what names it. Raises UserError for settings that there are not, or out of range."""
    if isinstance(given, Sampling):
        _only_what_names_calls(given)
        return replace(given, seed=seed, samples_per_prompt=1)
    try:
        made = Sampling(**{"max_new_tokens": MAX_NEW_TOKENS, **(given or {}), "seed": seed})
    except TypeError as error:
        raise UserError(f"sampling is {dict(given or {})!r}: {error}. Fix: {', '.join(DRAWN_BY)}.") from None
    _only_what_names_calls(made)
    for name, ok, needed in (
        ("temperature", made.temperature >= 0, ">= 0"),
        ("top_p", 0 < made.top_p <= 1, "in (0, 1]"),
        ("top_k", made.top_k >= 0, ">= 0"),
        ("max_new_tokens", made.max_new_tokens >= 1, ">= 1"),
    ):
        if not ok:
            raise UserError(f"sampling.{name} is {getattr(made, name)}; it must be {needed}. Fix: leave it out.")
    return made


def _only_what_names_calls(sampling: Sampling) -> None:
    """Refuses settings that are no part of a call's name, and that not every endpoint takes."""
    for f in fields(Sampling):
        value = getattr(sampling, f.name)
        if f.name not in (*DRAWN_BY, "seed", "samples_per_prompt") and value != f.default:
            raise UserError(
                f"sampling.{f.name} is {value!r}; traces are drawn by {', '.join(DRAWN_BY)}, and end before the stop "
                "strings of their writer. Fix: leave it out."
            )


def schedule_of(sampling: Sampling, temperatures: Sequence[float], n: int) -> list[Sampling]:
    """How each sample of a prompt is drawn: the first share of them at the first temperature."""
    stages = list(temperatures) or [sampling.temperature]
    if n < len(stages):
        raise UserError(f"n is {n}, for {len(stages)} temperatures; it must be at least that. Fix: --n {len(stages)}.")
    if n > len(stages) and 0 in stages:
        raise UserError(f"n is {n} and a temperature 0: greedy samples are all the same. Fix: a temperature above 0.")
    return [replace(sampling, temperature=stages[i * len(stages) // n]) for i in range(n)]


def _stages(schedule: Sequence[Sampling]) -> list[list[int]]:
    """The samples of each temperature, in the order of the schedule."""
    found: dict[float, list[int]] = {}
    for i, sampling in enumerate(schedule):
        found.setdefault(sampling.temperature, []).append(i)
    return list(found.values())
