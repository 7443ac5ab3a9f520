"""What can be said of one completion without knowing the answer: was it cut off, did it end its thinking, does it loop.

These shares explain scores: a reasoning model that loses ten points to a short token budget is not a worse model.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

from llmdistill.evals.records import Finish

OPENED, CLOSED = "<think>", "</think>"

_WORDS = 200  # the end of the text that is looked at for loops
_FEWEST_WORDS = 40  # below it a low ratio is chance
_FEWEST_DISTINCT = 0.3  # distinct 4-grams / 4-grams
_BYTES = 2000
_FEWEST_BYTES = 500
_SMALLEST_RATIO = 0.12  # compressed / raw; prose and derivations stay above 0.25 at this length
_ALPHANUMERIC = re.compile(r"\w")


@dataclass(frozen=True)
class Health:
    """Findings on one completion.

    Attributes:
        truncated: the token budget ended it.
        unfinished_thinking: thinking was asked for, or opened, and never closed.
        repetitive: its end loops, see :func:`repetition`.
    """

    truncated: bool
    unfinished_thinking: bool
    repetitive: bool


def examine(text: str, finish: Finish, *, thinking: bool | None = None) -> Health:
    """Looks at one completion.

    Args:
        text: the completion, thinking tags included.
        finish: "length" if the token budget ended it.
        thinking: the prompt asked for thinking, so that a completion without "</think>" has not finished it, even
            where the template opened the tag. None or False: only a completion that opens the tag itself must close it.
    """
    unfinished = CLOSED not in text if thinking else text.rfind(OPENED) > text.rfind(CLOSED)
    return Health(finish == "length", unfinished, repetition(text) is not None)


def repetition(text: str) -> str | None:
    """Which rule finds a loop at the end of the text: "words", "bytes" or None.

    "words": of the last 200 words, fewer than 30% of the 4-grams are distinct (40 words at least).
    "bytes": the last 2,000 bytes deflate to less than 12% (500 bytes at least), which also sees loops in text without
    spaces. Text without letters or digits (a rule of dashes, padding) is not judged by bytes.
    """
    words = text[-40 * _WORDS :].split()[-_WORDS:]
    grams = len(words) - 3
    if len(words) >= _FEWEST_WORDS:
        distinct = len(set(zip(words, words[1:], words[2:], words[3:], strict=False)))
        if distinct < _FEWEST_DISTINCT * grams:
            return "words"
    tail = text[-_BYTES:].encode("utf-8", "replace")[-_BYTES:]
    if len(tail) < _FEWEST_BYTES or len(zlib.compress(tail, 1)) >= _SMALLEST_RATIO * len(tail):
        return None
    return "bytes" if _ALPHANUMERIC.search(text[-_BYTES:]) else None
