"""The numbers of results.json as the page shows them. Nothing is computed here but shares of counts; only rounded.

The schema is that of llmdistill.evals.summary. Any part may be missing: its place on the page is then empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmdistill.evals.page.charts import calibration_plot, group_bars, length_panels, share_bar
from llmdistill.record.page.load import as_dict, as_list, finite
from llmdistill.record.page.text import name, safe, show

MOST_ROWS = 40  # of one breakdown
KINDS = {"right": "v-r", "pass": "v-r", "wrong": "v-w", "no_answer": "v-n", "no_program": "v-n"}
HEALTH = (
    ("truncated", "truncated", "cut at the token limit"),
    ("unfinished_thinking", "thinking not ended", "no </think>, or another unclosed thinking tag"),
    ("no_answer", "no answer", "nothing to judge was found"),
    ("repetitive", "repetitive", "goes round in circles at its end"),
)


def percent(value: Any, digits: int = 1) -> str:
    """A share in per cent, with the unrounded share in the element's ``value``."""
    number = finite(value)
    return "–" if number is None else f'<data value="{number!r}">{100 * number:.{digits}f}</data>'


def _with_sign(value: Any) -> str:
    return f'{percent(value)}<span class="sign"> %</span>'


def whole(value: Any) -> str:
    number = finite(value)
    return "–" if number is None else f'<data value="{number!r}">{number:,.0f}</data>'


def interval(row: Mapping[str, Any]) -> str:
    low, high = finite(row.get("low")), finite(row.get("high"))
    return "" if low is None or high is None else f"{percent(low)} to {percent(high)}"


def headline(results: Mapping[str, Any]) -> str:
    avg = as_dict(results.get("avg"))
    if finite(avg.get("value")) is None:
        return '<div class="hero"><p class="kicker">Not scored yet.</p></div>'
    n, problems = finite(results.get("n")), finite(results.get("problems"))
    once = n == 1
    what = (
        "accuracy, one sample per problem" if once else f"avg@{whole(n)}, the mean share of right samples per problem"
    )
    parts = [f'<div class="figure"><b>{percent(avg["value"])}<small>%</small></b></div>']
    if between := interval(avg):
        parts.append(f'<div class="figure"><strong>{between}</strong> <span>95 % interval over problems</span></div>')
    if finite(avg.get("se")) is not None:
        parts.append(f'<div class="figure"><strong>± {percent(avg["se"])}</strong> <span>standard error</span></div>')
    if finite(results.get("seed_sd")) is not None:
        spread = percent(results["seed_sd"])
        parts.append(f'<div class="figure"><strong>± {spread}</strong> <span>sd between repetitions</span></div>')
    counted = f" on {whole(problems)} problems" if problems is not None else ""
    if (right := _right(results)) is not None:
        counted += f": {right} right"
    counted += "".join(f"; {fact}" for fact in (_drawn_with(results), _length(results)) if fact)
    return f'<div class="hero"><p class="kicker">{what}{counted}</p><div class="big">{"".join(parts)}</div></div>'


def _right(results: Mapping[str, Any]) -> str | None:
    """Of how many samples the score is: "8 of 1,319"."""
    counts = {kind: finite(count) for kind, count in as_dict(results.get("verdicts")).items()}
    total = finite(results.get("samples"))
    if not counts or total is None or None in counts.values():
        return None
    right = sum(int(counts.get(kind) or 0) for kind in ("right", "pass"))
    return f"{whole(right)} of {whole(total)}" + ("" if finite(results.get("n")) == 1 else " samples")


def _drawn_with(results: Mapping[str, Any]) -> str:
    temperature = finite(as_dict(results.get("sampling")).get("temperature"))
    return "" if temperature is None else "greedy" if temperature == 0 else f"temperature {temperature:g}"


def _length(results: Mapping[str, Any]) -> str:
    mean = finite(as_dict(as_dict(results.get("lengths")).get("all")).get("mean"))
    return "" if mean is None else f"{whole(mean)} tokens a sample"


def cards(results: Mapping[str, Any]) -> str:
    """pass@k, maj@k, G-Pass@k, and what else is one number."""
    found = []
    for kind in ("pass", "maj"):
        for k, row in _by_number(results.get(kind)):
            if not (kind == "pass" and k == "1"):  # pass@1 is the headline
                found.append((f"{kind}@{safe(k)}", _with_sign(as_dict(row).get("value")), interval(as_dict(row))))
    for k, different in _by_number(results.get("distinct")):
        value = finite(different)
        shown = "–" if value is None else f'<data value="{value!r}">{value:.2f}</data>'
        found.append((f"different of {safe(k)}", shown, "answers, mean over problems"))
    for k, taus in _by_number(results.get("g_pass")):
        for tau, value in as_dict(taus).items():
            label = f"mG-Pass@{safe(k)}" if tau == "mean" else f"G-Pass@{safe(k)}, {safe(tau)}"
            found.append((label, _with_sign(value), ""))
    health = as_dict(results.get("health"))
    if finite(health.get("finished_avg")) is not None:
        found.append(("if finished", _with_sign(health["finished_avg"]), "truncated left out"))
    lengths = as_dict(as_dict(results.get("lengths")).get("all"))
    if finite(lengths.get("mean")) is not None:
        found.append(("mean length", whole(lengths["mean"]), f"tokens; median {whole(lengths.get('median'))}"))
    items = "".join(
        f"<div><dt>{label}</dt><dd>{value}<small>{more}</small></dd></div>" for label, value, more in found[:24]
    )
    return f'<dl class="cards">{items}</dl>' if items else ""


def groups(results: Mapping[str, Any]) -> str:
    """Per breakdown a table and, next to it, its bars."""
    made = []
    for key, values in as_dict(results.get("groups")).items():
        rows = [(label, as_dict(row)) for label, row in _by_number(values)]
        rows = [(label, row) for label, row in rows if finite(row.get("avg")) is not None]
        if not rows:
            continue
        shown, more = rows[:MOST_ROWS], len(rows) - MOST_ROWS
        body = "".join(
            f'<tr><th scope="row" dir="auto">{name(label)}</th><td>{whole(row.get("problems"))}</td>'
            f'<td>{percent(row["avg"])}</td><td><span class="ci">{interval(row)}</span></td></tr>'
            for label, row in shown
        )
        note = f'<p class="note">{more:,} more groups are in results.json.</p>' if more > 0 else ""
        bars = [(label, _points(row, "avg"), _points(row, "low"), _points(row, "high")) for label, row in shown]
        title = f"By {key}"[:80]
        made.append(
            f'<div class="pair"><div class="scroll"><table><caption>{name(title)}</caption><thead><tr>'
            f'<th scope="col">{name(key, 60)}</th><th scope="col">problems</th>'
            f'<th scope="col">% right</th><th scope="col">95 % interval</th></tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
            f"<figure><figcaption>{name(title)}<small>95 % intervals over problems</small></figcaption>"
            f"{group_bars(title, bars)}</figure></div>{note}"
        )
    return "".join(made) or '<p class="none">The problems of this suite are in no groups.</p>'


def _points(row: Mapping[str, Any], key: str) -> float:
    """Per cent, for a bar; without an interval both of its ends are the value."""
    number = finite(row.get(key))
    return 100 * (number if number is not None else finite(row["avg"]) or 0.0)


def verdicts(results: Mapping[str, Any]) -> str:
    """Kinds of verdicts, extraction stages, health; lengths; calibration."""
    kinds = _counts("Verdicts", "verdict", results.get("verdicts"), KINDS, "v-e")
    stages = _counts("Where the answer was found", "extraction rule", results.get("stages"), {}, "c1")
    plots = "".join(filter(None, (_lengths(results), _calibration(results))))
    tables = "".join(filter(None, (kinds, stages, _health(results))))
    return (
        f'<div class="verdicts">{f"""<div class="plots">{plots}</div>""" if plots else ""}'
        f'<div class="tables">{tables}</div></div>'
        if plots or tables
        else '<p class="none">Nothing was graded.</p>'
    )


def _counts(title: str, what: str, counts: Any, colours: Mapping[str, str], other: str) -> str:
    rows = [(label, number) for label, count in as_dict(counts).items() if (number := finite(count)) is not None]
    total = sum(number for _, number in rows)
    if not total:
        return ""
    body = "".join(
        f'<tr><th scope="row">{name(str(label).replace("_", " ") or "–", 60)}</th><td>{whole(number)}</td>'
        f"<td>{number / total:.1%}{share_bar(number / total, colours.get(label, other))}</td></tr>"
        for label, number in rows[:MOST_ROWS]
    ).replace("%<", " %<")
    return _table(title, (what, "samples", "share"), body)


def _health(results: Mapping[str, Any]) -> str:
    health = as_dict(results.get("health"))
    body = "".join(
        f'<tr><th scope="row">{label}<small>{safe(meaning)}</small></th>'
        f"<td>{percent(health[key])} %{share_bar(finite(health[key]) or 0.0, 'v-t')}</td></tr>"
        for key, label, meaning in HEALTH
        if finite(health.get(key)) is not None
    )
    if finite(health.get("tokens")) is not None:
        body += f'<tr><th scope="row">tokens, all samples</th><td>{whole(health["tokens"])}</td></tr>'
    return _table("Health", ("samples that are", "share"), body) if body else ""


def _lengths(results: Mapping[str, Any]) -> str:
    lengths = as_dict(results.get("lengths"))
    edges = [e for v in as_list(lengths.get("edges")) if (e := finite(v)) is not None]
    panels, rows = [], []
    for key, colour in (("right", "v-r"), ("wrong", "v-w"), ("truncated", "v-t")):
        part = as_dict(lengths.get(key))
        counts = [int(finite(c) or 0) for c in as_list(part.get("counts"))]
        if not sum(counts):
            continue
        numbers = {k: finite(part.get(k)) for k in ("mean", "median", "p90")}
        said = ", ".join(f"{k} {v:,.0f}" for k, v in numbers.items() if v is not None)
        panels.append((key, colour, counts, said))
        cells = "".join(f"<td>{whole(v)}</td>" for v in numbers.values())
        mark = f'<span class="key box {colour}"></span>'
        rows.append(f'<tr><th scope="row">{mark}{key}</th><td>{whole(part.get("n"))}</td>{cells}</tr>')
    plot = length_panels("Length of completions", edges, panels)
    if not plot:
        return ""
    table = _table("Lengths in tokens", ("", "samples", "mean", "median", "p90"), "".join(rows))
    return (
        "<figure><figcaption>Length of completions<small>truncated ones are also in right or wrong</small></figcaption>"
        f"{plot}</figure>{table}"
    )


def _calibration(results: Mapping[str, Any]) -> str:
    calibration = as_dict(results.get("calibration"))
    bins = []
    for row in map(as_dict, as_list(calibration.get("bins"))):
        confidence, accuracy, count = (finite(row.get(k)) for k in ("confidence", "accuracy", "count"))
        if confidence is not None and accuracy is not None and count:
            bins.append((confidence, accuracy, int(count)))
    plot = calibration_plot("Is the majority right?", bins)
    if not plot:
        return ""
    facts = [
        f'{label} <data value="{number!r}">{show(number)}</data>'
        for key, label in (("ece", "Expected calibration error"), ("brier", "Brier score"))
        if (number := finite(calibration.get(key))) is not None
    ]
    return (
        "<figure><figcaption>Is the majority right?<small>by the share of samples that agree</small></figcaption>"
        f'{plot}<p class="note">Dashed: as often right as sure. {", ".join(facts)}.</p></figure>'
    )


def _table(title: str, heads: tuple[str, ...], body: str) -> str:
    columns = "".join(f'<th scope="col">{safe(head)}</th>' if head else "<td></td>" for head in heads)
    return (
        f'<div class="scroll"><table><caption>{safe(title)}</caption><thead><tr>{columns}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _by_number(values: Any) -> list[tuple[str, Any]]:
    """Items whose keys are numbers by number ("2" before "10"), all others as they come."""
    rows = [(str(key), value) for key, value in as_dict(values).items()]
    return sorted(rows, key=lambda row: int(row[0])) if all(k.isascii() and k.isdigit() for k, _ in rows) else rows
