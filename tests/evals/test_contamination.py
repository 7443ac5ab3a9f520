"""Copies of benchmark problems are found whatever their spelling, and nothing else is."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdistill.errors import UserError
from llmdistill.evals import ngrams
from llmdistill.evals.contamination import check, filter_contaminated, main
from llmdistill.evals.ngrams import Index, words
from llmdistill.evals.records import Problem
from llmdistill.evals.training_rows import TrainingFiles, documents, row_text

WORDS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "ra", "st", "lem", "")]
PROBLEM = r"""Let $f(x) = \frac{x^2 - 3}{2x+1}$ be defined for real $x$. Find the sum of all values of $x$ such that
$\left( f(x) \right)^2 = 4$, and express it as a common fraction."""


def text(rng: random.Random, length: int) -> str:
    return " ".join(rng.choices(WORDS, k=length))


def problem(i: int, question: str) -> Problem:
    return Problem(f"p{i}", question, "math")


def noisy(rng: random.Random, question: str) -> str:
    """The same words in another spelling: case, punctuation, white space, LaTeX's spacing."""
    between = [
        " ",
        "  ",
        "\n",
        ", ",
        ". ",
        r"\, ",
        r"\quad ",
        "$ ",
        "~",
        " \\;",
        " **",
        "\t",
        " (",
        ": ",
        "\u00a0",
        " — ",
    ]
    spelled = [rng.choice([w, w.upper(), w.capitalize()]) for w in question.split()]
    return "".join(w + rng.choice(between) for w in spelled)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 10**9), st.integers(4, 60), st.integers(0, 80), st.integers(0, 80))
def test_a_planted_question_is_found_in_any_spelling(seed: int, length: int, before: int, after: int) -> None:
    rng = random.Random(seed)
    problems = [problem(i, text(rng, length)) for i in range(3)]
    row = f"{text(rng, before)} {noisy(rng, problems[1].question)} {text(rng, after)}"
    report = check([("clean", text(rng, 150)), ("row", row)], problems)
    assert [(h.problem, h.rows, h.exact_rows, h.best_row, h.best) for h in report.hits] == [("p1", 1, 1, "row", 1.0)]
    assert report.hits[0].longest == length


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 10**9), st.integers(1, 30))
def test_a_planted_part_counts_from_n_words_on(seed: int, length: int) -> None:
    """Of a question of 40 words, ``length`` words in a row are planted."""
    rng = random.Random(seed)
    distinct = rng.sample(WORDS, 40)
    start = rng.randrange(40 - length)
    row = f"zzz {noisy(rng, ' '.join(distinct[start : start + length]))} zzz"
    report = check([("row", row)], [problem(0, " ".join(distinct))])
    if length < 13:
        assert report.hits == []
    else:
        (hit,) = report.hits
        assert (hit.longest, hit.exact_rows) == (length, 0)
        assert hit.coverage == hit.best == pytest.approx((length - 12) / 28)


def test_random_text_of_the_benchmark_s_own_words_is_never_found() -> None:
    """2,000 documents of 200 words: by chance a 13-gram of 300 words' vocabulary repeats with probability 1e-25."""
    rng = random.Random(0)
    problems = [problem(i, text(rng, rng.randint(13, 60))) for i in range(300)]
    assert check(((str(i), text(rng, 200)) for i in range(2000)), problems).hits == []


def test_the_answer_equals_a_plain_search() -> None:
    """Small vocabulary, so that matches of all lengths, repeats and overlaps occur; against nested loops over words."""
    rng = random.Random(7)
    for _ in range(30):
        few = rng.sample(WORDS, 2)
        questions = [" ".join(rng.choices(few, k=rng.randint(4, 12))) for _ in range(4)]
        rows = [" ".join(rng.choices(few, k=rng.randint(0, 40))) for _ in range(6)]
        report = check([(str(i), r) for i, r in enumerate(rows)], [problem(i, q) for i, q in enumerate(questions)], n=6)
        grams = [{tuple(q.split()[i : i + 6]) for i in range(max(len(q.split()) - 5, 0))} for q in questions]
        for i, question in enumerate(questions):
            if question.split() and len(question.split()) >= 6:
                hit_rows = [
                    r for r in rows if any(tuple(r.split()[j : j + 6]) in grams[i] for j in range(len(r.split())))
                ]
            else:
                hit_rows = [r for r in rows if f" {question} " in f" {r} "]
            exact = [r for r in rows if f" {question} " in f" {r} "]
            found = [h for h in report.hits if h.problem == f"p{i}"]
            assert sum(h.rows for h in found) == len(hit_rows)
            assert sum(h.exact_rows for h in found) == len(exact)


def test_colliding_hashes_are_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """All words get one of four hashes: everything collides, and still only the copy is found."""
    real = ngrams.Words

    class Colliding(real):  # type: ignore[misc, valid-type]
        def __init__(self, texts: list[bytes]) -> None:
            super().__init__(texts)
            self.hashes = self.hashes % np.uint64(4)

    monkeypatch.setattr(ngrams, "Words", Colliding)
    rng = random.Random(2)
    problems = [problem(i, text(rng, 20)) for i in range(20)]
    rows = [(str(i), text(rng, 100)) for i in range(50)] + [("copy", noisy(rng, problems[4].question))]
    report = check(rows, problems, n=5)
    # Of 300 words' vocabulary five in a row agree by chance with probability 1e-6 here.
    assert [(h.problem, h.best, h.best_row) for h in report.hits] == [("p4", 1.0, "copy")]


def test_latex_spellings_of_one_question() -> None:
    copies = [
        PROBLEM.replace(r"\frac", r"\dfrac").replace(r"\left( f(x) \right)", "(f(x))"),
        PROBLEM.replace("2x+1", r"2 x\,+\,1").replace("$", r"\( "),
        PROBLEM.upper().replace(r"\FRAC", r"\frac").replace(r"\LEFT", r"\left").replace(r"\RIGHT", r"\right"),
        PROBLEM.replace(" ", "\u2009").replace("-", "−"),
    ]
    report = check([(str(i), c) for i, c in enumerate(copies)], [problem(0, PROBLEM)])
    assert report.hits[0].exact_rows == len(copies)


def test_words_of_a_text() -> None:
    expected = "don t use 2 x axes cm m 2 1 2 é 三 角"
    assert b" ".join(words(r"Don’t use $2x$-axes, \text{cm}\quad $\mathrm{m}^2$: ½ é 三角")).decode() == expected


def test_short_questions_need_all_words_and_the_same_signs() -> None:
    problems = [problem(0, "Compute $2 + 3 - 4$."), problem(1, "What is $6$?"), problem(2, "Find $x$.")]
    rows = [("same", "Now compute 2+3-4 please"), ("sign", "Now compute 2-3-4 please"), ("more", "Compute 2+3+4")]
    report = check(rows, problems)
    assert [(h.problem, h.rows, h.best_row, h.best) for h in report.hits] == [("p0", 1, "same", 1.0)]
    assert report.unchecked == ["p1", "p2"]


def test_boilerplate_of_a_suite_is_no_evidence_but_part_of_a_match() -> None:
    rng = random.Random(1)
    frame = text(rng, 20)
    problems = [problem(i, f"{frame} {text(rng, 20)}") for i in range(30)]
    rows = [("frame", f"{frame} {text(rng, 50)}"), ("copy", problems[3].question)]
    report = check(rows, problems)
    assert [(h.problem, h.rows, h.exact_rows, h.longest) for h in report.hits] == [("p3", 1, 1, 40)]
    assert report.boilerplate == 8  # 20 words hold eight 13-grams
    # A problem that is nothing but the frame is still looked for.
    assert [h.problem for h in check(rows[:1], [*problems, problem(30, frame)]).hits] == ["p30"]
    # Copies of one question, in several suites, are one.
    same = check(rows[:1], [problem(i, frame) for i in range(30)])
    assert (len(same.hits), same.boilerplate) == (30, 0)


def test_a_copy_is_one_match_not_one_for_each_n_gram() -> None:
    question = " ".join(WORDS[:40])
    (match,) = Index([question]).search(["", f"zzz {question} zzz"])
    assert (match.document, match.text, match.start, match.length) == (1, 0, 0, 40)


def test_matches_do_not_span_documents() -> None:
    question = " ".join(WORDS[:20])
    halves = [("a", " ".join(WORDS[:10])), ("b", " ".join(WORDS[10:20])), ("c", ""), ("d", "\x00")]
    assert check(halves, [problem(0, question)]).hits == []


def test_several_processes_find_the_same() -> None:
    rng = random.Random(5)
    problems = {
        "one": [problem(i, text(rng, 30)) for i in range(20)],
        "two": [problem(i, text(rng, 8)) for i in range(9)],
    }
    rows = [
        (str(i), text(rng, 40) + " " + (noisy(rng, problems["one"][i % 20].question) if i % 7 == 0 else ""))
        for i in range(5000)
    ]
    alone, together = check(rows, problems), check(rows, problems, workers=2)
    assert alone.hits == together.hits
    assert alone.by_suite()["one"]["exact"] == 20
    assert alone.documents == together.documents == 5000


def test_the_stream_is_not_held() -> None:
    """No more rows are read ahead than the batches under way."""
    read = 0

    def endless() -> Iterator[dict[str, str]]:
        nonlocal read
        while True:
            read += 1
            yield {"text": "word " * 1000}

    clean = filter_contaminated(endless(), [problem(0, PROBLEM)])
    for _ in range(500):
        next(clean)
    assert read < 700


def test_filter_keeps_order_and_tells_what_it_drops() -> None:
    half = " ".join(PROBLEM.split()[: len(PROBLEM.split()) // 2])
    rows = [
        {"id": 1, "messages": [{"role": "user", "content": "hello"}]},
        {"id": 2, "messages": [{"role": "user", "content": [{"type": "text", "text": PROBLEM.lower()}]}]},
        {"id": 3, "messages": [{"role": "user", "content": half}]},
    ]
    gone: list[tuple[object, list[str]]] = []
    kept = list(
        filter_contaminated(rows, [problem(0, PROBLEM)], dropped=lambda row, ids: gone.append((row["id"], ids)))
    )
    assert [row["id"] for row in kept] == [1]
    assert gone == [(2, ["p0"]), (3, ["p0"])]
    assert [row["id"] for row in filter_contaminated(rows, [problem(0, PROBLEM)], least=0.9)] == [1, 3]


def test_files_of_every_kind_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet
    from datasets import Dataset

    rows = [{"prompt": f"row {i}", "tokens": [1, 2], "answer": PROBLEM if i == 1 else "nothing"} for i in range(3)]
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps(rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "e")
    (tmp_path / "suite.jsonl").write_text(json.dumps({"id": "x", "problem": PROBLEM}) + "\n")
    files = [str(tmp_path / n) for n in ("a.jsonl", "b.jsonl.gz", "c.json", "d.parquet", "e")]
    words = ["--train", *files, "--suite", str(tmp_path / "suite.jsonl"), "--workers", "1"]
    assert main([*words, "--out", str(tmp_path / "out.json"), "--fail"]) == 3
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["suites"] == {"suite": {"problems": 1, "hit": 1, "half": 1, "exact": 1}}
    assert found["hits"][0]["examples"] == [f"{Path(f).name}:2" for f in files]
    assert "15 training rows" in capsys.readouterr().out
    assert main([*words, "--column", "prompt", "--fail"]) == 0


def test_rows_as_text() -> None:
    row = {"prompt": "a", "n": 1, "messages": [{"role": "user", "content": "b"}], "ids": [1, 2], "list": ["c"]}
    assert row_text(row) == "a\nb\nc"
    assert list(documents([row, {"id": "x", "t": "y"}], None)) == [("0", "a\nb\nc"), ("x", "x\ny")]
    with pytest.raises(UserError, match="no column 'text'; they have prompt"):
        row_text(row, ["text"])


def test_bad_input_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "a.jsonl").write_text('{"a": "b"}\n{"a": \n')
    with pytest.raises(UserError, match="unknown kind of file; .jsonl"):
        TrainingFiles([tmp_path / "a.csv"])
    with pytest.raises(UserError, match="no such file"):
        TrainingFiles([tmp_path / "b.jsonl"])
    with pytest.raises(UserError, match="line 2 is not JSON"):
        list(TrainingFiles([tmp_path / "a.jsonl"]))
    with pytest.raises(ValueError, match="no problems"):
        check([], [])
    with pytest.raises(ValueError, match="n is 1"):
        Index(["a b c d e"], n=1)
