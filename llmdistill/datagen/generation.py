"""``generate``: prompts in, traces out, each call to a model kept on disk as it is answered.

Two passes. The first runs the writers of many rows at once and keeps every answer (OUT.calls); the second runs them
again, row by row over what is kept, and writes the file. So the file is the same whatever the order of answers was and
however often the process died, an interrupted run asks nothing twice, and memory holds the rows that are under way.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from llmdistill.datagen.asking import Ask, Desk
from llmdistill.datagen.call_store import CallStore
from llmdistill.datagen.calls import DRAWN_BY, Unanswerable
from llmdistill.datagen.eventloop import EventLoop
from llmdistill.datagen.judges import Judge, Verdict
from llmdistill.datagen.progress import Progress
from llmdistill.datagen.prompts import Prompts, rows_digest, rows_given
from llmdistill.datagen.roles import Role, RoleConfig, described, open_role, role_config
from llmdistill.datagen.schema import Trace
from llmdistill.datagen.steps import Step, plain, run_step
from llmdistill.datagen.tables import MOST_REJECTED, Rejects, Row
from llmdistill.datagen.writing import Writer, find_writer
from llmdistill.errors import UserError
from llmdistill.record.manifest import Manifest
from llmdistill.texts.rollout import Sampling

Given = str | Path | Prompts | Sequence[Mapping[str, Any]]
RoleGiven = Role | RoleConfig | Mapping[str, Any] | str
MAY_CHANGE = ("n", "limit", "size", "judge")  # under one output: what was asked before is still asked
MAX_NEW_TOKENS = 1024


def generate(
    rows: Given,
    writer: str | Writer,
    roles: Mapping[str, RoleGiven],
    out: str | Path,
    *,
    n: int = 1,
    sampling: Sampling | Mapping[str, Any] | None = None,
    resume: bool = True,
    temperatures: Sequence[float] = (),
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    judge: str = "",
    allow_unsafe_exec: bool = False,
    max_cost: float = 0.0,
    max_rejected: float = MOST_REJECTED,
    progress: bool = False,
) -> Manifest:
    """``n`` traces of every prompt.

    Args:
        rows: a source of prompts (see :mod:`llmdistill.datagen.prompts`), its settings, or rows.
        writer: by name, as package.module:function, or the coroutine.
        roles: name -> model, service or endpoint: a path, hub name, url or the settings of
            :class:`~llmdistill.datagen.roles.RoleConfig`.
        sampling: of the calls; its seed is ``seed``.
        resume: go on with what OUT.calls holds; False: an error where it holds anything.
        temperatures: the samples of a prompt are shared out to these in turn, and the file is written in this order:
            the low ones first are DASD's schedule (METHODS 4.3). Empty: the sampling's.
        options: of the writer.
        judge: verdicts as traces come, by :class:`~llmdistill.datagen.judges.Judge`; empty: none.
        max_cost: in the currency of the roles' prices; 0: no cap.
        max_rejected: share of rows and samples that may be rejected, and of calls that may be refused.
        progress: show it on the terminal.

    Raises:
        UserError: other models, writer or sampling than those of OUT.calls; a model that is gone; a cap reached; too
            many rejects. What was answered is kept.
    """
    named = isinstance(rows, str | Path)
    job = _Job(
        rows if isinstance(rows, Prompts) else Prompts(str(rows) if named else "rows"),
        None if named or isinstance(rows, Prompts) else rows,  # type: ignore[arg-type]
        find_writer(writer),
        {name: model if isinstance(model, Role) else role_config(model, name) for name, model in roles.items()},
        _schedule(_sampling(sampling, seed), temperatures, n),
        dict(options or {}),
    )
    settings = {
        "prompts": job.source,
        "writer": writer if isinstance(writer, str) else plain(writer),
        "options": dict(options or {}),
        "roles": {r: m.identity if isinstance(m, Role) else described(m) for r, m in job.roles.items()},
        "sampling": {name: getattr(job.schedule[0], name) for name in DRAWN_BY},
        "temperatures": list(temperatures),
        "seed": seed,
        "judge": judge,
        "n": n,
        "limit": job.prompts.limit,
        "size": job.prompts.size if job.given is None else len(job.given),
    }
    shared = {k: v for k, v in settings.items() if k not in (*MAY_CHANGE, "prompts", "roles")}
    identity = {**shared, "template": job.source.get("template") or ""}

    def work(step: Step) -> None:
        with ExitStack() as stack:
            opened = dict[str, Role]()
            for name, given in job.roles.items():
                opened[name] = given if isinstance(given, Role) else open_role(given, name)
                stack.callback(opened[name].close)
            whose = {**identity, "roles": {r: role.identity for r, role in opened.items()}}
            store = CallStore(f"{out}.calls", plain(whose))
            stack.callback(store.close)
            if len(store.calls) and not resume:
                raise UserError(f"{store.folder} holds calls, and resume is false. Fix: remove it, or another output.")
            desk = Desk(opened, store, seed=seed, most_cost=max_cost, most_refused=max_rejected)
            stack.callback(desk.close)
            judging = stack.enter_context(Judge(judge, allow_unsafe_exec=allow_unsafe_exec)) if judge else None
            loop = stack.enter_context(EventLoop())
            with Progress(desk, shown=progress, total=job.total()) as shown:
                drawing = _Drawing(job, desk, judging, shown)
                loop.run(drawing.all(job.tasks(step.rejects)))
            step.counts["read"] = drawing.tasks
            assembled = _Assembling(job, Desk(opened, store, seed=seed, replay=True), judging, step, loop)
            step.write(assembled.rows(job.tasks()))
            step.details.update(assembled.details(opened), cost=round(desk.purse.spent, 6))

    return run_step(
        "generate",
        work,
        src=job.prompts.file or (),
        out=out,
        settings=settings,
        max_rejected=max_rejected,
        may_change=MAY_CHANGE,
    )


@dataclass(frozen=True)
class Task:
    """One sample of one prompt."""

    row: Row
    sample: int
    sampling: Sampling


@dataclass(frozen=True)
class _Job:
    """What is to be written: rows, a writer, who is asked, and how each sample of a row is drawn."""

    prompts: Prompts
    given: Sequence[Mapping[str, Any]] | None  # rows that stand in no file
    write: Writer
    roles: Mapping[str, Role | RoleConfig]
    schedule: Sequence[Sampling]
    options: Mapping[str, Any]

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


class _Drawing:
    """The first pass: as many samples at once as the engines like, none held longer than it is written."""

    def __init__(self, job: _Job, desk: Desk, judge: Judge | None, progress: Progress) -> None:
        self.job, self.desk, self.judge, self.progress = job, desk, judge, progress
        self.tasks = 0
        self._verdicts: list[tuple[str, Future[Verdict]]] = []

    async def all(self, tasks: Iterator[Task]) -> None:
        """Raises what a writer or an engine raised; what was answered by then is kept."""
        pending = set[asyncio.Task[None]]()
        try:
            for task in tasks:
                self.tasks += 1
                pending.add(asyncio.create_task(self._one(task)))
                if self._full(pending):
                    await asyncio.sleep(0)  # calls begin, and may open an engine, which says how many it likes
                while self._full(pending):
                    pending = await self._some(pending)
            while pending:
                pending = await self._some(pending)
        finally:
            for unfinished in pending:
                unfinished.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
            self._keep(wait=True)

    def _full(self, pending: set[asyncio.Task[None]]) -> bool:
        return len(pending) >= 2 * self.desk.in_flight()

    async def _some(self, pending: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
        """Waits until some are finished."""
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for finished in done:
            finished.result()
        self._keep()
        self.progress.show(self.tasks - len(pending))
        return pending

    async def _one(self, task: Task) -> None:
        try:
            traces = await self.job.traces(self.desk, task)
        except Unanswerable:
            return  # the second pass meets it again, and counts it
        for trace in traces if self.judge else ():
            assert self.judge is not None
            row = trace.row()
            key = self.judge.key(row)
            if (kept := self.desk.store.verdicts.get(key)) is None:
                self._verdicts.append((key, self.judge.submit(row)))
            else:
                self.progress.judged(kept["verdict"])

    def _keep(self, wait: bool = False) -> None:
        """Verdicts that are there by now go to the disk."""
        waiting = []
        for key, future in self._verdicts:
            if wait or future.done():
                verdict = future.result()
                self.progress.judged(verdict)
                self.desk.store.verdicts.put(key, {"verdict": verdict})
            else:
                waiting.append((key, future))
        self._verdicts = waiting


class _Assembling:
    """The second pass: every writer once more over the answers on disk, in the order of the rows."""

    def __init__(self, job: _Job, desk: Desk, judge: Judge | None, step: Step, loop: EventLoop) -> None:
        self.job, self.desk, self.judge, self.step, self.loop = job, desk, judge, step, loop
        self.authors, self.finishes, self.verdicts = Counter[tuple[str, str]](), Counter[str](), Counter[str]()
        self.tokens = 0

    def rows(self, tasks: Iterator[Task]) -> Iterator[Row]:
        """Raises UserError at the end, before the file is in its place, where too many samples were refused."""
        rejects = self.step.rejects
        for task in tasks:
            rejects.read += 1
            try:
                traces = self.loop.run(self.job.traces(self.desk, task))
            except Unanswerable as reason:
                rejects.add(f"{task.row['prompt_id']}/{task.sample}", task.sample, str(reason), task.row)
                continue
            if not traces:
                self.step.lose("nothing was written")
            yield from map(self._counted, traces)
        rejects.check()

    def details(self, roles: Mapping[str, Role]) -> dict[str, Any]:
        """What the manifest says beside the counts: who wrote, how it ended, what was right."""
        authors = {
            role.fingerprint: {
                "name": role.model,
                "role": name,
                "tokenizer": role.tokenizer,
                "template": role.template,
                "traces": self.authors[role.fingerprint, name],
            }
            for name, role in roles.items()
            if self.authors[role.fingerprint, name]
        }
        found: dict[str, Any] = {"authors": authors, "finish": dict(self.finishes), "tokens": self.tokens}
        return {**found, **({"verdicts": dict(sorted(self.verdicts.items()))} if self.judge else {})}

    def _counted(self, trace: Trace) -> Row:
        row = trace.row()
        for author in {(part.fingerprint, part.role) for part in trace.parts if part.fingerprint}:
            self.authors[author] += 1
        self.finishes[trace.finish] += 1
        self.tokens += trace.tokens
        if self.judge is not None:
            kept = self.desk.store.verdicts.get(self.judge.key(row))
            verdict = kept["verdict"] if kept else self.judge.submit(row).result()
            self.verdicts[verdict["verdict"]] += 1
            row |= {**verdict, "truncated": trace.finish == "length"}
        return row


def _sampling(given: Sampling | Mapping[str, Any] | None, seed: int) -> Sampling:
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


def _schedule(sampling: Sampling, temperatures: Sequence[float], n: int) -> list[Sampling]:
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
