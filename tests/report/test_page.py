"""The report: what is hostile stays text, what is missing is said, what is shown is what was measured."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmdistill.record.page.load import load_run
from llmdistill.record.page.page import write_report
from llmdistill.record.page.svg import Axis, histogram, line_plot, span, sparkline, thinned
from llmdistill.record.page.text import clipped, safe

HOSTILE = (
    "</pre></script><script>alert(1)</script><img src=http://evil.example/x onerror='a(1)'>\"' \x00\ud800\u202e&amp;"
)
VOID = {"meta", "link", "input", "br", "img", "hr", "wbr"}
METRICS = ("reverse_kl", "forward_kl", "acceptance", "entropy", "top1_agreement")


class Page(HTMLParser):
    """Elements with their attributes; fails on a tag that closes nothing, and at the end on one left open."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def snapshot(step: int, level: float, text: str = "fine") -> dict[str, Any]:
    """What ``run._snapshot`` writes, with numbers that differ everywhere."""
    side: dict[str, Any] = {"step": step, "sequences": {}}
    for i, where in enumerate(("student", "teacher")):
        flat: dict[str, float] = {"tokens": 1000 + i}
        for k, name in enumerate(METRICS):
            value = level * (1 + i / 7 + k / 11)
            flat |= {name: value, f"{name}_low": value * 0.9, f"{name}_high": value * 1.1}
        side[where] = flat
        side["sequences"][where] = {name: [flat[name] * (0.8 + j / 20) for j in range(8)] for name in METRICS}
    return side | {k: [f"{text} {k} {i}" for i in range(3)] for k in ("prompts", "student_answers", "teacher_answers")}


def completion_row(step: int, i: int, text: str = "fine", domain: str | None = "math") -> dict[str, Any]:
    kl = [0.1 * j + i for j in range(5 + i)]
    row: dict[str, Any] = {"step": step, "prompt": f"{text} prompt", "completion": f"{text} completion {i}"}
    return row | {"domain": domain, "finish": "length" if i % 2 else "stop", "reverse_kl": kl}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with everything in it."""
    folder = tmp_path / "quick"
    (folder / "completions").mkdir(parents=True)
    config = "student: {model: tiny}\nteacher: {model: big}\ndata: {heldout: h.jsonl}\ntrain: {max_steps: 6}\n"
    (folder / "config.yaml").write_text(config)
    write_json(folder / "before.json", snapshot(0, 7.0))
    write_json(folder / "after.json", snapshot(6, 0.5))
    write_json(folder / "summary.json", {"steps": 6, "peak_gib": 3.25})
    lines: list[dict[str, Any]] = [
        {
            "step": s,
            "loss": 7.0 / s,
            "distill/reverse_kl": 6.0 / s,
            "time/rollout": 1.0,
            "memory/peak_gib": 3.0,
        }
        for s in range(1, 7)
    ]
    lines.insert(3, {"step": 3, "eval_student/reverse_kl": 2.5, "eval_student/reverse_kl_low": 2.0})
    lines.append({"step": 6, "train_runtime": 74.34})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (3, 6):
        write_completions(folder, step, [completion_row(step, i) for i in range(4)])
    return folder


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value))


def write_completions(folder: Path, step: int, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), folder / "completions" / f"step-{step:06d}.parquet")


def page_of(folder: Path) -> Page:
    target = write_report(folder)
    assert target == folder / "report.html" and not list(folder.glob("*.tmp"))
    return Page(target.read_text(encoding="utf-8"))


def test_every_measured_number_is_on_the_page_unrounded(run: Path) -> None:
    shown = {d["value"] for d in page_of(run).all("data")}
    for side in (snapshot(0, 7.0), snapshot(6, 0.5)):
        for where in ("student", "teacher"):
            assert {repr(float(side[where][m + end])) for m in METRICS for end in ("", "_low", "_high")} <= shown


def test_headline_says_whether_the_change_is_more_than_noise(run: Path) -> None:
    text = page_of(run).text
    assert "7.000 before [ 6.300 , 7.700 ]" in text and "0.500 after [ 0.450 , 0.550 ]" in text
    assert "More than sampling noise : the student is closer to the teacher, by −6.500" in text
    assert "8 held-out sequences" in text
    write_json(run / "after.json", snapshot(6, 9.0))
    assert "the student is further from the teacher" in page_of(run).text


def test_paired_prompts_are_compared_prompt_by_prompt(run: Path) -> None:
    """Every prompt a little better, and the two intervals nearly the same: what the marginal ones cannot see."""
    write_json(run / "after.json", snapshot(6, 6.5))  # [5.85, 7.15] meets [6.3, 7.7]; each sequence is 7 % lower
    text = page_of(run).text
    assert "More than sampling noise : the student is closer to the teacher, by −0.500 (−7 %)" in text
    # the other way round: means apart, but one prompt has all of the change
    before, after = snapshot(0, 7.0), snapshot(6, 5.0)
    values = [7.0 * (0.8 + j / 20) for j in range(8)]
    before["sequences"]["student"]["reverse_kl"] = values
    after["sequences"]["student"]["reverse_kl"] = [values[0] - 16, *(v + 0.01 for v in values[1:])]
    write_json(run / "before.json", before)
    write_json(run / "after.json", after)
    text = page_of(run).text
    assert "This may be sampling noise : prompt by prompt the change of −2.000" in text and "which holds 0" in text


def test_without_the_same_sequences_on_both_sides_nothing_is_judged(run: Path) -> None:
    after = snapshot(6, 0.5)
    del after["sequences"]["student"]["reverse_kl"][3]
    write_json(run / "after.json", after)
    text = page_of(run).text
    assert "There are no values of the same sequences before and after to judge that by" in text


def test_hostile_text_is_inert_everywhere(run: Path) -> None:
    for name, step, level in (("before", 0, 7.0), ("after", 6, 0.5)):
        write_json(run / f"{name}.json", snapshot(step, level, HOSTILE))
    hostile = HOSTILE.encode("utf-8", "replace").decode()  # Parquet holds no lone surrogates
    rows = [completion_row(6, i, hostile, domain=f"{hostile}{i}") for i in range(4)]
    write_completions(run, 6, [row | {"finish": f"{hostile}{row['finish']}"} for row in rows])
    values = {
        "student": {"model": HOSTILE},
        "teacher": {"model": HOSTILE},
        "objective": {"divergence": HOSTILE},
    }
    write_json(run / "config.yaml", values)  # JSON is YAML
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, HOSTILE: HOSTILE, "loss": HOSTILE, "train_runtime": HOSTILE}) + "\n")
    page = page_of(run)
    assert len(page.all("script")) == 1 and not page.all("img")
    raw = (run / "report.html").read_text()
    assert "<script>alert" not in raw and "<img" not in raw and "\x00" not in raw
    assert not [k for _, attributes in page.elements for k in attributes if k.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") > 20  # shown as text


def test_the_page_loads_nothing(run: Path) -> None:
    page, raw = page_of(run), (run / "report.html").read_text()
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, name)
    assert "url(" not in raw and "@import" not in raw and "http:" not in raw and "https:" not in raw
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'")


def test_tables_have_headers_and_plots_are_described_once(run: Path) -> None:
    page = page_of(run)
    assert len(page.all("table")) == len(page.all("caption")) == 2
    assert {th.get("scope") for th in page.all("th")} == {"row", "col"}
    ids = [a["id"] for _, a in page.elements if a.get("id")]
    assert len(ids) == len(set(ids))
    for svg in page.all("svg"):
        assert svg["role"] == "img" and (svg.get("aria-label") or set(str(svg["aria-labelledby"]).split()) <= set(ids))
    assert "held-out, student’s samples: 7.000 at step 0, 0.500 at step 6" in page.text


def test_a_killed_run_shows_what_there_is(run: Path) -> None:
    for name in ("after.json", "summary.json"):
        (run / name).unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 0.')
    text = page_of(run).text
    assert "What is missing" in text and "the run is not finished" in text and "last logged step: 6 of 6" in text
    assert "1 unreadable line(s) left out" in text and "no change can be stated" in text
    assert "7.000" in text and "Student after not measured" in text


def test_a_run_without_heldout_prompts_says_so(run: Path) -> None:
    write_json(run / "before.json", {})
    write_json(run / "after.json", {})
    (run / "config.yaml").write_text("data: {heldout: null}\n")
    text = page_of(run).text
    assert "no held-out prompts (data.heldout)" in text and "is not finished" not in text
    assert "No held-out prompts were answered" in text and "Over the steps" in text


def test_a_run_from_disk_shows_the_datasets_text(run: Path) -> None:
    """Its teacher was only stored: no samples of the student were measured, and the teacher answered nothing."""
    for name, step, level in (("before", 0, 7.0), ("after", 6, 0.5)):
        whole = snapshot(step, level)
        side = {k: whole[k] for k in ("step", "prompts", "student_answers")}
        side |= {"dataset": whole["student"], "sequences": {"dataset": whole["sequences"]["student"]}}
        write_json(run / f"{name}.json", side)
    (run / "config.yaml").write_text("student: {model: s}\nteachers: [{stored: a}, {name: T, model: b}]\n")
    text = page_of(run).text
    assert "Reverse KL to the teacher on the dataset’s text" in text and "7.000 before [ 6.300 , 7.700 ]" in text
    assert "More than sampling noise" in text and "8 held-out sequences" in text and "s learns from a + T" in text
    assert "What is missing" not in text and "Teacher not measured" in text


def test_a_run_whose_held_out_rows_the_store_lacks_says_so(run: Path) -> None:
    for name, step in (("before", 0), ("after", 6)):
        write_json(run / f"{name}.json", {"step": step, "not_measured": "they have no completions"})
    text = page_of(run).text
    assert "the teacher is only stored: they have no completions" in text and "is not finished" not in text


@pytest.mark.parametrize(
    "part", ["config.yaml", "before.json", "after.json", "summary.json", "metrics.jsonl", "completions"]
)
@pytest.mark.parametrize("damage", ["gone", "torn", "odd"])
def test_any_part_may_be_gone_torn_or_of_another_shape(run: Path, part: str, damage: str) -> None:
    target = run / part
    for file in list(target.iterdir()) if target.is_dir() else [target]:
        if damage == "gone":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:40] if damage == "torn" else b"[1, null, {}]\n")
    text = page_of(run).text
    if part != "summary.json":
        assert "What is missing" in text


def test_an_empty_folder_gives_a_page(tmp_path: Path) -> None:
    text = page_of(tmp_path).text
    assert "metrics.jsonl is not there" in text and "config.yaml is not there" in text


def test_numbers_that_are_none_or_not_finite_break_nothing(run: Path) -> None:
    after = snapshot(6, 0.5)
    after["student"] |= {"reverse_kl": float("nan"), "acceptance": None, "entropy": float("inf")}
    after["sequences"]["student"]["reverse_kl"] = [float("nan"), None, 0.5]
    write_json(run / "after.json", after)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": NaN, "distill/reverse_kl": Infinity, "distill/entropy": "high"}\n')
    write_completions(run, 6, [completion_row(6, 0) | {"reverse_kl": [], "finish": None, "domain": None}])
    text = page_of(run).text
    raw = (run / "report.html").read_text()
    assert "after: not measured" in text and not re.search(r'[ "MVLH](nan|inf)[ "VLH]', raw)


def test_one_sequence_is_nothing_to_judge_by(run: Path) -> None:
    for name, step, level in (("before", 0, 7.0), ("after", 6, 0.5)):
        side = snapshot(step, level)
        for m in METRICS:  # bootstrap_ci of one item: both bounds are the mean
            side["student"] |= {f"{m}_low": side["student"][m], f"{m}_high": side["student"][m]}
        side["sequences"]["student"] = {m: [side["student"][m]] for m in METRICS}
        write_json(run / f"{name}.json", side)
    assert "There are no values of the same sequences before and after to judge that by" in page_of(run).text


def test_a_long_and_large_run_stays_below_600_kb(run: Path) -> None:
    keys = ("loss", "grad_norm", "time/rollout", "time/teacher", *(f"distill/{m}" for m in METRICS))
    lines = [{"step": s, **{k: 1 + (s * 7919 % 101) / 50 for k in keys}} for s in range(1, 20_001)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (20_000, 19_000, 18_000):
        rows = [completion_row(step, i, '"' * 50_000) | {"reverse_kl": [0.123456] * 8192} for i in range(32)]
        write_completions(run, step, rows)
    write_json(run / "after.json", snapshot(6, 0.5, "<" * 100_000))
    (run / "config.yaml").write_text("data: {heldout: x}\nnote: '" + "&" * 100_000 + "'\n")
    page_of(run)
    assert (run / "report.html").stat().st_size < 600_000


def test_completions_are_the_newest_and_of_all_lengths(run: Path) -> None:
    for step in range(10, 20):  # a round is stored shortest first
        write_completions(run, step, [completion_row(step, i) for i in range(40)])
    rows = load_run(run).completions
    assert [r["step"] for r in rows] == [s for s in (19, 18, 17, 16) for _ in range(15)]
    lengths = [len(r["reverse_kl"]) for r in rows[:15]]
    assert lengths == sorted(lengths) and lengths[0] == 5 and lengths[-1] == 44
    page = page_of(run)
    assert len([d for d in page.all("details") if d.get("class") == "completion"]) == 60
    said = [s["aria-label"] for s in page.all("svg") if s.get("class") == "spark"]
    assert said[14] == "reverse KL per token: mean 41.150, highest 43.300 at token 44 of 44"  # 39 + 0.1 j, j < 44


def test_clipped_text_counts_escaped_bytes_and_keeps_the_asked_end() -> None:
    assert safe('<a b="c">') == "&lt;a b=&quot;c&quot;&gt;"
    assert clipped("short", 100) == "short"
    front, back = clipped("<" * 50 + "end", 40), clipped("start" + "é" * 30 + "tail", 10, keep_end=True)
    assert front.startswith("&lt;" * 10 + " …") and "43 characters not shown" in front
    assert back.endswith("… ééétail") and "32 characters not shown" in back


def test_axes_hold_the_data_and_tick_on_round_numbers() -> None:
    assert span([0.1, 7.8]) == (0.0, 8.0) and span([5.0, 5.0])[0] < 5 < span([5.0, 5.0])[1]
    low, high = span([4.1, 5.23])
    assert low <= 4.1 and high >= 5.23 and Axis(low, high, 0, 1).ticks()[-1] == pytest.approx(high)
    assert Axis(0.2, 20, 0, 100, log=True).ticks() == pytest.approx([0.2, 0.5, 1, 2, 5, 10, 20])
    assert Axis(1, 100, 0, 100, log=True).at(10) == pytest.approx(50)
    assert line_plot("empty", "nats", []) == "" and histogram("empty", "nats", [("a", "c1", [])]) == ""
    assert sparkline([], 0, 1, "none") == "" and "NaN" not in sparkline([-1.0, 2.0], -1, 2, "signed")


def test_thinning_keeps_spikes_and_ends() -> None:
    ys = [1.0] * 5000
    ys[1234], ys[3210] = 99.0, -99.0
    kept = thinned(range(5000), ys)
    assert len(kept) <= 302 and kept[0] == (0, 1.0) and kept[-1] == (4999, 1.0)
    assert (1234, 99.0) in kept and (3210, -99.0) in kept


def test_a_run_on_pairs_shows_margins_and_no_teacher(tmp_path: Path) -> None:
    side = lambda margin, low, high: {  # noqa: E731
        "step": 0 if margin < 0.1 else 8,
        "pairs": {
            "margin": margin, "margin_low": low, "margin_high": high,
            "accuracy": 0.75, "accuracy_low": 0.6, "accuracy_high": 0.9,
            "chosen_logp": -0.25, "chosen_logp_low": -0.3, "chosen_logp_high": -0.2,
        },
        "sequences": {"pairs": {"chosen_logp": [-0.1, -0.4] * 4, "rejected_logp": [-0.1 - margin, -0.4 - margin] * 4}},
    }  # fmt: skip
    (tmp_path / "before.json").write_text(json.dumps(side(0.05, 0.01, 0.09)))
    (tmp_path / "after.json").write_text(json.dumps(side(0.31, 0.22, 0.4)))
    lines = [{"step": s, "loss": 1 / s, "redi/chosen_logp": -1 / s, "redi/rejected_logp": -2 / s} for s in (1, 2, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.yaml").write_text("objective: {method: redi, chosen_column: chosen}\n")
    page = Page(write_report(tmp_path).read_text())
    assert "Margin of the chosen side on held-out pairs" in page.text and "Reverse KL to the teacher" not in page.text
    assert "More than sampling noise : the margin grew, by +0.260" in page.text and "on 8 held-out pairs" in page.text
    for shown in ("Ranked right", "Log-prob of a token", "0.31", "redi"):
        assert shown in page.text
    assert "No logged completions" not in page.text


def test_pairs_without_a_wrong_side_are_shown_by_their_right_one(tmp_path: Path) -> None:
    for name, value in (("before", -1.0), ("after", -0.2)):
        side = {"chosen_logp": value, "chosen_logp_low": value - 0.1, "chosen_logp_high": value + 0.1}
        measured = {"step": 0, "pairs": side, "sequences": {"pairs": {"chosen_logp": [value] * 6}}}
        (tmp_path / f"{name}.json").write_text(json.dumps(measured))
    (tmp_path / "config.yaml").write_text("objective: {method: sft, chosen_column: chosen}\n")
    page = Page(write_report(tmp_path).read_text())
    assert "Log-prob of the chosen side on held-out pairs" in page.text
    assert "More than sampling noise : the chosen side became likelier, by +0.800" in page.text


def test_histograms_that_stand_beside_each_other_have_one_scale() -> None:
    """The same value lies at the same place and one sequence is as high, whatever else a plot shows."""
    few = [("before", "c4", [1.0, 2.0]), ("after", "c1", [1.0])]
    many = [("before", "c4", [0.1] * 40), ("after", "c1", [30.0] * 3)]
    first, second = (histogram("t", "nats", groups, beside=[*few, *many]) for groups in (few, many))
    ticks = [re.findall(r'class="grid" d="M([0-9.]+)', plot) for plot in (first, second)]
    assert ticks[0] == ticks[1] and "log scale" in first and "log scale" in second
    assert ">40<" in first and ">40<" in second  # the height of the axis
    alone = histogram("t", "nats", few)
    assert "log scale" not in alone and ">40<" not in alone
