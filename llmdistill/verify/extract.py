r"""Finding the answer in a completion.

The rules are tried in order; the first that finds something decides, and its name is kept with the verdict:

    boxed         the last \boxed, \fbox or \framebox (a run of them joined by commas, "and", "or" is one answer)
    answer_line   "#### 18", "A: 18", "Answer: ...", "the answer is ...", in other languages too (phrases.py)
    whole         the completion is nothing but an answer ("-5", "$x = 3$", "east")
    conclusion    the last sentence that begins with Therefore, Thus, So, Hence, ... (sentences.py)
    last_math, last_number    the last formula or number of the last paragraph, unless the completion gives up

A choice (choices.py) is a box with a letter, then what announces an option, then the option that stands alone.
Thinking, other channels and what follows the end of the turn are dropped first (transcripts.py); a completion that
never stops thinking has no answer: what stands there is a draft. Every rule runs in time linear in the text, and reads
no more than the last 200,000 characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from llmdistill.verify.answers.wording import read_option
from llmdistill.verify.asked import LONGEST_COMPLETION
from llmdistill.verify.boxes import last_boxes, without_denied
from llmdistill.verify.choices import chosen
from llmdistill.verify.phrases import (
    CALLED_WRONG,
    CROSSED_OUT,
    DENIED_BEHIND,
    DENIES,
    FINAL,
    FOREIGN,
    HASHES,
    HOPE,
    INSTEAD,
    TAG,
    announcing,
)
from llmdistill.verify.sentences import (
    LONGEST_SENTENCE,
    Extraction,
    answer_of_sentence,
    conclusion_within,
    looks_like_answer,
    unmarked,
)
from llmdistill.verify.transcripts import spoken

__all__ = ["Extraction", "answer_of_sentence", "extract", "looks_like_answer"]


def extract(text: str, *, kind: Literal["math", "choice"] = "math", last_number: bool = True) -> Extraction:
    """The answer that a completion states.

    Args:
        text: the completion, thinking included.
        kind: "choice" looks for an option letter.
        last_number: whether the last formula or number may stand in for an answer that is not marked as one. Switch
            it off for completions that were cut off, and where the prompt asks for a box and means it.

    Source: the order of EVALUATION section 5 (boxed, answer line, last number where the task allows).
    """
    said = spoken(text[-LONGEST_COMPLETION:])
    if said is None:
        return Extraction(None, "unfinished_thinking")
    text = without_denied(said)
    boxes, after = last_boxes(text)
    if kind == "choice":
        return _choice(text, boxes)
    if boxes:
        found = _after_box(text, after)
        if found:
            return Extraction(found, "answer_line")
        return Extraction(", ".join(boxes), "boxed", tuple(boxes) if len(boxes) > 1 else ())
    for tail, rest in _answer_tails(text):
        denied = _DENIAL.match(tail)
        if denied and not denied["other"]:
            return Extraction(None, "none")  # "the answer is not 45"
        tail = tail[denied.end() :] if denied else tail
        yes = _YES.match(tail)
        found = yes["word"] if yes else answer_of_sentence(tail)
        if found and last_number and len(rest) > 80 and not HOPE.search(tail):
            # "So the answer is 24 for now. ..." and later "Therefore, Jeff is 30.": the later conclusion counts.
            later = unmarked(rest)
            if later.stage == "conclusion":
                return later
            # "Answer: The price was $40. ... Therefore, it is $36. ..." is a heading over a worked solution.
            if not looks_like_answer(tail) and (within := conclusion_within(tail)):
                return Extraction(within, "conclusion")
        taken_back = _TAKES_BACK.search(tail + rest) if found and last_number else None
        if taken_back:
            behind = (tail + rest)[taken_back.end() :]
            spoken_after = _INTERJECTIONS.match(behind)
            if (later := unmarked(behind[spoken_after.end() if spoken_after else 0 :])).answer:
                return later
        if found:
            return Extraction(found, "answer_line")
    stripped = re.sub(
        r"^[\s*_#→⇒➜∴]*(?:(?:the\s+)?(?:final\s+)?answer\b[\s*_:]*|(?:so|thus|hence|therefore)\b,?\s+)?",
        "",
        text.strip(),
        flags=re.I,
    )
    if looks_like_answer(stripped) and not _LINES.search(stripped):
        return Extraction(stripped, "whole")
    if not last_number:
        return Extraction(None, "none")
    return unmarked(text)


_LINES = re.compile(r"\A(?!\\|\$|`).*\d.*\n.*\d")  # steps, one a line


def _after_box(text: str, after: int) -> str | None:
    """The answer behind the last box: closing words of few-shot prompts, or a correction that announces it."""
    final = FINAL.search(text, after)
    if final and HOPE.search(final["tail"]):
        return answer_of_sentence(final["tail"])
    rest = text[after:]
    if not _TAKES_BACK.search(rest):
        return None
    for tail, _ in _answer_tails(rest):
        found = answer_of_sentence(tail)
        if found:
            return found
    return None


_YES = re.compile(r"[\s*_\"]{0,4}(?P<word>yes|no|true|false)[*_\"]{0,2}(?:[,;:—-]|\s*\.|$)", re.I)
_DENIAL = re.compile(
    r"[\s*_:]{0,4}(?:definitely |certainly |simply )?not\b"
    r"(?:[^.\n]{0,80}?(?P<other>\b(?:but|rather|instead)\b|\bit(?:['’]s| is| must be| should be)(?!\w)))?",
    re.I,
)
_INTERJECTIONS = re.compile(r"(?:[\s,.;:—-]|\b(?:no|wait|sorry|actually)\b){1,12}", re.I)
_TAKES_BACK = re.compile(
    r"\b(?:wait|correction|oops|mistake|edit(?=:)|that(?:['’]s| is| was) (?:wrong|incorrect|not right))\b", re.I
)


def _answer_tails(text: str) -> Iterator[tuple[str, str]]:
    """What follows "answer is", "Answer:", "####" and the like, and the text after it; the last one first."""
    matches = [m for pattern in announcing(text) for m in pattern.finditer(text)]
    for match in sorted(matches, key=lambda m: m.start(), reverse=True)[:8]:
        tail = match.groupdict().get("tail") or ""
        if not tail.strip(" *_$\\[("):
            # The answer stands below the words: on the next lines, up to the next empty one.
            below = text[match.end() : match.end() + LONGEST_SENTENCE].lstrip(" *_\n\t")
            tail = tail.strip() + below.split("\n\n")[0]
        if match.re is HASHES and not re.search(r"\d", tail):
            continue  # a heading
        if text[max(0, match.start() - 1) : match.start()] in ('"', "'") or _JSON.search(text, 0, match.start()):
            tail = _json_value(tail)
        foreign = match.re is FOREIGN
        if foreign and (DENIES.search(match.group()) or DENIES.match(tail.lstrip(" *_")) or _denied_behind(tail)):
            tail = _of_denied(tail)
        elif _called_wrong(tail):
            tail = f"not {tail}"
        elif foreign:
            tail = _first_of_foreign(tail)
        # "#### 18" and "final answer" are meant as marks, whatever comes after them.
        strong = match.re in (HASHES, TAG) or re.search(
            r"final\s*$", text[max(0, match.start() - 8) : match.start()], re.I
        )
        yield tail, "" if strong else text[match.end("tail") if match.groupdict() else match.end() :]


_JSON = re.compile(r"[\"'](?:final|correct)_\Z")


def _json_value(tail: str) -> str:
    quoted = re.match(r"\s*([\"'])(.{0,400}?)\1\s*[,}]", tail)
    return quoted.group(2) if quoted else re.split(r"[,}]", tail)[0].strip(" \"'")


_FIGURE = re.compile(r"[*_$\s\\(]{0,8}(?P<value>[-−+]?[$€£¥]?\d[\d.,]*(?:/\d+)?\s?%?)(?=[^\d]|$)")


_FORMULA = re.compile(r"[*_\s]{0,8}(?:\$[^$]{1,300}\$|\\\(.{1,300}?\\\)|\\\[.{1,300}?\\\])")


def _denied_behind(tail: str) -> bool:
    """Whether a sentence in another language says of the number it begins with that it is not the answer."""
    return _behind_number(tail, DENIED_BEHIND)


def _called_wrong(tail: str) -> bool:
    """Whether the number that a tail begins with is crossed out or called wrong in brackets."""
    return _behind_number(tail, CROSSED_OUT, CALLED_WRONG)


def _behind_number(tail: str, *patterns: re.Pattern[str]) -> bool:
    """Whether one of the patterns stands behind the number that a tail begins with."""
    said = _FORMULA.match(tail) or _FIGURE.match(tail)
    return said is not None and any(pattern.match(tail, said.end()) for pattern in patterns)


def _of_denied(tail: str) -> str:
    """As English has it: "not 199", or "not 199, but 200"."""
    instead = INSTEAD.search(tail, 0, 80)
    return f"not this, but {_first_of_foreign(tail[instead.end() :])}" if instead else f"not {tail}"


def _first_of_foreign(tail: str) -> str:
    """The number that a sentence in another language begins with; the sentence itself if it begins with none."""
    match, formula = _FIGURE.match(tail), _FORMULA.match(tail)
    if formula:
        return formula.group()
    if match and not re.match(r"\s?[-+*/^=×√\\]|\s?[A-Za-z]\b(?!\w)", tail[match.end() :]):
        return match["value"].rstrip(".,")
    figures = re.findall(r"[-−]?\d[\d.,]*(?:/\d+)?", tail)
    # "他有45个苹果": a script without blanks, and one number.
    return figures[0].rstrip(".,") if len(figures) == 1 and re.search(r"[\u3040-\u9fff]{2}", tail) else tail


def _choice(text: str, boxes: list[str]) -> Extraction:
    """A box with a letter in it, then what announces a choice, then any box."""
    letters = [box for box in boxes if read_option(box) or re.fullmatch(r"\W*(?:\\\w+\{)?[A-Za-z]\W*", box)]
    if boxes and len(letters) == len(boxes):
        return Extraction(", ".join(boxes), "boxed", tuple(boxes) if len(boxes) > 1 else ())
    letter, stage = chosen(text)
    if letter is not None:
        return Extraction(letter, stage)
    if boxes:
        return Extraction(", ".join(boxes), "boxed", tuple(boxes) if len(boxes) > 1 else ())
    return Extraction(None, stage)
