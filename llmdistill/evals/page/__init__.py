"""``report.html`` of an evaluation: the numbers, and every problem with its samples to read, in one file.

The page asks nothing of a network and nothing of an installed tool. Numbers and plots are made here; samples travel
compressed (``packing``) and are laid out by the page's own scripts when they are opened:

    vendor/        Temml (LaTeX to MathML) and markdown-it, as published: ``python eval/vendor.py`` remakes them
    pieces.js      where code and formulas are; a formula that Temml does not understand is shown as its source
    stretch.js     tall brackets where there is no mathematical font
    text.js        Markdown and folded thinking in what a model wrote
    list.js        the list, of which only the rows near the screen are in the page
    search.js      search in the samples, in a worker
    browser.js     filters and orders, one problem's samples

Everything a model wrote is hostile until shown: it enters the page escaped or compressed, the scripts make text nodes
of it and never markup, and the page's policy lets no other script run and nothing be loaded. (A worker may be made of a
``blob:`` only; only the page's own script can make one, and the worker is under the same policy.)
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from llmdistill.evals.page import numbers
from llmdistill.evals.page.packing import Packed, pack
from llmdistill.evals.page.settings import facts, settings
from llmdistill.evals.records import EvalFolder
from llmdistill.files import atomic_write
from llmdistill.record.page.load import finite
from llmdistill.record.page.page import environment
from llmdistill.record.page.text import name, safe

SCRIPTS = (
    *("vendor/markdown-it.min.js", "vendor/temml.min.js", "pieces.js", "stretch.js", "text.js", "list.js"),
    *("search.js", "browser.js"),
)


def write_page(folder: str | Path) -> Path:
    """Writes ``report.html`` into the evaluation's folder and returns its path. The file is replaced in one move."""
    run = EvalFolder(folder)
    target = run.path / "report.html"
    atomic_write(target, render(run))
    return target


def render(run: EvalFolder) -> str:
    """The page as one string. What the folder lacks is left out and said."""
    config = run.read_config() or {}
    results = run.read_results() if run.results_file.is_file() else {}
    problems, samples = run.problems(), run.samples()
    grades = run.grades()
    n = int(finite(results.get("n")) or finite(config.get("n")) or 1)
    packed = pack(problems, samples.of, grades.of, n, prompts_of=run.prompts().of)
    both = {**config, **results}
    suite, model = both.get("suite") or run.path.resolve().name, both.get("model")
    script = _script()
    return Template(_part("page.html")).substitute(
        title=name(f"{suite}: {model}" if model else suite, 200),
        name=name(suite, 200),
        style=_style(),
        script=script,
        # The only script that may run is ours, even if something hostile got past the escaping.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        subtitle=f'<p class="models"><bdi>{name(model, 300)}</bdi></p>' if model else "",
        headline=numbers.headline(results),
        cards=numbers.cards(results),
        missing=_missing(results, len(problems), len(samples), len(grades), n),
        groups=numbers.groups(results),
        verdicts=numbers.verdicts(results),
        packing=_packing(packed, len(samples)),
        facts=facts(config),
        settings=settings(config),
        environment=safe(environment()),
        blocks="\n".join([_data("index", packed.index), *(_data(f"data-{i}", b) for i, b in enumerate(packed.blocks))]),
    )


def _part(file: str) -> str:
    return (files("llmdistill.evals.page") / file).read_text("utf-8")


def _style() -> str:
    return (files("llmdistill.record.page") / "page.css").read_text("utf-8") + _part("page.css")


def _script() -> str:
    # One function around all of them: nothing of theirs is global.
    return '"use strict";\n(() => {\n' + "\n".join(_part(file) for file in SCRIPTS) + "})();\n"


def _data(key: str, block: str) -> str:
    return f'<script type="application/octet-stream" id="{key}">{block}</script>'


def _missing(results: dict[str, Any], problems: int, samples: int, grades: int, n: int) -> str:
    said = []
    if not results:
        said.append("results.json is not there: the run is not graded yet, or was cut off before its end.")
    if samples < problems * n:
        said.append(f"{samples:,} of {problems * n:,} samples are there ({problems:,} problems, {n:,} samples each).")
    if grades < samples:
        said.append(f"{samples - grades:,} samples are not graded.")
    items = "".join(f"<li>{sentence}</li>" for sentence in said)
    return f'<aside class="missing"><h2>What is missing</h2><ul>{items}</ul></aside>' if said else ""


def _packing(packed: Packed, samples: int) -> str:
    said = []
    if packed.clipped:
        said.append(
            f"{packed.clipped:,} of {samples:,} samples are longer than {packed.longest:,} characters and are shown "
            "with their head and tail."
        )
    if packed.absent:
        said.append(f"{packed.absent:,} samples are not on this page, to bound its size.")
    if said:
        said.append("The folder’s samples/*.jsonl have everything.")
    return f'<p class="note">{" ".join(said)}</p>' if said else ""
