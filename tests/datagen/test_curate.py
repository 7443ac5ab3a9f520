"""Curation: each rule against rows that show it, the order of rules, and what the manifest says of them."""

import json
from collections import Counter

import pytest

from llmdistill.datagen.curation import curate
from llmdistill.datagen.tables import read_rows, write_rows
from llmdistill.errors import UserError

PROSE = (
    "First we take the number of eggs and subtract those that were eaten, then we multiply what is left by the price."
)


def trace(prompt, completion=PROSE, **columns):
    return {"prompt": prompt, "completion": completion, **columns}


def curated(tmp_path, rows, *steps, **settings):
    """The rows that are left, and the manifest."""
    write_rows(tmp_path / "in.jsonl", rows)
    out = tmp_path / "out.jsonl"
    manifest = curate(tmp_path / "in.jsonl", out, steps=steps, **settings)
    return list(read_rows(out)), manifest


def kept(tmp_path, rows, *steps):
    """Numbers of the rows that are left."""
    left, _ = curated(tmp_path, [{**row, "n": i} for i, row in enumerate(rows)], *steps)
    return [row["n"] for row in left]


def test_rules_of_one_row(tmp_path):
    rows = [
        trace("a", finish="stop", passed=True, tokens=30),
        trace("a", finish="length", passed=True, tokens=30),
        trace("a", "<think>so</think>", finish="stop", passed=True, tokens=3),
        trace("a", PROSE + " wait let me see" * 80, finish="stop", passed=True, tokens=300),
        trace("a", "Die Antwort ist 答案是四十二因为六乘以七", finish="stop", passed=True, tokens=20),
        trace("a", finish="stop", passed=False, tokens=30),
        trace("a", finish="stop", passed=None, tokens=30),
        trace("a", finish="stop", passed=True, tokens=3000),
    ]
    steps = ("finished", "structured", "no_loops", "one_writing_system", "right", {"tokens": {"most": 1000}})
    left, manifest = curated(tmp_path, rows, *steps)
    assert left == rows[:1]
    assert manifest.counts["read"] == 8 and manifest.counts["written"] == 1
    assert manifest.lost == {
        "cut off": 1,
        "no answer after thinking": 1,
        "loops at its end": 1,
        "mixes Latin and Han": 1,
        "wrong": 1,
        "not judged": 1,
        "too long": 1,
    }
    assert [(r["rule"], r["left"]) for r in manifest.details["rules"]] == [
        ("finished", 7),
        ("structured", 6),
        ("no_loops", 5),
        ("one_writing_system", 4),
        ("right", 2),
        ("tokens", 1),
    ]


def test_pass_rates_are_of_the_traces_that_are_there(tmp_path):
    rows = [trace(p, passed=v) for p, v in [("never", 0), ("half", 1), ("half", 0), ("always", 1), ("none", None)]]
    assert kept(tmp_path, rows, {"pass_rate": {"least": 0.1, "most": 0.9}}) == [1, 2]
    assert kept(tmp_path / "b", rows, "right", {"pass_rate": {"least": 0.1, "most": 0.9}}) == []
    assert kept(tmp_path / "c", rows, {"pass_rate": {"least": 0.1, "most": 0.9}}, "right") == [1]


def test_exact_duplicates(tmp_path):
    rows = [trace("a", "x y"), trace("a", "x  y\n"), trace("b", "x y"), trace("a", "X y")]
    assert kept(tmp_path, rows, "exact_duplicates") == [0, 2, 3]
    assert kept(tmp_path / "p", rows, {"exact_duplicates": {"of": "prompt"}}) == [0, 2]


def test_near_duplicates_of_completions_and_of_prompts(tmp_path):
    long = " ".join(f"word{i}" for i in range(200))
    rows = [trace(long, "one"), trace(long + " end", "two"), trace("other", "one"), trace(long, "three")]
    assert kept(tmp_path, rows, {"near_duplicates": {"of": "prompt"}}) == [0, 2, 3]
    rows = [trace("a", long), trace("b", long.upper()), trace("c", "else")]
    assert kept(tmp_path / "c", rows, "near_duplicates") == [0, 2]


def test_far_apart_and_short_traces_of_a_prompt(tmp_path):
    pytest.importorskip("rapidfuzz", reason="the data extra is not installed")
    rows = [trace("a", "aaaa"), trace("b", "zz"), trace("a", "aaab"), trace("a", "qrst"), trace("b", "zzz")]
    assert kept(tmp_path, rows, {"diverse": {"k": 2}}) == [0, 1, 3, 4]
    assert kept(tmp_path / "s", rows, {"shortest": {"k": 1}}) == [0, 1]
    rows[2]["tokens"], rows[0]["tokens"], rows[3]["tokens"] = 1, 2, 3
    assert kept(tmp_path / "t", rows, {"shortest": {"k": 1}}) == [1, 2]
    assert kept(tmp_path / "f", rows, {"first": {"k": 1}}) == [0, 1]


def test_a_mixture_of_domains(tmp_path):
    rows = [trace(str(i), domain=d) for d, n in (("math", 40), ("code", 40), ("chat", 40)) for i in range(n)]
    left, _ = curated(tmp_path, rows, {"mixture": {"weights": {"math": 0.5, "code": 0.3, "chat": 0.2}, "total": 60}})
    assert Counter(r["domain"] for r in left) == {"math": 30, "code": 18, "chat": 12}
    left, _ = curated(
        tmp_path / "r", rows, {"mixture": {"ratios": {"math": 3.0, "code": 1.0, "chat": 1.0}, "total": 40}}
    )
    assert Counter(r["domain"] for r in left) == {"math": 32, "code": 4, "chat": 4}


def own_rule(row, *, letter):
    return None if letter in row["completion"] else f"has no {letter}"


def test_a_rule_of_ones_own(tmp_path):
    rows = [trace("a", "xyz"), trace("a", "abc")]
    left, manifest = curated(tmp_path, rows, {f"{__name__}:own_rule": {"letter": "z"}})
    assert left == rows[:1] and manifest.lost == {"has no z": 1}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "no rules"),
        (["no_such"], "there is no rule 'no_such'; there are finished,"),
        (["_text"], "there is no rule '_text'"),
        (["os:no_such"], "there is no rule os:no_such"),
        ([{"finished": {"most": 3}}], "rule finished has no setting 'most'; it has none"),
        ([{"tokens": {"max": 3}}], "rule tokens has no setting 'max'; it has least, most"),
        ([{"tokens": 3}], "the settings of rule tokens are 3"),
        (["diverse"], "rule diverse needs a value for k"),
        ([{"a": {}, "b": {}}], "a rule is a name"),
        (["tokens"], "rule tokens, row 1: the row has no number of tokens. Fix: the rule characters"),
        (["right"], "row 1: the row has no verdict"),
        ([{"pass_rate": {"least": 2.0}}], "rule pass_rate: the band is 2.0 to 1.0"),
        (["mixture"], "takes one of weights and ratios"),
        ([{"mixture": {"weights": {"code": 1}}}], "no weight for the domain None"),
    ],
)
def test_what_a_recipe_gets_wrong_is_one_line(tmp_path, steps, message):
    with pytest.raises(UserError) as refused:
        curated(tmp_path, [trace("a", passed=True)] if "pass_rate" in str(steps) else [trace("a")], *steps)
    assert message in str(refused.value) and not (tmp_path / "out.jsonl").exists()


def test_rows_that_cannot_be_read_are_rejected_once_and_numbers_stay_right(tmp_path):
    lines = [json.dumps(trace("a", c, n=i)) for i, c in enumerate(["one", "two", "one", "three"])]
    (tmp_path / "in.jsonl").write_text("\n".join([lines[0], "{broken", lines[1], '{"prompt": "b"}', *lines[2:]]) + "\n")
    out = tmp_path / "out.jsonl"
    manifest = curate(
        tmp_path / "in.jsonl", out, steps=["structured", "exact_duplicates", {"first": {"k": 9}}], max_rejected=0.5
    )
    assert [row["n"] for row in read_rows(out)] == [0, 1, 3]
    assert manifest.counts["rejected"] == 2 and manifest.lost == {"completion stood before": 1}
    assert len((tmp_path / "out.jsonl.rejects.jsonl").read_text().splitlines()) == 2


def test_finished_work_is_not_done_again_and_other_rules_are_refused(tmp_path):
    rows = [trace("a"), trace("a")]
    _, manifest = curated(tmp_path, rows, "exact_duplicates")
    assert curate(tmp_path / "in.jsonl", tmp_path / "out.jsonl", steps=["exact_duplicates"]) == manifest
    with pytest.raises(UserError, match="was made with steps"):
        curate(tmp_path / "in.jsonl", tmp_path / "out.jsonl", steps=["structured"])
