"""The measured part of the page: headline, tables before and after, curves over steps, spread over sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmdistill.record.metrics import METRICS, NATS, Metric
from llmdistill.record.page.load import RunData, as_dict, as_list, finite
from llmdistill.record.page.paired import Change, change
from llmdistill.record.page.svg import Series, histogram, interval_plot, line_plot, running_mean
from llmdistill.record.page.text import exact, safe, show

TEXTS = (
    ("student", "the student’s own samples"),
    ("teacher", "the teacher’s text"),
    ("dataset", "the dataset’s text"),  # of a run whose teacher was only stored, in place of the two above
    ("answers", "greedy answers, beside the teacher’s"),
    ("pairs", "held-out pairs"),  # of a run on pairs, which has no teacher
)
OF_PAIRS = ("margin", "accuracy", "chosen_logp", "rejected_logp")
SMOOTHED_FROM = 40  # log lines: a noisy curve of at least as many gets a running mean
NOT_NOISY = ("learning_rate", "memory/peak_gib")
PAIRED_NOTE = (
    "The prompts are the same before and after, so a change has an interval of its own, over the differences prompt by "
    "prompt; noise: it holds 0, or there are too few prompts for a sign-flip test to tell."
)
LINE_COLOURS = ("c1", "c2", "c3", "c4")


# metric -> title, unit, lines of (key, label) drawn together
CURVES: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Loss", "per token", (("loss", "training"),)),
    *((m.label, m.unit, ((f"distill/{m.name}", "training"),)) for m in METRICS if m.name not in OF_PAIRS),
    ("Log-prob of a token", "nats", (("redi/chosen_logp", "chosen"), ("redi/rejected_logp", "rejected"))),
    ("Margin", NATS, (("redi/margin", "training"),)),
    ("Ranked right", "share of pairs", (("redi/accuracy", "training"),)),
    ("Schedule", "share of the teacher in TAID’s target", (("distill/schedule", "t"),)),
    ("Reward", "mean of a completion", (("rollout/reward", "training"),)),
    ("Learning rate", "per step", (("learning_rate", "learning rate"),)),
    ("Gradient norm", "before clipping", (("grad_norm", "gradient norm"),)),
    (
        "Throughput",
        "tokens per second",
        (("rollout/tokens_per_second", "rollout"), ("teacher/positions_per_second", "teacher scoring")),
    ),
    (
        "Time per phase",
        "seconds per call",
        (
            ("time/rollout", "rollout"),
            ("time/teacher", "teacher"),
            ("time/student", "student, forward and backward"),
            ("time/optimizer", "optimizer"),
        ),
    ),
    ("Peak memory", "GiB", (("memory/peak_gib", "so far"),)),
    ("Completion length", "tokens", (("rollout/mean_length", "mean"),)),
    (
        "Truncated completions",
        "share of sequences",
        (("rollout/truncated_fraction", "cut at max_new_tokens"),),
    ),
)


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Mapping[str, Any], name: str) -> Estimate | None:
        value = finite(values.get(name))
        return (
            value
            if value is None
            else cls(value, finite(values.get(f"{name}_low")), finite(values.get(f"{name}_high")))
        )

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None or self.low == self.high else (self.low, self.high)

    def html(self) -> str:
        bounds = self.interval
        if bounds is None:
            return exact(self.value)
        return f'{exact(self.value)} <span class="ci">[{exact(bounds[0])}, {exact(bounds[1])}]</span>'


KICKERS = {
    "margin": "Margin of the chosen side",
    "chosen_logp": "Log-prob of the chosen side",
    "reverse_kl": "Reverse KL to the teacher",
    "forward_kl": "Forward KL from the teacher",
}
# What a change is of, when it is up, when it is down.
SUBJECTS = {
    "margin": ("the margin", "grew", "shrank"),
    "chosen_logp": ("the chosen side", "became likelier", "became less likely"),
    "reverse_kl": ("the student", "is further from the teacher", "is closer to the teacher"),
    "forward_kl": ("the student", "is further from the teacher", "is closer to the teacher"),
}


def headline(data: RunData) -> str:
    """Reverse KL on the student's own samples, before and after, and in plain words what that shows."""
    text, title = _headline_text(data)
    sides = [as_dict(s.get(text)) for s in (data.before, data.after)]
    positives = text == "pairs" and not any("margin" in side for side in sides)  # held-out rows without a wrong side
    told = "reverse_kl" if any("reverse_kl" in side for side in sides) else "forward_kl"
    metric = "chosen_logp" if positives else "margin" if text == "pairs" else told
    before, after = (Estimate.of(side, metric) for side in sides)
    if before is None and after is None:
        return '<p class="verdict">Nothing was measured on held-out prompts, so there is no before and after.</p>'
    of_pairs = text == "pairs"
    count = len(as_list(_sequences(data.after or data.before, text).get("chosen_logp" if of_pairs else metric)))
    on = f"{count or ''} held-out {'pairs' if of_pairs else 'sequences'}".strip()
    words = _verdict(before, after, change(data.before, data.after, text, metric), on, SUBJECTS[metric])
    shown = [_big("before", before), '<span class="arrow" aria-hidden="true">→</span>', _big("after", after)]
    return (
        f'<p class="kicker">{KICKERS[metric]} on {title}, '
        f'nats per token, with 95&nbsp;% intervals</p><div class="big">{"".join(shown)}</div>'
        f'<p class="verdict">{words}</p>'
    )


def _headline_text(data: RunData) -> tuple[str, str]:
    """The student's own samples, where they were measured."""
    if any(as_dict(s.get("pairs")) for s in (data.before, data.after)):
        return TEXTS[4]
    only_dataset = not any(as_dict(s.get("student")) for s in (data.before, data.after))
    return TEXTS[2] if only_dataset and any(as_dict(s.get("dataset")) for s in (data.before, data.after)) else TEXTS[0]


def _big(when: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return f'<div class="figure"><b>–</b><span>{when}: not measured</span></div>'
    bounds = estimate.interval
    ends = f'<span class="ends">[{exact(bounds[0])}, {exact(bounds[1])}]</span>' if bounds else "no interval"
    return f'<div class="figure"><b>{exact(estimate.value)}</b><span>{when} {ends}</span></div>'


def _verdict(
    before: Estimate | None,
    after: Estimate | None,
    paired: Change | None,
    on: str,
    subject: tuple[str, str, str],
) -> str:
    if after is None or before is None:
        here, gone = ("before", "after") if after is None else ("after", "before")
        return f"Measured on {on} {here} training. It is missing {gone} training, so no change can be stated."
    percent = f" ({100 * (after.value / before.value - 1):+.0f}&nbsp;%)".replace("-", "−") if before.value > 0 else ""
    by = f"{_signed(after.value - before.value)}{percent}"
    if paired is None:
        return f"Changed by {by}. There are no values of the same sequences before and after to judge that by."
    bounds = f"95&nbsp;% interval [{exact(paired.low)}, {exact(paired.high)}]"
    if not paired.told:
        why = ", and so few can tell nothing" if paired.leaves_zero_out else ", which holds 0"
        return (
            f"<strong>This may be sampling noise</strong>: prompt by prompt the change of {by} has the {bounds}{why}. "
            f"Measured on {on}; more of them (objective.heldout_sequences) narrow the interval."
        )
    what = f"{subject[0]} {subject[1 if after.value > before.value else 2]}"
    return f"<strong>More than sampling noise</strong>: {what}, by {by}, prompt by prompt on {on} with the {bounds}."


def tables(data: RunData) -> str:
    """One table per text: every metric before and after, with intervals and the change between them."""
    parts = [t for text, title in TEXTS if (t := _table(data, text, title))]
    if not parts:
        return '<p class="none">No held-out measurement in this run folder.</p>'
    if any(as_dict(s.get("pairs")) for s in (data.before, data.after)):
        note = f"Means over pairs with 95&nbsp;% bootstrap intervals. {PAIRED_NOTE}"
        return f'<div class="tables">{"".join(parts)}</div><p class="note">{note}</p>'
    sparse = any("tail_mass" in as_dict(s.get(text)) for s in (data.before, data.after) for text, _ in TEXTS)
    note = (
        "Means per token; 95&nbsp;% bootstrap intervals over whole sequences. The student’s samples are fresh each "
        f"time; the teacher’s text is the same before and after. {PAIRED_NOTE}"
    )
    if sparse:
        note += (
            " The teacher gave its top-k and the tail as one bucket: both KLs are lower bounds of the dense values, "
            "acceptance is an upper bound."
        )
    return f'<div class="tables">{"".join(parts)}</div><p class="note">{note}</p>'


def _intervals(data: RunData) -> str:
    rows = [
        (f"{text} text, {when}", colour, e.value, *(e.interval or (e.value, e.value)))
        for text, _ in TEXTS
        for when, colour, side in (("before", "c4", data.before), ("after", "c1", data.after))
        if (e := Estimate.of(as_dict(side.get(text)), "reverse_kl"))
    ]
    plot = interval_plot("Mean reverse KL with 95 % intervals", NATS, rows) if rows else ""
    return _figure("Mean reverse KL", "95&nbsp;% intervals", plot) if plot else ""


def _figure(title: str, unit: str, plot: str, legend: str = "") -> str:
    return f"<figure><figcaption>{title} <small>{unit}</small></figcaption>{legend}{plot}</figure>"


def _table(data: RunData, text: str, title: str) -> str:
    before, after = as_dict(data.before.get(text)), as_dict(data.after.get(text))
    known = {m.name: m for m in METRICS}
    names = [*known, *(k.removesuffix("_low") for k in {**before, **after} if k.endswith("_low"))]
    body = []
    for name in dict.fromkeys(names):
        a, b = Estimate.of(before, name), Estimate.of(after, name)
        if a is None and b is None:
            continue
        metric = known.get(name) or Metric(name, name, "per token", 0, "")
        cell = _change(metric, a, b, change(data.before, data.after, text, name))
        aim = {1: ", higher is better", -1: ", lower is better", 0: ""}[metric.better]
        body.append(
            f'<tr><th scope="row">{safe(metric.label)}<small>{safe(metric.unit)}{aim}</small></th>'
            f"<td>{a.html() if a else '–'}</td><td>{b.html() if b else '–'}</td>{cell}</tr>"
        )
    if not body:
        return ""
    tokens = [
        f"{exact_count(side['tokens'])} tokens {when}"
        for side, when in ((before, "before"), (after, "after"))
        if finite(side.get("tokens")) is not None
    ]
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="Metrics on {safe(title)}"><table>'
        f'<caption>On {safe(title)}<small>{", ".join(tokens)}</small></caption><thead><tr><th scope="col">metric</th>'
        '<th scope="col">before</th><th scope="col">after</th><th scope="col">change</th></tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def exact_count(value: Any) -> str:
    return f'<data value="{value}">{value:,.0f}</data>'


def _change(metric: Metric, before: Estimate | None, after: Estimate | None, paired: Change | None) -> str:
    if before is None or after is None:
        return "<td>–</td>"
    delta, words, kind = after.value - before.value, "no values of the same sequences", "plain"
    if paired is not None:
        words = "" if paired.told else ", noise"
        if paired.told and metric.better:
            better = delta * metric.better > 0
            words, kind = (", better", "good") if better else (", worse", "bad")
        words = f"[{exact(paired.low)}, {exact(paired.high)}]{words}"
    return f'<td class="{kind}">{_signed(delta)}<small>{words}</small></td>'


def _signed(value: float) -> str:
    return ("+" if value > 0 else "−" if value < 0 else "") + show(abs(value))


def curves(data: RunData) -> str:
    """A plot per metric over steps; held-out measurements are points with intervals on the same axes."""
    figures, absent = [], []
    for title, unit, keys in CURVES:
        series = [s for i, (key, label) in enumerate(keys) for s in _training(data, key, label, LINE_COLOURS[i])]
        name = keys[0][0].removeprefix("distill/")
        if keys[0][0].startswith("distill/") and (held := _heldout(data, name)):
            series.append(held)
        plot = line_plot(title, unit, series)
        if not plot:
            absent.append(title.lower())
            continue
        figures.append(_figure(title, unit, plot, _legend(series)))
    if not figures:
        return '<p class="none">No step was logged.</p>'
    note = f"{_smoothing(data)}Time is the mean of one optimizer step."
    if absent:
        note += f" Not in this run’s log: {', '.join(absent)}."
    return f'<div class="plots">{"".join(figures)}</div><p class="note">{note}</p>'


def _training(data: RunData, key: str, label: str, colour: str) -> list[Series]:
    xs, ys = data.curve(key)
    if not xs:
        return []
    if len(xs) < SMOOTHED_FROM or key in NOT_NOISY:
        return [Series(label, xs, ys, colour)]
    mean = running_mean(ys, _reach(len(xs)))
    return [
        Series(f"{label}, log lines", xs, ys, f"{colour} raw"),
        Series(f"{label}, running mean", xs, mean, colour),
    ]


def _reach(lines: int) -> int:
    return max(2, lines // 40)


def _smoothing(data: RunData) -> str:
    lines = len(data.curve("loss")[0])
    if lines < SMOOTHED_FROM:
        return ""
    return f"Faint lines are the log, strong ones its running mean over {2 * _reach(lines) + 1} lines. "


def _heldout(data: RunData, name: str) -> Series | None:
    """Before, every evaluation, after: on the student's own samples."""
    found: dict[float, Estimate] = {}
    text, _ = _headline_text(data)
    for line in data.metrics:
        if estimate := Estimate.of(line, f"eval_{text}/{name}"):
            found[float(line["step"])] = estimate
    for side in (data.before, data.after):
        step, estimate = finite(side.get("step")), Estimate.of(as_dict(side.get(text)), name)
        if step is not None and estimate:
            found[step] = estimate
    if not found:
        return None
    points = sorted(found.items())
    bounds = [e.interval or (e.value, e.value) for _, e in points]
    return Series(
        "held-out, student’s samples" if text == "student" else "held-out, dataset’s text",
        [step for step, _ in points],
        [e.value for _, e in points],
        "c2",
        dots=True,
        low=[b[0] for b in bounds],
        high=[b[1] for b in bounds],
    )


def _legend(series: list[Series]) -> str:
    named = [s for s in series if not s.colour.endswith(" raw")]
    if len(named) < 2:
        return ""
    items = [
        f'<li><i class="key{" point" if s.dots else ""} {s.colour}"></i>'
        f"{safe(s.label.removesuffix(', running mean'))}</li>"
        for s in named
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def spread(data: RunData) -> str:
    """Histograms of reverse KL per sequence, before and after, on one scale whatever the text."""
    figures, groups_of = [], {}
    for text, title in TEXTS:
        groups_of[title] = [
            (
                when,
                colour,
                [v for x in as_list(_sequences(side, text).get("reverse_kl")) if (v := finite(x)) is not None],
            )
            for when, colour, side in (("before", "c4", data.before), ("after", "c1", data.after))
        ]
    unit, every = f"mean reverse KL of a sequence, {NATS}", [g for groups in groups_of.values() for g in groups]
    for title, groups in groups_of.items():
        plot = histogram(f"Reverse KL per sequence, {title}", unit, groups, beside=every)
        if plot:
            figures.append(_figure(f"On {title}", "sequences", plot))
    if bars := _intervals(data):
        figures.insert(0, bars)
    if not figures:
        return '<p class="none">No per-sequence measurement in this run folder.</p>'
    return f'<div class="plots">{"".join(figures)}</div>'


def _sequences(side: Mapping[str, Any], text: str) -> dict[str, Any]:
    return as_dict(as_dict(side.get("sequences")).get(text))
