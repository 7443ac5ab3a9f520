"""Where in a completion the answer is found."""

from __future__ import annotations

import time

import pytest

from llmdistill.verify.extract import extract, looks_like_answer
from llmdistill.verify.sentences import maths_in


@pytest.mark.parametrize(
    ("text", "answer", "stage"),
    [
        # Boxes: the last one, braces matched, whatever the command.
        (r"First \boxed{1}. No: $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}", "boxed"),
        (r"\boxed{\left\{1, \frac{2}{3}\right\}}", r"\left\{1, \frac{2}{3}\right\}", "boxed"),
        (r"so \fbox{7} it is", "7", "boxed"),
        (r"\framebox[2cm]{7}", "7", "boxed"),
        (r"we get $\boxed 5$.", "5", "boxed"),
        (r"\boxed{\boxed{5}}", r"\boxed{5}", "boxed"),
        (r"\\boxed{\\frac{1}{2}}", r"\\frac{1}{2}", "boxed"),
        (r"\boxed{3} and then, cut off, \boxed{4", "3", "boxed"),
        (r"a stray { brace, \boxed{8}", "8", "boxed"),
        # Boxes in a row are one answer; boxes apart are not.
        (r"\boxed{1} and \boxed{2}", "1, 2", "boxed"),
        (r"$x = \boxed{1}$, $y = \boxed{2}$", "1, 2", "boxed"),
        (r"\boxed{5} \quad \text{or} \quad \boxed{5}", "5", "boxed"),
        (r"\boxed{1}, so by the second line it is \boxed{2}", "2", "boxed"),
        # Marked lines.
        ("He has 6 left.\n#### 6", "6", "answer_line"),
        ("3 * 4 = 12\nA: 12", "12", "answer_line"),
        ("... Answer: $x^2$", "$x^2$", "answer_line"),
        ("The answer is 42.", "42.", "answer_line"),
        ("The correct answer to the question is: 42", "42", "answer_line"),
        ("**Answer:** Jim walks **200 feet** less than Martha.", "200 feet", "answer_line"),
        ("**Answer:** There were initially **16** marbles in the 2 bags.", "16", "answer_line"),
        ("**Final Answer**\n\\[\n9\n\\]", "\\[\n9\n\\]", "answer_line"),
        ("Answer: Ann is 24. Bob is 4 younger, 20. Therefore, the answer is 20.", "20.", "answer_line"),
        (r"\boxed{3} Final Answer: The final answer is $4$. I hope it is correct.", "$4$", "answer_line"),
        # Nothing but an answer.
        ("-5", "-5", "whole"),
        ("$x = 3$", "$x = 3$", "whole"),
        ("east", "east", "whole"),
        # Concluding sentences.
        ("Some talk.\n\nTherefore, 56 widgets are worth 6 gadgets.", "6", "conclusion"),
        ("It adds up.\n\nThus, Vince is now 7 + 2 = 9 years old.", "9", "conclusion"),
        ("It adds up.\n\nSo Ali now has $21 + $50 = $71.", "$71", "conclusion"),
        ("It adds up.\n\nSo they should order 8 meals for the 12 of them.", "8", "conclusion"),
        ("It adds up.\n\nThus $x \\ge 5$ is the solution.", "x \\ge 5", "conclusion"),
        # The last number, only of the last paragraph or the one before it.
        (
            "So x is unknown at first.\n\nThe only integer that fits is **3**. \n\nLet me know if it helps!",
            "3",
            "last_number",
        ),
    ],
)
def test_the_answer_and_its_rule(text: str, answer: str, stage: str) -> None:
    found = extract(text)
    assert (found.answer, found.stage) == (answer, stage)


def test_only_what_follows_the_last_closing_tag_counts() -> None:
    assert extract("<think>\\boxed{1}</think> so \\boxed{2}").answer == "2"
    assert extract("\\boxed{1}</think> so \\boxed{2}").answer == "2", "templates may prefill the opening tag"
    assert extract("<think>\\boxed{1}</think>").answer is None, "a draft is no answer"
    unfinished = extract("<think>It could be \\boxed{1}")
    assert (unfinished.answer, unfinished.stage) == (None, "unfinished_thinking")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\\boxed{}",
        "I tried 3 and 5.\n\nIt is impossible to determine the value without the fourth root, which is 24.",
        "Use the formula with 504.\n\nLet me know if you'd like me to work through the steps. It has 504 of them!",
        "There is not enough information to say whether it is 12.",
    ],
)
def test_who_gives_up_has_no_answer(text: str) -> None:
    assert extract(text).answer is None


def test_the_fallback_can_be_switched_off() -> None:
    text = "We add them.\n\nTherefore there are 90 of them in all of the 3 boxes."
    assert extract(text).answer == "90"
    assert extract(text, last_number=False).answer is None
    assert extract("The answer is 90.", last_number=False).answer == "90."


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The correct option is \\boxed{C}", "C"),
        ("Option A is wrong. The answer is (B).", "B"),
        ("Answer: **D**", "D"),
        ("C", "C"),
        ("We compare all four.\n\nB. The second law", "B"),
        ("A is too small, so I choose option C", "C"),
        ("I do not know. A guess would be unfair.", None),
    ],
)
def test_option_letters(text: str, letter: str | None) -> None:
    assert extract(text, kind="choice").answer == letter


def test_dollars_are_no_formulas() -> None:
    assert maths_in("It costs $20.00 + $4.00 and $5 more") == []
    assert [m[2] for m in maths_in("so $x = 5$ and $ 9 $ cost $3")] == ["x = 5", "9"]


def test_prose_is_no_answer() -> None:
    assert looks_like_answer("65 cubic units") and looks_like_answer("f(x) = 2x + 3") and looks_like_answer("$19, 46$")
    assert not looks_like_answer("Jim walks 200") and not looks_like_answer("15 is left")


@pytest.mark.parametrize(
    "text",
    [
        "x" * 1_000_000,
        "9" * 200_000,
        "\\" * 200_000,
        "$" * 200_000,
        "\\[" * 100_000,
        "a\\boxed{" * 25_000,
        "\\boxed" + " " * 200_000,
        "\\boxed[" * 30_000,
        "{" * 100_000 + "}" * 100_000,
        "answer" + " " * 200_000,
        "answer is " * 20_000,
        "####" + " " * 200_000,
        "1,111," * 30_000,
        "So 1 " + "hours " * 30_000 + "= 5",
        "So " + "a" * 1_900 + " = 5",
        "1=1 " * 50_000,
        "<<" * 100_000,
        "**" * 100_000,
        ". " * 100_000,
        "\n" * 200_000,
    ],
    ids=lambda text: f"{text[:8]!r}...",
)
def test_no_text_takes_long(text: str) -> None:
    # Linear rules need well under 1 s for the 200,000 characters that are read; quadratic ones need minutes.
    start = time.process_time()  # not the clock's: the machine may be busy
    extract(text)
    extract(text, kind="choice")
    assert time.process_time() - start < 5
