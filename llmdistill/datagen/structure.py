"""What a trace must look like to be worth training on: ended, thought and answered, no loops, one language.

Each rule is a function of the text, or of how it ended, that returns None or in a few words why the trace is left out.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from llmdistill.evals.health import CLOSED, OPENED, repetition

_LOOP_WORDS = 8  # a loop inside a text is at least so many words, said over and over
# one writing system each, as people use them: Japanese mixes three
_SCRIPTS = {"CJK": "Han", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean"}


def unfinished(finish: str | None) -> str | None:
    """Cut off by its budget of tokens; an unknown ending counts as one that was chosen."""
    return "cut off" if finish == "length" else None


def unstructured(text: str, *, thinking: bool | None) -> str | None:
    """Thinking that is not opened once, closed once and followed by an answer.

    Args:
        text: the completion, thinking tags included.
        thinking: True: it must think (a template may have opened the tag in the prompt); False: it must not; None: if
            it does, it must do so rightly.
    """
    opened, closed = text.count(OPENED), text.count(CLOSED)
    if not text.strip():
        return "empty"
    if not opened and not closed:
        return "no thinking" if thinking else None
    if thinking is False:
        return "thinking"
    if closed == 0:
        return "thinking not closed"
    if opened > 1 or closed > 1 or (opened and text.index(OPENED) > text.index(CLOSED)):
        return "thinking tags out of order"
    if opened and text[: text.index(OPENED)].strip():
        return "text before thinking"
    thought, answer = text.split(CLOSED)
    if not answer.strip():
        return "no answer after thinking"
    return "nothing thought" if thinking and not thought.replace(OPENED, "").strip() else None


def looping(text: str, *, most: float = 0.2) -> str | None:
    """Going round in circles, at the end (:func:`llmdistill.evals.health.repetition`) or anywhere.

    Anywhere: more than ``most`` of the words are in runs of 8 words that stood in the text before; at least 64 words.
    Derivations that copy an expression from line to line stay far below.
    """
    if repetition(text) is not None:
        return "loops at its end"
    words = text.split()
    if len(words) < 8 * _LOOP_WORDS:
        return None
    seen: set[tuple[str, ...]] = set()
    again = 0
    covered = 0  # words up to here are counted already
    for i in range(len(words) - _LOOP_WORDS + 1):
        run = tuple(words[i : i + _LOOP_WORDS])
        if run in seen:
            again += i + _LOOP_WORDS - max(covered, i)
            covered = i + _LOOP_WORDS
        seen.add(run)
    return "repeats itself" if again > most * len(words) else None


def writing_systems(text: str) -> dict[str, float]:
    """{writing system: share of the letters}, the largest first. Greek letters, being mathematics, are not counted."""
    counts: Counter[str] = Counter()
    for character, times in Counter(text).items():
        if character.isalpha():
            counts[_script(character)] += times
    counts.pop("Greek", None)
    if counts.get("Japanese"):
        counts["Japanese"] += counts.pop("Han", 0)
    return {name: n / counts.total() for name, n in counts.most_common()}


def mixed(text: str, *, prompt: str = "", most: float = 0.05) -> str | None:
    """Switching between writing systems, as models do that reason in two languages.

    Args:
        text: the completion.
        prompt: the writing systems of the question are allowed: a text about a Russian word may hold it.
        most: the largest share of letters that may be in others than the text's main one.
    """
    shares = writing_systems(text)
    allowed = {next(iter(shares), ""), *writing_systems(prompt)}
    # formulas, names and code are Latin in every language; words of another system in Latin text are what is looked for
    strange = {name: share for name, share in shares.items() if name not in allowed and name != "Latin"}
    if sum(strange.values()) > most:
        return f"mixes {' and '.join([next(iter(shares)), *strange])}"
    return None


def other_language(text: str, allowed: Iterable[str], *, fewest: int = 40) -> str | None:
    """A language that is not among ``allowed`` (ISO 639-1 codes: "en", "de"), as py3langid names it.

    Args:
        text: code and formulas should not be in it; fewer than ``fewest`` letters are too few to tell.

    Raises:
        ImportError: py3langid is not installed (the ``data`` extra).
    """
    if sum(map(str.isalpha, text)) < fewest:
        return None
    from py3langid import classify

    language = str(classify(text)[0])
    return None if language in set(allowed) else f"language {language}"


def outside(tokens: int, *, least: int = 1, most: int | None = None) -> str | None:
    """Shorter or longer than wanted."""
    if tokens < least:
        return "too short"
    return "too long" if most is not None and tokens > most else None


@lru_cache(maxsize=8192)
def _script(character: str) -> str:
    first = unicodedata.name(character, "OTHER").split()[0].removesuffix("-")
    if first in (
        "FULLWIDTH",
        "MATHEMATICAL",
        "DOUBLE-STRUCK",
        "SCRIPT",
        "FEMININE",
        "MASCULINE",
        "MICRO",
        "SUPERSCRIPT",
    ):
        return "Latin" if first != "MICRO" else "Greek"
    return _SCRIPTS.get(first, first.capitalize())
