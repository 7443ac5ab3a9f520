"""Answers in words, and the letters of options."""

from __future__ import annotations

import re

from llmdistill.verify.answers.notation import unwrap
from llmdistill.verify.answers.values import Option, Words
from llmdistill.verify.answers.vocabulary import word_set

_ARTICLES = word_set("the a an is are it its that's this that")
_HEADS = word_set("condition conditions")  # what a phrase is about, where it says nothing else
_DIRECTIONS = {"N": "north", "S": "south", "E": "east", "W": "west"}
_SAME = {"dne": "does not exist", "true": "true", "correct": "true", "no real solutions": "no solution", "none": "none"}
_OPTION = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer) )?(?:\((?P<a>[A-Z])\)|(?P<b>[A-Z])[.):]|(?P<c>[A-Z])|\[(?P<d>[A-Z])\])"
    r"(?P<rest>\W.{0,300})?",
    re.S,
)


def read_words(text: str) -> Words | None:
    """A text of words; None if it holds anything else."""
    if len(text) > 400:
        return None
    plain = unwrap(text)
    if plain in _DIRECTIONS:
        return Words((_DIRECTIONS[plain],))
    if plain.lower() == "no":
        return Words(("no",))
    if re.search(r"[\\^_=<>{}+*/|]", plain) or not re.search(r"[^\W\d_]{3,}", plain):
        return None
    if re.search(r"^-|(?<![^\W_])-(?=\S)", plain):
        return None  # a sign is no hyphen
    words = re.findall(r"\d[\d.,:]*\d(?!\w)|[^\W_]+(?:['’][^\W_]+)?", plain.lower())
    words = [re.sub(r"^(\d+)(?:st|nd|rd|th)$", r"\1", word) for word in words]
    kept = [word for word in words if word not in _ARTICLES] or words
    if len(kept) > 2 and kept[-1] in _HEADS:
        kept = kept[:-1]
    return Words(tuple(_SAME.get(" ".join(kept), " ".join(kept)).split()))


def read_option(text: str) -> Option | None:
    """The option that a text names: "B", "(B)", "B.", "(B) 42", "Option B"; None for other texts."""
    plain = unwrap(text)
    match = _OPTION.fullmatch(plain)
    if not match:
        return None
    rest = (match["rest"] or "").strip()
    if rest and match["c"] and not plain.lower().startswith(("option", "choice", "answer")):
        return None  # "B 42" is not how options are written
    if re.match(r"(?:or|and|,|/|&|not|is (?:not|wrong))\s*\(?[A-Z]?\b", rest, re.I) and not re.match(r"\w{4,}", rest):
        return None  # "B or C" is no choice
    return Option(match["a"] or match["b"] or match["c"] or match["d"])
