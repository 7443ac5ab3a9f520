"""The part of the page to read: answers side by side and logged completions."""

from __future__ import annotations

from typing import Any

from llmdistill.record.page.load import RunData, as_list, finite
from llmdistill.record.page.svg import sparkline
from llmdistill.record.page.text import clipped, exact, name, safe, show

MOST_PROMPTS, PROMPT_BYTES, ANSWER_BYTES = 6, 2500, 5000
COMPLETIONS_BYTES = 240_000  # of the whole list: a page of hostile or very long text stays a page


def answers(data: RunData) -> str:
    """Every shown prompt with what the teacher, the student before and the student after said (greedy)."""
    prompts = as_list(data.after.get("prompts")) or as_list(data.before.get("prompts"))
    if not prompts:
        return '<p class="none">No held-out prompts were answered in this run.</p>'
    after_first = (data.after, data.before)
    teacher = next((found for side in after_first if (found := as_list(side.get("teacher_answers")))), [])
    columns = (
        ("Teacher", "c3", teacher),
        ("Student before", "c4", as_list(data.before.get("student_answers"))),
        ("Student after", "c1", as_list(data.after.get("student_answers"))),
    )
    parts = []
    for i, prompt in enumerate(prompts[:MOST_PROMPTS]):
        cells = []
        for who, colour, texts in columns:
            text = "<em>not measured</em>"
            if i < len(texts):
                text = clipped(texts[i], ANSWER_BYTES) or "<em>empty answer</em>"
            cells.append(f'<div class="answer {colour}"><h4>{who}</h4><pre dir="auto">{text}</pre></div>')
        shown = clipped(str(prompt).strip(), PROMPT_BYTES, keep_end=True)
        parts.append(
            f'<article class="card"><h3>Prompt {i + 1}</h3>'
            f'<pre class="prompt" dir="auto" tabindex="0">{shown}</pre>'
            f'<div class="answers">{"".join(cells)}</div></article>'
        )
    return "".join(parts) + '<p class="note">Greedy decoding, special tokens of the answers left out.</p>'


def completions(data: RunData) -> str:
    """A list of logged completions that can be filtered and sorted, newest steps first."""
    if not data.completions:
        return '<p class="none">No completions were logged.</p>'
    rows = [(row, _numbers(row.get("reverse_kl"))) for row in data.completions]
    everything = sorted(v for _, values in rows for v in values)
    scale = (everything[0], everything[int(0.99 * (len(everything) - 1))]) if everything else (0.0, 1.0)
    limit = min(6000, COMPLETIONS_BYTES // len(rows))
    items = [_completion(row, values, scale, limit) for row, values in rows]
    filters = _select("domain", rows) + _select("finish", rows)
    sort = (
        '<label>order <select id="order"><option value="">newest first</option>'
        '<option value="-1">highest KL first</option><option value="1">lowest KL first</option></select></label>'
    )
    steps = sorted({int(finite(row.get("step")) or 0) for row, _ in rows})
    return (
        '<form class="filters" hidden><label>contains <input id="contains" type="search"></label>'
        f'{filters}{sort}<output id="count" aria-live="polite">{len(rows)} shown</output></form>'
        f'<div id="completions">{"".join(items)}</div>'
        f'<p class="note">{len(rows)} completions, sampled evenly over length from the logged steps {steps[0]} to '
        f"{steps[-1]}. Small bars: reverse KL per token, in order, all on one scale up to {show(scale[1])} nats "
        "(99th percentile; higher ones are cut). All completions are in completions/*.parquet.</p>"
    )


def _completion(row: dict[str, Any], values: list[float], scale: tuple[float, float], limit: int) -> str:
    mean = sum(values) / len(values) if values else None
    facts = [f"step {safe(row.get('step', '–'))}"]
    bars = ""
    if mean is not None:
        top = max(range(len(values)), key=lambda i: values[i])
        facts += [f"{len(values)} tokens", f"mean KL {exact(mean)}"]
        highest = f"highest {show(values[top])} at token {top + 1} of {len(values)}"
        bars = sparkline(values, *scale, f"reverse KL per token: mean {show(mean)}, {highest}")
    facts += [f'<bdi class="tag">{name(row[k])}</bdi>' for k in ("domain", "finish") if row.get(k)]
    text = str(row.get("completion") or "")
    first = name(" ".join(text[:400].split())[:110], 400) or "<em>empty</em>"
    domain, finish = (name(row.get(key) or "") for key in ("domain", "finish"))
    prompt = clipped(row.get("prompt") or "", limit // 3, keep_end=True)
    return (
        f'<details class="completion" data-domain="{domain}" data-finish="{finish}" '
        f'data-kl="{0.0 if mean is None else mean:.6g}"><summary>'
        f'<span class="facts">{bars}{" ".join(f"<span>{f}</span>" for f in facts)}</span>'
        f'<span class="first" dir="auto">{first}</span></summary>'
        f'<h4>Prompt</h4><pre class="prompt" dir="auto">{prompt}</pre>'
        f'<h4>Completion</h4><pre dir="auto">{clipped(text, limit - limit // 3)}</pre></details>'
    )


def _select(key: str, rows: list[tuple[dict[str, Any], list[float]]]) -> str:
    names = sorted({name(row.get(key) or "") for row, _ in rows} - {""})
    if len(names) < 2:
        return ""
    options = "".join(f'<option value="{n}">{n}</option>' for n in names)
    return f'<label>{key} <select id="{key}"><option value="">all</option>{options}</select></label>'


def _numbers(values: Any) -> list[float]:
    return [v for x in as_list(values) if (v := finite(x)) is not None]
