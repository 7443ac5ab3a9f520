"""Rules on single traces: what they leave out, and what they must let pass."""

import random
import time

import pytest

from llmdistill.datagen import structure

DERIVATION = "\n".join(
    f"Step {i}: x = {i} * 7 + {i * i} = {i * 7 + i * i}, so the sum so far is {i * 31}." for i in range(60)
)


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("The answer is 4.", None, None),
        ("The answer is 4.", True, "no thinking"),
        ("<think>2+2</think>4", None, None),
        ("<think>2+2</think>4", True, None),
        ("2+2</think>4", True, None),  # the template opened it
        ("<think>2+2</think>4", False, "thinking"),
        ("<think>2+2", None, "thinking not closed"),
        ("<think>2+2</think>  ", None, "no answer after thinking"),
        ("<think>\n\n</think>\n\n4", None, None),  # Qwen3's empty block
        ("<think>\n\n</think>\n\n4", True, "nothing thought"),
        ("<think>a</think>b<think>c</think>d", None, "thinking tags out of order"),
        ("a</think>b<think>", None, "thinking tags out of order"),
        ("Sure. <think>a</think>b", None, "text before thinking"),
        ("  ", None, "empty"),
    ],
)
def test_structure(text, thinking, expected):
    assert structure.unstructured(text, thinking=thinking) == expected


def test_loops_are_seen_at_the_end_and_in_the_middle():
    rng = random.Random(1)
    prose = " ".join(rng.choice("abcdefghijklm") * rng.randrange(2, 6) for _ in range(400))
    loop = "wait let me check this again because it may be wrong " * 20
    assert structure.looping(prose) is None and structure.looping(DERIVATION) is None
    assert structure.looping(prose + loop * 3) == "loops at its end"
    assert structure.looping(prose + loop + prose[:0] + " ".join(str(i) for i in range(400))) == "repeats itself"
    assert structure.looping("yes " * 20) is None  # too short to tell


def test_loops_are_found_in_linear_time():
    start = time.process_time()
    structure.looping("a b c d e f g " * 100_000)
    structure.looping(" ".join(map(str, range(300_000))))
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("text", "prompt", "expected"),
    [
        ("First we add α and β to get γ = 3π.", "", None),
        ("First we add 三 to get 四 and then 我们 思考 一下 this", "", "mixes Latin and Han"),
        ("首先我们把 x 和 y 相加, 得到 sin x + cos y", "", None),
        ("The word слово means word", "What does слово mean?", None),
        ("The word слово means word", "", "mixes Latin and Cyrillic"),
        ("これは漢字とカタカナです", "", None),
        ("𝑥 = 𝟓 and ℝ is the field", "", None),
        ("1 + 1 = 2", "", None),
        ("We see Привет" + " that all is well" * 20, "", None),  # one name in a long text
    ],
)
def test_languages_that_mix(text, prompt, expected):
    assert structure.mixed(text, prompt=prompt) == expected


def test_a_language_filter():
    pytest.importorskip("py3langid", reason="the data extra is not installed")
    german = "Zuerst addieren wir die beiden Zahlen und erhalten damit das Ergebnis der ganzen Aufgabe."
    english = "First we add both of these numbers, which gives us the result of the whole exercise."
    assert structure.other_language(english, ["en"]) is None
    assert structure.other_language(german, ["en"]) == "language de"
    assert structure.other_language(german, ["en", "de"]) is None
    assert structure.other_language("42", ["en"]) is None


def test_length_and_ending():
    assert structure.outside(5, least=10) == "too short" and structure.outside(50, most=40) == "too long"
    assert structure.outside(10, least=10, most=10) is None and structure.outside(10**6) is None
    assert structure.unfinished("length") == "cut off"
    assert structure.unfinished("stop") is None and structure.unfinished(None) is None
