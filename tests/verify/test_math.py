"""Verdicts: what is right, what is wrong, and that a verdict always comes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmdistill.verify import math as verdicts
from llmdistill.verify.asked import Asked
from llmdistill.verify.math import AnswerJudge, AnswerVerdict, equivalent, judge_answer, verify_answer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def judge() -> Iterator[AnswerJudge]:
    with AnswerJudge(time_limit_s=10) as one:
        yield one


@pytest.fixture(scope="module")
def hurried() -> Iterator[AnswerJudge]:
    with AnswerJudge(time_limit_s=1) as one:
        yield one


SAME = [  # gold, answer
    ("7", "7.0"),
    ("1000", "1,000"),
    ("1000000", "1 000 000"),
    ("10{,}000", "10000"),
    ("11111", r"11,\! 111"),
    ("42", "042"),
    ("2.5", "2,5"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac12", "1/2"),
    (r"\dfrac{3}{4}", r"\tfrac{3}{4}"),
    (r"\frac{1}{3}", "0.333333"),
    (r"0.\overline{3}", r"\frac13"),
    (r"1\frac{1}{2}", "1.5"),
    ("½", "0.5"),
    ("-3", "−3"),
    ("6.5e-7", r"6.5\times 10^{-7}"),
    # Units, currency, percent, degrees.
    ("5", r"5\text{ cm}"),
    (r"5\mathrm{~m}", "500 cm"),
    ("140", r"\$140.00"),
    ("12", "$12.00"),
    ("90", r"90^\circ"),
    (r"90^{\circ}", "90 degrees"),
    ("28", r"28\%"),
    (r"28\%", "28 percent"),
    (r"28\%", "0.28"),
    ("36", "3 dozen"),
    ("3", "3 dozen"),
    ("18", "18 gadgets"),
    ("5", "5 times"),
    (r"6\sqrt{2}", "6√2 centimeters"),
    # Times and durations.
    (r"2:00\text{ p.m.}", "2:00 pm"),
    ("2", r"2:00\ \text{pm}"),
    ("14:00", "2:00 PM"),
    ("1128", "18 h 48 min"),
    # Words, letters.
    ("3", "three"),
    ("25", "twenty-five"),
    (r"\text{east}", "East"),
    (r"\text{Navin}", "Navin"),
    (r"\text{(B)}", "B"),
    ("B", "(B)"),
    ("B", r"\textbf{(B)}"),
    # Notation.
    (r"\sqrt{3}", "√3"),
    ("x^2+1", "1+x²"),
    (r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2"),
    ("**12**", "12"),
    (r"\mathbf{1 2}", "12"),
    ("x=5", "5"),
    ("5", "x = 5"),
    ("y=2x+3", "f(x) = 2x + 3"),
    ("2x+3", "y=3+2x"),
    (r"\sin(90^{\circ}-x)", r"\cos(x)"),
    # Collections.
    ("1,2", "x=1, x=2"),
    (r"\{1,2\}", "2 and 1"),
    (r"\pm 5", "5, -5"),
    (r"\left(3, \frac{\pi}{2}\right)", r"(3, \pi/2)"),
    ("[1,2)", r"1 \le x < 2"),
    (r"1 \le x < 2", "[1,2)"),
    ("(-6,10)", r"x\in(-6,10)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}"),
    ("7", "f(2) = 7"),
    ("31", "17 + 14 = 31"),
    ("10:30", r"10\text{:}30"),
    (r"\emptyset", r"\varnothing"),
    ("1+2i", "i(2-i)"),
    (r"\frac{1+\sqrt5}{2}, \frac{1-\sqrt5}{2}", r"x = \frac{1 \pm \sqrt{5}}{2}"),
    (r"(-\infty,1)\cup(2,\infty)", r"x<1 \text{ or } x>2"),
    (r"x<1 \text{ or } x>2", r"(-\infty,1)\cup(2,\infty)"),
    ("2516_8", "2516_{8}"),
    ("2516_8", "2516"),
]

DIFFERENT = [  # gold, answer
    ("7", "-7"),
    ("7", "8"),
    (r"\frac{2}{3}", "0.6667"),
    (r"\frac{2}{3}", r"\frac{3}{2}"),
    ("0.28", "28"),
    ("28", "0.28"),
    (r"28\%", "0.28\\%"),
    ("1.6e-7", "2e-7"),
    ("0", "0.0000001"),
    (r"6.67\times 10^{-11}", r"6.6\times 10^{-11}"),
    (r"5\text{ cm}", r"5\text{ m}"),
    (r"5\text{ cm}", r"5\text{ kg}"),
    ("5x", "5"),
    ("5m+2", "5"),
    ("100", "5, 100"),
    ("5100", "5, 100"),
    (r"2516_8", "2516_7"),
    ("2:00 pm", "2:00 am"),
    ("2:00 pm", "2:30 pm"),
    ("2", "2:30 pm"),
    ("1128", "18 h 47 min"),
    (r"\text{east}", "seat"),
    (r"\text{east}", "west"),
    (r"\text{even}", "odd"),
    ("B", "C"),
    ("(1,2)", "(2,1)"),
    ("(0,9)", "[0,9)"),
    ("[1,2,3]", "(1,3,2)"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    ("1,2", "1"),
    ("5, 3", "5, 3, 3"),
    ("n=2, 3, 4", "n=1, 2, 3"),
    (r"\{1,2\}", "(1,2)"),
    ("(2,1)", r"\{1,2\}"),
    ("1+2i", "1-2i"),
    (r"(-\infty,1)\cup(2,\infty)", r"x<1 \text{ or } x\ge 2"),
    ("x>5", "x<5"),
    ("x^2", "x^3"),
    ("x+1", "y+1"),
    (r"\sin(x)=\frac12", r"\cos(x)=\frac12"),
    (r"1\frac{1}{10}", r"1\frac{8}{91}"),
    ("5", ""),
    ("5", "I am not sure"),
]


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_the_same_answer_in_other_words_is_right(judge: AnswerJudge, gold: str, answer: str) -> None:
    verdict = judge.judge(f"So it is $\\boxed{{{answer}}}$.", gold)
    assert verdict.kind == "right", verdict


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_another_answer_is_wrong(judge: AnswerJudge, gold: str, answer: str) -> None:
    verdict = judge.judge(f"So it is $\\boxed{{{answer}}}$.", gold)
    assert not verdict.passed and verdict.kind in ("wrong", "no_answer"), verdict


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_a_gold_equals_itself(judge: AnswerJudge, gold: str, answer: str) -> None:
    for text in (gold, answer):
        assert judge.judge(f"\\boxed{{{text}}}", text).passed


def test_a_gold_may_be_a_worked_solution(judge: AnswerJudge) -> None:
    assert judge.judge("#### 18", "She sells 9 eggs.\n#### 18").passed
    assert judge.judge("\\boxed{2}", "We find $x = \\boxed{2}$ for the larger and $1$ for the smaller.").passed
    assert not judge.judge("\\boxed{1}", "We find $x = \\boxed{2}$ for the larger and $1$ for the smaller.").passed


def test_the_last_number_passes_no_abstention(judge: AnswerJudge) -> None:
    text = "The sum is 24.\n\nWe can't determine the exact value without the fourth root; the degree is 24."
    verdict = judge.judge(text, "24")
    assert (verdict.passed, verdict.kind, verdict.extracted) == (False, "no_answer", None)


def test_a_name_in_the_last_sentence(judge: AnswerJudge) -> None:
    verdict = judge.judge("Navin: $39\nLuka: $38\n\nNavin would earn the most, with $39.", "\\text{Navin}")
    assert verdict.passed and verdict.stage == "concluding_word"
    for text in ("Luka would earn more than Navin.", "Navin would not earn the most.", "Navin and Luka earn the most."):
        assert not judge.judge(f"Navin: $39\nLuka: $38\n\n{text}", "\\text{Navin}").passed, text


def test_boxes_that_say_the_same_twice(judge: AnswerJudge) -> None:
    text = "\\(\\boxed{9.5}\\) or \\(\\boxed{9\\frac{1}{2}}\\)"
    assert judge.judge(text, "\\frac{19}{2}").passed
    assert judge.judge("\\boxed{2} and \\boxed{1}", "1, 2").passed
    assert not judge.judge("\\boxed{2} or \\boxed{1}", "2").passed, "two guesses are not one answer"


def test_choices_are_letters(judge: AnswerJudge) -> None:
    assert judge.judge("The answer is (b) because", "B", "choice").passed
    assert judge.judge("The answer is a triangle", "A", "choice").kind == "no_answer", "an article is no option"
    assert judge.judge("\\boxed{b}", "B", "choice").passed
    assert judge.judge("The answer is **C**.", "(C)", kind="choice").passed
    assert judge.judge("The answer is C.", "D", kind="choice").kind == "wrong"


def test_the_tolerance_is_absolute_and_off_by_default(judge: AnswerJudge) -> None:
    assert not judge.judge("\\boxed{4.25\\%}", "4.2").passed
    assert judge.judge("\\boxed{4.25\\%}", "4.2", tolerance=0.1).passed
    assert not judge.judge("\\boxed{4.35}", "4.2", tolerance=0.1).passed


def test_the_verdict_says_what_was_judged_and_why(judge: AnswerJudge) -> None:
    assert judge.judge("\\boxed{x+1}", "1+x") == AnswerVerdict(True, "right", "x+1", "boxed", "quantity")
    assert judge.judge("The answer is 4.", "5") == AnswerVerdict(False, "wrong", "4.", "answer_line", "quantity")


def test_classes_follow_equivalence_in_order_of_appearance(judge: AnswerJudge) -> None:
    answers = ["0.5", None, r"\frac12", "2", "x+1", "", "1/2", "1+x", "2.0", "0.5"]
    assert judge.classes(answers) == [0, None, 0, 1, 2, None, 0, 2, 1, 0]


def test_equivalence_has_no_gold_side(judge: AnswerJudge) -> None:
    for a, b in (("x=5", "5"), ("[1,2)", r"1 \le x < 2"), ("2y+x", "x+2y")):
        assert judge.equivalent(a, b) and judge.equivalent(b, a)
    assert not judge.equivalent("x", "y")


ASKS = """
import sys
from llmdistill.evals.grading import _Judges
from llmdistill.evals.records import Problem, Sample
from llmdistill.verify.math import AnswerJudge, equivalent, verify_answer
from llmdistill.verify.rewards import choice_reward, math_reward

assert math_reward(["", ""], ["It is \\\\boxed{x+1}.", "2"], answer=["1+x", "3"]) == [1, 0]
assert choice_reward([""], ["The answer is (B)."], answer=["B"]) == [1]
assert verify_answer("#### 5", "5") and equivalent("1/2", "0.5")
with AnswerJudge() as judge:
    assert judge.classes(["1", "1.0", "2"]) == [0, 0, 1]
with _Judges(1, False) as judges:
    samples = [Sample("p", i, text, 3, "stop", i) for i, text in enumerate(["\\\\boxed{4}", "5"])]
    assert [g.passed for g in judges.grade((Problem("p", "2 + 2", "math", "4"), samples))] == [True, False]
reads = ("answers", "boxes", "choices", "equal", "extract", "phrases", "sentences", "transcripts")
print([name for name in sys.modules if name.startswith(tuple(f"llmdistill.verify.{part}" for part in reads))])
"""


def test_who_asks_reads_no_answer() -> None:
    """Graders and rewards have not as much as imported what reads a model's text: it runs in the workers."""
    done = subprocess.run([sys.executable, "-c", ASKS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_what_an_answer_does_to_its_worker_is_its_own_verdict_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that know of a hole in the rules hang, fill the memory or end the process; the others are judged."""
    monkeypatch.setattr(verdicts, "WORK", "tests.verify.jobs:answers_with_a_hole")
    hostile = {"compute": "stopped after 0.5 s", "eat": "ran out of memory", "exit": "the worker process ended with"}
    hostile |= {"crash": "the worker process ended with"}
    texts = [text for what in hostile for text in (f"please {what}: \\boxed{{7}}", "\\boxed{7}", "\\boxed{8}")]
    with AnswerJudge(time_limit_s=0.5, memory_limit_mb=256) as judge:
        found = judge.judge_all([Asked(text, "7") for text in texts])
        raised = judge.judge("please raise: \\boxed{7}", "7")
        numbers = judge.classes(["7", "please compute", "7.0", "please crash", "please compute"])
    assert [v.kind for v in found] == ["timeout", "right", "wrong"] * len(hostile)
    assert all(v.detail.startswith(why) for v, why in zip(found[::3], hostile.values(), strict=True))
    assert (raised.kind, raised.extracted) == ("wrong", None) and "nothing here" in raised.detail
    assert numbers == [0, 1, 0, 2, 1], "what cannot be compared is a class of its own"


def test_long_completions_go_to_a_worker_in_several_calls(judge: AnswerJudge) -> None:
    """A call has a limit for all that goes with it: what is long goes with less."""
    texts = ["A step. " * 20_000 + f"\\boxed{{{n}}}" for n in range(6)] + ["x" * 300_000 + "\\boxed{6}"]
    found = judge.judge_all([Asked(text, str(n)) for n, text in enumerate(texts)])
    assert [v.kind for v in found] == ["right"] * 7
    assert judge.judge_all([]) == []


def test_many_are_judged_in_order() -> None:
    with AnswerJudge(workers=2) as two:
        items = [(f"\\boxed{{\\sqrt{{x}}+{n}}}", f"{n % 3}+\\sqrt{{x}}") for n in range(12)]
        assert [v.passed for v in two.judge_many(items)] == [n < 3 for n in range(12)]


HOSTILE = [
    r"\boxed{9^{9^{9^9}}}",
    r"\boxed{2^{1/2^{1000}}}",
    pytest.param(r"\boxed{100000000!}", marks=pytest.mark.slow),
    pytest.param(r"\boxed{\frac{(10^{9})!}{(10^{8})!}}", marks=pytest.mark.slow),
    pytest.param("\\boxed{" + "(" * 3000 + "x" + ")" * 3000 + "}", marks=pytest.mark.slow),
]
BENIGN = [
    "\\boxed{" + "{" * 10_000 + "1" + "}" * 10_000 + "}",
    "\\boxed{" + "\\frac{1}{" * 2000 + "2" + "}" * 2000 + "}",
    "\\boxed{" + "9" * 200_000 + "}",
    "\\boxed{\\begin{pmatrix}" + "\\\\".join(["&".join("1" * 60)] * 60) + "\\end{pmatrix}}",
    "x" * 1_000_000,
    "\\boxed{\x00}",
    "\\boxed{\ud800 + x}",
    "\x00\ud800\udfff",
    pytest.param("\\boxed{" + "a+" * 4000 + "a}", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("text", HOSTILE + BENIGN, ids=lambda text: ascii(text[:24]))
def test_a_verdict_always_comes(hurried: AnswerJudge, text: str) -> None:
    assert hurried.judge(r"\boxed{\sqrt{x}+y}", r"y+\sqrt{x}").passed  # the worker's start is not in the time
    start = time.perf_counter()
    verdict = hurried.judge(text, "17")
    assert not verdict.passed
    assert time.perf_counter() - start < 6, "a limit of 1 s, and some for a busy machine"
    assert hurried.judge(r"\boxed{\sqrt{x}+2y}", r"2y+\sqrt{x}").passed, "the next verdict is not harmed"


def test_what_had_to_be_stopped_is_called_that() -> None:
    # Thousands of sines to fifty digits, at every point: far more than the limit, which finding the answer is within.
    with AnswerJudge(time_limit_s=0.2) as hasty:
        hasty.judge("\\boxed{1}", "1")  # a child's start is in the time
        gold, answer = ("+".join(rf"\sum_{{k=1}}^{{400}} \sin({x}+{n})" for n in range(8)) for x in ("xk", "kx"))
        verdict = hasty.judge(f"\\boxed{{{answer}}}", gold)
    assert (verdict.kind, verdict.stage, verdict.detail) == ("timeout", "boxed", "stopped after 0.2 s")


def test_verdicts_from_any_thread() -> None:
    def one(n: int) -> bool:
        return verify_answer(f"\\boxed{{\\sqrt{{x}}+{n}}}", f"{n}+\\sqrt{{x}}") and not verify_answer(
            r"\boxed{\sqrt{y}+1}", rf"\sqrt{{x}}+{n}"
        )

    assert threading.current_thread() is threading.main_thread()
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(one, range(8)))
    assert equivalent("x+1", "1+x") and judge_answer("\\boxed{2}", "2").kind == "right"


def test_verify_answer_keeps_its_worker() -> None:
    assert verify_answer(r"\boxed{\sqrt{x}+1}", r"1+\sqrt{x}")
    before = verdicts._shared_judge()._pool.processes()
    assert len(before) == 1 and all(
        verify_answer(f"\\boxed{{\\sqrt{{x}}+{n}}}", f"{n}+\\sqrt{{x}}") for n in range(2, 7)
    )
    assert verdicts._shared_judge()._pool.processes() == before


def test_a_fork_has_workers_of_its_own() -> None:
    assert verify_answer(r"\boxed{\sqrt{x}+1}", r"1+\sqrt{x}")
    child = os.fork()
    if child == 0:
        try:
            own = verdicts._shared_judge()._pool
            right = (
                own.processes() == []
                and verify_answer(r"\boxed{\sqrt{x}+3}", r"3+\sqrt{x}")
                and len(own.processes()) == 1
            )
            own.close()
            os._exit(0 if right else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert verify_answer(r"\boxed{\sqrt{x}+4}", r"4+\sqrt{x}"), "the parent's worker has not noticed"


def _cases() -> Path | None:
    folders = [os.environ.get("LLMDISTILL_DATA"), Path(__file__).parents[3] / "shared" / "data"]
    files = [Path(folder) / "verifier_cases.jsonl" for folder in folders if folder]
    return next((file for file in files if file.is_file()), None)


@pytest.mark.slow
@pytest.mark.skipif(_cases() is None, reason="verifier_cases.jsonl is not here; set LLMDISTILL_DATA")
def test_agreement_with_the_labelled_cases(judge: AnswerJudge) -> None:
    file = _cases()
    assert file is not None
    rows = [json.loads(line) for line in file.open()]
    agreed = sum(judge.judge(row["prediction"], row["gold"]).passed == row["expected_equal"] for row in rows)
    assert agreed >= 916  # of 927; eval/VERIFIER.md has each disagreement
