"""The card of a dataset: README.md as the hub renders it, from the data and the manifests behind it.

    card("clean.jsonl", "README.md", title="Sums with worked steps", licence="apache-2.0", language=["en"])

It tells who wrote the texts with which sampling, how they were judged, what each step of the chain took away, and how
long they are. What nobody wrote down (a licence) is asked for and never guessed.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from llmdistill.datagen.schema import prompt_of
from llmdistill.datagen.steps import Paths, Step, lineage, run_step
from llmdistill.datagen.tables import MOST_REJECTED, Row
from llmdistill.errors import UserError
from llmdistill.files import atomic_write
from llmdistill.record.manifest import Manifest

_BARS = 24  # of the length plot
_WIDTH = 40  # characters of its longest bar
_SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)


class Facts:
    """What a card tells of the rows: counted in one pass, 8 bytes a row."""

    def __init__(self) -> None:
        self.rows = 0
        self.prompts = set[str]()
        self.lengths = list[int]()
        self.unit = "tokens"
        self.by_teacher = defaultdict[str, Counter[str]](Counter)
        self.by_domain, self.by_style = Counter[str](), Counter[str]()
        self.sampling = defaultdict[str, Counter[str]](Counter)

    def add(self, row: Row) -> None:
        self.rows += 1
        self.prompts.add(prompt_of(row))
        text = row.get("completion") or row.get("chosen") or ""
        if not row.get("tokens"):
            self.unit = "characters"
        self.lengths.append(int(row.get("tokens") or len(str(text))))
        teacher = self.by_teacher[str(row.get("teacher") or row.get("chosen_teacher") or "not told")]
        teacher["rows"] += 1
        teacher["cut off"] += row.get("finish") == "length"
        if row.get("passed") is not None:
            teacher["judged"] += 1
            teacher["right"] += bool(row["passed"])
        self.by_domain[str(row.get("domain") or "")] += 1
        self.by_style[str(row.get("style") or "")] += 1
        if sampling := row.get("sampling"):
            told = ", ".join(f"{k} {v}" for k, v in sampling.items())
            self.sampling[str(row.get("teacher") or "not told")][told] += 1


def card(
    src: Paths,
    out: str | Path,
    *,
    title: str,
    licence: str,
    language: Sequence[str] = ("en",),
    about: str = "",
    sources: Mapping[str, str] | None = None,
    max_rejected: float = MOST_REJECTED,
) -> Manifest:
    """Writes the card of a data file, or of several that are one dataset (splits).

    Args:
        src: the finished data; what came before is in their manifests.
        out: .md.
        title: of the dataset.
        licence: of the rows, as the hub names licences ("apache-2.0", "mit", "other").
        language: codes of two letters.
        about: a paragraph to begin with.
        sources: {where prompts come from: its licence}.

    Raises:
        UserError: no row, or no title or licence.
    """
    if not title or not licence:
        raise UserError("a card needs a title and the licence of its rows. Fix: title: ..., licence: apache-2.0.")
    languages = [language] if isinstance(language, str) else list(language)

    def work(step: Step) -> None:
        facts = Facts()
        for row in step.rows():
            facts.add(row)
        if not facts.rows:
            raise UserError(f"{', '.join(map(str, step.inputs))}: there are no rows to write a card of.")
        step.details["rows"], step.details["prompts"] = facts.rows, len(facts.prompts)
        atomic_write(step.out, _page(step, facts, title, licence, languages, about, sources or {}))
        step.wrote(step.out)

    said = {"title": title, "licence": licence, "language": languages, "about": about, "sources": dict(sources or {})}
    return run_step("card", work, src=src, out=out, settings=said, max_rejected=max_rejected, suffixes=(".md",))


def _page(
    step: Step,
    facts: Facts,
    title: str,
    licence: str,
    language: list[str],
    about: str,
    sources: Mapping[str, str],
) -> str:
    files = [{"split": _split(file, step.inputs), "path": file.name} for file in step.inputs]
    front = {
        "license": licence,
        "language": language,
        "pretty_name": title,
        "task_categories": ["text-generation"],
        "tags": ["distillation", "reasoning", "synthetic"],
        "size_categories": [next((name for most, name in _SIZES if facts.rows < most), "n>10M")],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---",
        f"# {title}",
        about,
        f"{facts.rows:,} rows, {len(facts.prompts):,} different prompts, written with llmdistill.",
        _section("Who wrote it", _teachers(facts)),
        _section("Sampling", _table(("teacher", "sampling", "rows"), _sampling(facts))),
        _section("Domains", _table(("domain", "rows"), _counted(facts.by_domain))),
        _section("Styles", _table(("style", "rows"), _counted(facts.by_style))),
        _section("Length", _lengths(facts)),
        _section("How it was made", _chain(step)),
        _section("Licences", _table(("source", "licence"), [*sources.items(), ("these rows", licence)])),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _teachers(facts: Facts) -> str:
    rows = []
    for name, n in sorted(facts.by_teacher.items(), key=lambda item: (-item[1]["rows"], item[0])):
        right = f"{n['right'] / n['judged']:.1%} of {n['judged']:,} judged" if n["judged"] else "not judged"
        rows.append((name, f"{n['rows']:,}", right, f"{n['cut off'] / n['rows']:.1%}"))
    return _table(("teacher", "rows", "right", "cut off"), rows)


def _sampling(facts: Facts) -> Iterator[tuple[str, str, str]]:
    for name, settings in sorted(facts.sampling.items()):
        yield from ((name, told, f"{rows:,}") for told, rows in settings.most_common(8))


def _lengths(facts: Facts) -> str:
    lengths = np.array(facts.lengths)
    at = np.percentile(lengths, (0, 10, 25, 50, 75, 90, 99, 100))
    names = ("least", "p10", "p25", "median", "p75", "p90", "p99", "most")
    table = _table((facts.unit, *names), [("", *(f"{value:,.0f}" for value in at))])
    return f"{table}\n\n```\n{plot(facts.lengths, facts.unit)}\n```"


def plot(lengths: Sequence[int], unit: str) -> str:
    """A histogram in text, over the logarithm of the lengths where they span more than a factor of 20."""
    low, high = max(min(lengths), 1), max(max(lengths), 1)
    bars = min(_BARS, high - low + 1)
    if high > 20 * low:
        edges = np.exp(np.linspace(math.log(low), math.log(high + 1), bars + 1))
    else:
        edges = np.linspace(low, high + 1, bars + 1)
    edges = np.unique([low, *np.rint(edges[1:-1]).astype(int), high + 1])
    counts, _ = np.histogram(np.clip(lengths, low, high), edges)
    width = len(f"{high:,}")
    lines = [f"{'from':>{width}}  rows by {unit}"]
    for start, count in zip(edges, counts.tolist(), strict=False):
        bar = "█" * max(round(_WIDTH * count / counts.max()), 1 if count else 0)
        lines.append(f"{int(start):>{width},}  {bar} {count:,}".rstrip())
    return "\n".join(lines)


def _chain(step: Step) -> str:
    """Every step behind the data with what it read, took away and wrote."""
    rows = []
    for made in lineage(step.inputs):
        counts, lost = made["counts"], Counter(made["lost"])
        gone = [f"{count:,} {reason}" for reason, count in lost.most_common()]
        if counts.get("rejected"):
            gone.append(f"{counts['rejected']:,} rejected")
        read, written = (f"{counts[key]:,}" if key in counts else "" for key in ("read", "written"))
        rows.append((made["step"], read, written, "; ".join(gone)))
    return _table(("step", "rows read", "rows written", "left out"), rows)


def _counted(counts: Counter[str]) -> list[tuple[str, str]]:
    return [(name, f"{count:,}") for name, count in counts.most_common(30)] if set(counts) != {""} else []


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(head: Sequence[str], rows: Any) -> str:
    """A table; empty without rows."""
    lines = ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    if not lines:
        return ""
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines])


def _cell(value: str) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _split(file: Path, files: Sequence[Path]) -> str:
    """What the hub calls the file: a name of a split if it has one, "train" if it is the only one."""
    name = file.name.split(".")[0]
    for split in ("heldout", "validation", "test", "train"):
        if split in name:
            return "validation" if split == "heldout" else split
    return "train" if len(files) == 1 else name.replace("-", "_")
