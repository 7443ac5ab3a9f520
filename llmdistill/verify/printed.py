"""Whether a program printed what was expected: text, except that numbers may be written in another way.

    differs("2.0 0.3\\n", "2 0.30000000000000004")   # None

The program's output may be megabytes of anything, and it is compared by who asked for the verdict. What is far longer
than what was expected is wrong unread (`too_long`); the rest is looked at once, line by line, as far as it agrees.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal

# A number as people write it: ASCII digits, no leading zeros (0110 is no 110), no sign but minus, no underscores.
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]*)?(?:[eE][-+]?[0-9]{1,4})?|-?\.[0-9]+", re.ASCII)
_WORD = re.compile(r"[^ \t\r\f\v]+")
_LONGEST_NUMBER = 400  # characters; a longer one is compared as text
_BLANK = " \t\r\n\f\v"
TOLERANCE = 1e-6
_ALWAYS_READ = 1 << 20  # bytes
_TIMES_AS_LONG = 8  # digits that were not asked for, and white space


def too_long(expected: str, got: bytes) -> str | None:
    """Why an output is not even looked at, in words; None for what may be the expected one, written in another way."""
    most = max(_ALWAYS_READ, _TIMES_AS_LONG * len(expected.encode("utf-8", "surrogatepass")))
    return f"{len(got)} bytes; what was expected has {len(expected)} characters" if len(got) > most else None


def differs(expected: str, got: str) -> str | None:
    """The first line that differs, in words; None where none does.

    Lines are compared without white space at their ends, blank lines at the end of the text not at all. Of lines that
    differ, words are compared: the same text, or the same number. Numbers agree exactly where the expected one is an
    integer, and within 1e-6 (absolute or relative) where it has a fraction.
    """
    expected, got = expected.rstrip(_BLANK), got.rstrip(_BLANK)
    if expected == got:
        return None
    wanted = expected.split("\n")
    lines = got.count("\n") + 1
    if lines != len(wanted):
        return f"{lines} lines, expected {len(wanted)}; they begin {_short(got)}"
    at = 0
    for number, want in enumerate(wanted, 1):
        end = got.find("\n", at)
        have = got[at : len(got) if end < 0 else end]
        at = end + 1
        want, have = want.rstrip(_BLANK), have.rstrip(_BLANK)
        if want != have and not _same_words(want, have):
            return f"line {number}: expected {_short(want)}, got {_short(have)}"
    return None


def _same_words(wanted: str, found: str) -> bool:
    pairs = zip(_WORD.finditer(wanted), _WORD.finditer(found), strict=True)
    try:
        return all(a.group() == b.group() or _same_number(a.group(), b.group()) for a, b in pairs)
    except ValueError:  # more words on one side
        return False


def _same_number(wanted: str, found: str) -> bool:
    if max(len(wanted), len(found)) > _LONGEST_NUMBER:
        return False
    if not (_NUMBER.fullmatch(wanted) and _NUMBER.fullmatch(found)):
        return False
    want, have = Decimal(wanted), Decimal(found)
    if want == have:
        return True
    fraction = any(mark in wanted for mark in ".eE")
    return fraction and math.isclose(float(want), float(have), rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "...")
