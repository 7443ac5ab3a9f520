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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmdistill.datagen.asking import Desk
from llmdistill.datagen.call_store import CallStore
from llmdistill.datagen.calls import Unanswerable
from llmdistill.datagen.eventloop import EventLoop
from llmdistill.datagen.jobs import Given, Job, RoleGiven, Task, read_sampling, schedule_of
from llmdistill.datagen.judges import Judge, Verdict
from llmdistill.datagen.progress import Progress
from llmdistill.datagen.roles import Role, open_role
from llmdistill.datagen.schema import Trace
from llmdistill.datagen.steps import Step, plain, run_step
from llmdistill.datagen.tables import MOST_REJECTED, Row
from llmdistill.datagen.writing import Writer
from llmdistill.errors import UserError
from llmdistill.record.manifest import Manifest
from llmdistill.texts.rollout import Sampling

MAY_CHANGE = ("n", "limit", "size", "judge")  # under one output: what was asked before is still asked


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
    job = Job.of(rows, writer, roles, schedule_of(read_sampling(sampling, seed), temperatures, n), options or {})
    settings = {
        **job.settings(),
        "writer": writer if isinstance(writer, str) else plain(writer),
        "temperatures": list(temperatures),
        "seed": seed,
        "judge": judge,
        "n": n,
    }
    shared = {k: v for k, v in settings.items() if k not in (*MAY_CHANGE, "prompts", "roles")}
    limits = _Limits(seed, max_cost, max_rejected, resume, progress)

    def work(step: Step) -> None:
        with ExitStack() as stack:
            identity = {**shared, "template": job.source.get("template") or ""}
            judging = stack.enter_context(Judge(judge, allow_unsafe_exec=allow_unsafe_exec)) if judge else None
            _Generating(job, judging, limits, step, stack).run(identity)

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
class _Limits:
    """How a run goes about it; nothing of what it writes depends on these but the seed."""

    seed: int
    most_cost: float
    most_refused: float
    resume: bool
    progress: bool


class _Generating:
    """Both passes over opened models. What is opened is closed with ``stack``."""

    def __init__(self, job: Job, judge: Judge | None, limits: _Limits, step: Step, stack: ExitStack) -> None:
        self.job, self.judge, self.limits, self.step, self.stack = job, judge, limits, step, stack
        self.roles = dict[str, Role]()

    def run(self, identity: Mapping[str, Any]) -> None:
        """``identity``: what all calls have in common, but for whom they ask."""
        for name, given in self.job.roles.items():
            self.roles[name] = given if isinstance(given, Role) else open_role(given, name)
            self.stack.callback(self.roles[name].close)
        store = self._store({**identity, "roles": {r: role.identity for r, role in self.roles.items()}})
        limits = self.limits
        desk = Desk(self.roles, store, seed=limits.seed, most_cost=limits.most_cost, most_refused=limits.most_refused)
        self.stack.callback(desk.close)
        loop = self.stack.enter_context(EventLoop())
        self._draw(desk, loop)
        replayed = Desk(self.roles, store, seed=limits.seed, replay=True)
        assembled = _Assembling(self.job, replayed, self.judge, self.step, loop)
        self.step.write(assembled.rows(self.job.tasks()))
        self.step.details.update(assembled.details(self.roles), cost=round(desk.purse.spent, 6))

    def _store(self, identity: Mapping[str, Any]) -> CallStore:
        """The answers so far, of these models.

        Raises:
            UserError: they are of others, or there are some where none are wanted.
        """
        store = CallStore(f"{self.step.out}.calls", plain(identity))
        self.stack.callback(store.close)
        if len(store.calls) and not self.limits.resume:
            raise UserError(f"{store.folder} holds calls, and resume is false. Fix: remove it, or another output.")
        for name, role in self.roles.items():
            store.check_probe(name, role.probe)
        return store

    def _draw(self, desk: Desk, loop: EventLoop) -> None:
        """The first pass, and whether the models are still what they were."""
        with Progress(desk, shown=self.limits.progress, total=self.job.total()) as shown:
            for name in (name for name, role in self.roles.items() if role.known_by_name):
                shown.note(f"{name}: it gives no log-probs, so other weights under its name would not be seen")
            drawing = _Drawing(self.job, desk, self.judge, shown)
            loop.run(drawing.all(self.job.tasks(self.step.rejects)))
        for role in self.roles.values() if desk.asked.calls else ():
            role.check_weights()
        self.step.counts["read"] = drawing.tasks


class _Drawing:
    """The first pass: as many samples at once as the engines like, none held longer than it is written."""

    def __init__(self, job: Job, desk: Desk, judge: Judge | None, progress: Progress) -> None:
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

    def __init__(self, job: Job, desk: Desk, judge: Judge | None, step: Step, loop: EventLoop) -> None:
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
        asked = {name: role.probe for name, role in roles.items() if role.probe or role.known_by_name}
        probes = {name: probe and probe.stored() for name, probe in asked.items()}
        told: dict[str, Any] = {"finish": dict(self.finishes), "tokens": self.tokens}
        found = {"authors": authors, **({"probes": probes} if probes else {}), **told}
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
