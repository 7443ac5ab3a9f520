"""``llmdistill data run RECIPE``: a chain of steps, of which those that are finished are skipped.

    folder: runs/data/sums                # where files without a path of their own go
    steps:
      - generate:
          from: {source: "reasoning_gym:chain_sum", size: 200, template: boxed}
          writer: plain
          roles: {teacher: data/quickstart/teacher}
          n: 4
          sampling: {max_new_tokens: 256, temperature: 0.8}
      - verify: {judge: math}
      - split: {heldout: 0.2}
      - build_pairs: {}
      - curate: {from: verify, steps: [finished, no_loops]}

A step is a function ``step(src, out, **settings) -> Manifest``: one of llmdistill.datagen by its name, or
package.module:function. ``from`` is a file, a list of files, the name of an earlier step, or (of generate) the
settings of prompts; without it, the step before. ``out`` is a file; without it FOLDER/NAME.jsonl. ``name`` tells two
steps of one kind apart.

Behind them, or in their place, a recipe may have rounds, each of which trains a student that writes in the next one:

    rounds:
      times: 3
      start: data/quickstart/teacher
      steps:
        - generate: {from: {...}, writer: plain, roles: {teacher: $student}, n: 8, seed: $round}
        - verify: {judge: math}
        - curate: {steps: [finished, right, {shortest: {k: 2}}]}
        - train: {door: redi, config: R.yaml, settings: {student.model: $student, objective.method: sft}}

In a setting ``$student`` is the student of the round before (``start`` in the first), ``$start`` that of the recipe for
those who train afresh every time, ``$round`` the number from 1, and ``$NAME`` what a step of that name has made: of
``train`` the student's folder, else the file. The files of a round are in FOLDER/round-N.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from llmdistill import datagen
from llmdistill.datagen.prompts import Prompts
from llmdistill.datagen.training import student_of
from llmdistill.errors import UserError
from llmdistill.record.manifest import Manifest, manifest_file

StepFunction = Callable[..., Manifest]
OURS = ("from", "out", "name")  # settings of the chain, not of the step
SUFFIX = ".jsonl"
TRAIN = "train"
OTHER_SUFFIXES = {TRAIN: ".json", "card": ".md", "compare_teachers": ".md"}
_NAMED = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass(frozen=True)
class Link:
    """One step of a chain, with its files."""

    name: str
    kind: str
    step: StepFunction
    source: Any  # files, or settings of prompts
    out: Path
    settings: Mapping[str, Any]

    def do(self) -> Manifest:
        """Does it, unless it is done."""
        first, second, *_ = inspect.signature(self.step).parameters
        if second != "out":  # generate has its writer and roles in between
            return self.step(**{first: self.source, "out": self.out, **self.settings})
        return self.step(self.source, self.out, **self.settings)


def read_chain(recipe: str | Path) -> list[Link]:
    """The steps of a recipe, checked before any is begun.

    Raises:
        UserError: no such file, no steps, a step that is not there, a setting that it does not take, two steps of one
            name or one output, or a source that no step before it makes.
    """
    path = Path(recipe)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{recipe} cannot be read: {error.strerror}. Fix: the path of a recipe.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{recipe} is no YAML: {' '.join(str(error).split())}. Fix: mend it.") from error
    steps = content.get("steps") if isinstance(content, Mapping) else None
    rounds = content.get("rounds") if isinstance(content, Mapping) else None
    if steps is None and rounds is not None:
        steps = []
    if not isinstance(steps, Sequence) or isinstance(steps, str) or (not steps and rounds is None):
        raise UserError(f"{recipe} has no list of steps. Fix: steps: [generate: {{...}}, verify: {{...}}].")
    if unknown := set(content) - {"folder", "steps", "rounds"}:
        raise UserError(f"{recipe} has the unknown key {sorted(unknown)[0]!r}; it takes folder, steps and rounds.")
    folder, links = Path(content.get("folder") or Path("runs") / "data" / path.stem), list[Link]()
    for number, entry in enumerate(steps, 1):
        links.append(_link(f"{recipe}, step {number}", _with(_made(links), entry), folder, links))
    if rounds is not None:
        _add_rounds(str(recipe), rounds, folder, links)
    return links


def _add_rounds(recipe: str, rounds: Any, folder: Path, links: list[Link]) -> None:
    """The steps of all rounds, behind those that are there."""
    if not isinstance(rounds, Mapping) or set(rounds) != {"times", "start", "steps"}:
        raise UserError(f"{recipe}: rounds has the keys times, start and steps, all of them. Fix: as in a ready one.")
    times, steps = rounds["times"], rounds["steps"]
    if not isinstance(times, int) or times < 1 or not isinstance(steps, Sequence) or isinstance(steps, str):
        raise UserError(f"{recipe}: rounds.times is {times!r} and steps a list. Fix: times of 1 or more, steps: [...].")
    once = list(links)
    start = student = str(_with(_made(once), rounds["start"]))
    for number in range(1, times + 1):
        mine: list[Link] = []
        for i, entry in enumerate(steps, 1):
            where = f"{recipe}, round {number}, step {i}"
            _, name, _ = _parsed(where, entry)
            hidden = {link.name for link in mine} | {name}  # a round's step hides one before the rounds
            before = [*(link for link in once if link.name not in hidden), *mine]
            known = {**_made(before), "start": start, "student": student, "round": number}
            mine.append(_link(where, _with(known, entry), folder / f"round-{number}", before))
        trained = [link for link in mine if link.kind == TRAIN]
        if not trained:
            raise UserError(f"{recipe}: the rounds train no student. Fix: a step train among their steps.")
        student = str(student_of(trained[-1].out))
        links.extend(replace(link, name=f"round-{number}/{link.name}") for link in mine)


def _made(links: Sequence[Link]) -> dict[str, Any]:
    """What ``$NAME`` stands for."""
    return {link.name: str(student_of(link.out) if link.kind == TRAIN else link.out) for link in links}


def _with(known: Mapping[str, Any], value: Any) -> Any:
    """A setting with ``$NAME`` replaced; alone it keeps its type. Other dollars stay, as mathematics has them."""
    if isinstance(value, Mapping):
        return {key: _with(known, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with(known, item) for item in value]
    if not isinstance(value, str):
        return value
    if value[:1] == "$" and value[1:] in known:
        return known[value[1:]]
    return _NAMED.sub(lambda found: str(known.get(found[1] or found[2], found[0])), value)


def run_chain(recipe: str | Path, told: Callable[[Link, Manifest, bool], None] = lambda *_: None) -> list[Manifest]:
    """Does the steps of a recipe in turn.

    Args:
        told: called with each step, its manifest, and whether it had been done before.

    Raises:
        UserError: as :func:`read_chain`, or of a step. Those before it are done.
    """
    made = []
    for link in read_chain(recipe):
        link.out.parent.mkdir(parents=True, exist_ok=True)
        before = _written(manifest_file(link.out))
        manifest = link.do()
        told(link, manifest, _written(manifest_file(link.out)) == before)
        made.append(manifest)
    return made


def _written(file: Path) -> tuple[int, int] | None:
    """Which file it is: another one once it was replaced, whatever it says."""
    return (file.stat().st_ino, file.stat().st_mtime_ns) if file.is_file() else None


def find_step(kind: str, where: str = "step") -> StepFunction:
    """A step by the name of its function. Raises UserError where there is none."""
    module, colon, function = kind.partition(":")
    try:
        found = getattr(import_module(module), function) if colon else getattr(datagen, kind)
    except (ImportError, AttributeError) as error:
        near = difflib.get_close_matches(kind, datagen.__all__, n=1)
        fix = near[0] if near else f"one of {', '.join(datagen.__all__)}, or package.module:function"
        raise UserError(f"{where}: there is no step {kind!r}. Fix: {fix}.") from error
    return found  # type: ignore[no-any-return]


def _parsed(where: str, entry: Any) -> tuple[str, str, dict[str, Any]]:
    """Kind, name and settings of a step as a recipe has it."""
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise UserError(f"{where} is {entry!r}; it must be NAME: {{settings}}. Fix: one step an entry.")
    ((kind, given),) = entry.items()
    settings = dict(given or {})
    return str(kind), str(settings.pop("name", str(kind).rpartition(":")[2])), settings


def _link(where: str, entry: Any, folder: Path, before: Sequence[Link]) -> Link:
    kind, name, settings = _parsed(where, entry)
    step = find_step(kind, where)
    out = Path(settings.pop("out", folder / f"{name}{OTHER_SUFFIXES.get(kind, SUFFIX)}"))
    for link in before:
        if name == link.name or out == link.out:
            what = f"named {name!r}" if name == link.name else f"written to {out}"
            raise UserError(f"{where}: a step before it is {what} too. Fix: name: ANOTHER.")
    source = _source(where, settings.pop("from", None), before)
    takes = inspect.signature(step).parameters
    if unknown := [key for key in settings if key not in takes]:
        settable = [p for p in takes if p not in ("src", "out", "rows", "progress")]
        raise UserError(f"{where}: {kind} takes no {unknown[0]!r}. Fix: one of {', '.join(settable)}.")
    return Link(name, kind, step, source, out, settings)


def _source(where: str, given: Any, before: Sequence[Link]) -> Any:
    outs = {link.name: link.out for link in before}
    if given is None:
        if not before:
            raise UserError(f"{where} has nothing to read. Fix: from: FILE, or the settings of prompts.")
        return before[-1].out
    if isinstance(given, Mapping):
        known = [f.name for f in fields(Prompts)]
        if unknown := [key for key in given if key not in known]:
            raise UserError(f"{where}: from has the unknown key {unknown[0]!r}. Fix: one of {', '.join(known)}.")
        return Prompts(**given)
    files = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    found = [outs.get(str(file), file) for file in files]
    return found if len(found) > 1 else found[0]
