"""``report.html``: one page about a run, without network, scripts of others or anything that must be installed.

Shown is what the run folder holds, whatever is missing; ``llmdistill report RUN`` writes it again at any time.
"""

from __future__ import annotations

import base64
import hashlib
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from string import Template

from llmdistill.extras import installed_version
from llmdistill.files import atomic_write
from llmdistill.record.page.load import RunData, as_dict, as_list, finite, load_run
from llmdistill.record.page.numbers import curves, headline, spread, tables
from llmdistill.record.page.samples import answers, completions
from llmdistill.record.page.text import clipped, duration, exact, name, safe

CONFIG_BYTES = 40_000


def write_report(run: Path) -> Path:
    """Writes ``report.html`` into the run folder ``run`` and returns its path. The file is replaced in one move."""
    target = Path(run) / "report.html"
    atomic_write(target, render(load_run(Path(run))))
    return target


def render(data: RunData) -> str:
    """The page as one string."""
    parts = files("llmdistill.record.page")
    style, script, page = ((parts / f"page.{kind}").read_text("utf-8") for kind in ("css", "js", "html"))
    folder = data.path.resolve().name
    return Template(page).substitute(
        title=safe(f"{folder}: distillation run"),
        name=safe(folder),
        style=style,
        script=script,
        # The only script that may run is ours, even if something hostile got past the escaping.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        subtitle=_subtitle(data),
        headline=headline(data),
        missing=_missing(data),
        facts=_facts(data),
        tables=tables(data),
        curves=curves(data),
        spread=spread(data),
        answers=answers(data),
        completions=completions(data),
        config=_config(data),
        environment=safe(environment()),
    )


def environment() -> str:
    """What wrote the page, in one line."""
    names = ("llmdistill", "torch", "transformers", "accelerate", "vllm")
    packages = [f"{name} {version}" for name in names if (version := installed_version(name))]
    device = f"{os.cpu_count()} CPU cores"
    torch = sys.modules.get("torch")  # never imported for this line alone
    if torch is not None and torch.cuda.is_available():
        device = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}"
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    python = f"Python {platform.python_version()}"
    return (
        f"Written {now} with {', '.join([python, *packages])}, on {platform.system()} {platform.machine()}, {device}."
    )


def _subtitle(data: RunData) -> str:
    student = data.option("student", "model")
    entries = [as_dict(t) for t in (data.config.get("teacher"), *as_list(data.config.get("teachers")))]
    labels = [next((str(t[k]) for k in ("name", "model", "url", "stored") if t.get(k)), "") for t in entries]
    teacher = " + ".join(filter(None, labels))
    if not student or not teacher:
        return ""
    return f'<p class="models"><bdi>{name(student)}</bdi> learns from <bdi>{name(teacher)}</bdi></p>'


def _missing(data: RunData) -> str:
    if not data.missing:
        return ""
    items = "".join(f"<li>{clipped(sentence, 400)}</li>" for sentence in data.missing[:12])
    return f'<aside class="missing" aria-label="What is missing"><h2>What is missing</h2><ul>{items}</ul></aside>'


def _facts(data: RunData) -> str:
    runtime = next((v for line in reversed(data.metrics) if (v := finite(line.get("train_runtime")))), None)
    peak = finite(data.summary.get("peak_gib")) or max(data.curve("memory/peak_gib")[1], default=None)
    objective = [data.option("objective", k) for k in ("method", "divergence", "estimator")]
    rollouts = [data.option("rollouts", k) for k in ("engine", "max_new_tokens", "samples_per_prompt")]
    rows = {**as_dict(data.summary.get("rows")), **as_dict(data.summary.get("skipped"))}
    told = [f"{int(n):,} {clipped(what, 60)}" for what, value in rows.items() if (n := finite(value))]
    facts = {
        "steps": f"{data.last_step:,}",
        "rows not as they stood": ", ".join(told) or None,
        "training time": safe(duration(runtime)) if runtime else None,
        "peak memory": f"{exact(peak)} GiB" if peak else None,
        "objective": ", ".join(name(x) for x in objective if x) or None,
        "rollouts": "{}, at most {} tokens, {} per prompt".format(*(name(x) for x in rollouts))
        if all(rollouts)
        else None,
        "learning rate": name(rate) if (rate := data.option("train", "learning_rate")) else None,
    }
    items = "".join(f"<div><dt>{term}</dt><dd>{value}</dd></div>" for term, value in facts.items() if value)
    return f'<dl class="facts">{items}</dl>'


def _config(data: RunData) -> str:
    if not data.config_text:
        return '<p class="none">No config.yaml.</p>'
    text = clipped(data.config_text, CONFIG_BYTES)
    return f'<details><summary>config.yaml, every setting of the run</summary><pre tabindex="0">{text}</pre></details>'
