"""Finding the answer in a completion.

The rules are tried in order; the first that finds something decides, and its name is kept with the verdict:

    boxed         the last \\boxed, \\fbox or \\framebox (a run of them joined by commas, "and", "or" is one answer)
    answer_line   "#### 18", "A: 18", "Answer: ...", "the answer is ..."
    whole         the completion is nothing but an answer ("-5", "$x = 3$", "east")
    conclusion    the last sentence that begins with Therefore, Thus, So, Hence, ...
    last_math, last_number    the last formula or number of the last paragraph, unless the completion gives up

Everything up to the last "</think>" is dropped first, with or without an opening tag, since templates may prefill it.
A completion that opens "<think>" and never closes it has no answer: what stands there is a draft. Every rule runs in
time linear in the text, and reads no more than the last 200,000 characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

LONGEST = 200_000
LONGEST_SENTENCE = 2_000

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])")
_BRACE = re.compile(r"\\{1,4}(?:boxed|fbox|framebox)(?![A-Za-z])|\\[\\{}]|[{}]")
_BARE_BOX = re.compile(
    r"\\{1,4}(?:boxed|fbox)[ \t]{0,9}(?!\\{1,4}(?:boxed|fbox))"
    r"(\\[A-Za-z]{1,20}(?:\{[^{}]{0,60}\}){0,2}|[\w.+-][^\s{}$\\]{0,60})"
)
_END_OF_TURN = re.compile(r"<\|(?:im_start|im_end|endoftext|eot_id|end_of_text)\|>|</s>|<｜end▁of▁sentence｜>")
# Between boxes that make one answer: marks and joiners, a unit or two before them, the next one's name after them.
_MARKS = (
    r"(?:\s|\\\\|\\[()\[\],;!:]|\$|\\q?quad(?![A-Za-z])|[,;&.]|\b(?:and|or)\b"
    r"|\\(?:text|mathrm)\s*\{\s*(?:,?\s*(?:and|or)\s*)?,?\s*\})*"
)
_BETWEEN_BOXES = re.compile(
    rf"{_MARKS}(?:(?:[a-z]{{2,12}} ){{1,2}}(?:and|or)\b|(?:[a-z]{{2,12}} ?){{1,2}},)?{_MARKS}"
    r"(?:[A-Za-z](?:_\{?\w\}?)?\s*=)?\s*"
)
_JOINER = re.compile(r"[,;]|\b(?:and|or)\b")
# Repetitions that could meet themselves are bounded, here and below: no text takes more than linear time.
_HASHES = re.compile(r"^[ \t]{0,20}####(?P<tail>[^\n]{1,2000})", re.M)
_LETTER_A = re.compile(r"^[ \t]{0,20}A[ \t]{0,20}:(?P<tail>[^\n]{1,2000})", re.M)
_ANSWER = re.compile(
    r"\banswers?\b[*_ \t]{0,9}(?:\([^()\n]{0,40}\)[*_ \t]{0,9})?(?:(?:to|for|of)\b[^\n:.]{0,80}?)?"
    r"(?:\b(?:is|are|equals)\b[ \t]{0,9}:?|[*_ \t]{0,9}[:：=])[*_ \t]{0,9}(?=(?P<tail>[^\n]{0,2000}))",
    re.I,
)
_FINAL = re.compile(r"\bfinal answer is\b[ \t]{0,9}:?(?=(?P<tail>[^\n]{0,2000}))", re.I)
_HEADING = re.compile(r"^[#*_ \t]{0,20}(?:final[ \t]{1,9})?answer[ \t]{0,9}[*_:]{0,9}[ \t]{0,9}$", re.I | re.M)
_HOPE = re.compile(r"\.?\s*I hope (?:it|this) is correct.*", re.I | re.S)
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[ap]\.m\.)[*_$]{0,4}\s+(?=[A-Z*$\\(])")
_CONCLUDES = re.compile(r"^[\s*_#>-]*(?:therefore|thus|hence|so|consequently|in conclusion|finally|in total)\b", re.I)
_CHATTER = re.compile(
    r"^[\s*_#>]*(?:let me know|feel free|would you like|i hope (?:this|that|it)|if you(?:'d| would| have)|please let)",
    re.I,
)
_GIVES_UP = re.compile(
    r"(?:can(?:no|')t|can not|could not|couldn't|unable to|impossible to|difficult to|not possible to)"
    r"\s+(?:be\s+)?(?:accurately\s+|exactly\s+|directly\s+|uniquely\s+|definitively\s+)?"
    r"(?:determine|find|solve|calculate|compute|answer|know|give|provide|say)"
    r"|not enough information|insufficient (?:information|data)|i (?:don't|do not) know|i am not sure|i'm not sure"
    r"|work through the|walk through the|\b(?:me|you) to (?:continue|proceed|complete|finish|solve)",
    re.I,
)
_MATH = re.compile(
    r"(?<!\\)\$\$(?P<a>[^$]{1,1500})\$\$|(?<!\\)\$(?P<b>(?:\\\$|[^$\n]){1,600})(?<!\\)\$"
    r"|\\\[(?P<c>(?:[^\\]|\\(?!\])){1,1500})\\\]|\\\((?P<d>(?:[^\\]|\\(?!\))){1,600})\\\)"
    r"|(?P<e>-?\\[dt]?frac\{[^{}]{1,60}\}\{[^{}]{1,60}\})"
)
_BOLD = re.compile(r"\*\*([^*\n]{1,200})\*\*")
_NUMBER = re.compile(
    r"(?<![\w.^_/])(?:[-−+](?=[\d.$€£√]))?(?:\\?[$€£¥]\s?)?[-−]?(?:(?P<time>\d{1,2}:\d\d(?:\s?[ap]\.?m\b\.?)?)"
    r"|(?:\d{1,3}(?:[, ]\d{3})+(?![\d])(?:\.\d+)?|\d+,\d{1,2}(?![\d,])|\d+(?:\.\d+)?|\.\d+)"
    r"(?:\s?/\s?\d+(?:\.\d+)?)?(?:√\(?\d+\)?)?|√\(?\d+\)?)(?:\s?(?:\\?%|percent\b))?"
)
_ADVERBIAL = re.compile(
    r"\b(?:for|(?<!total )(?<!sum )(?<!average )(?<!mean )(?<!maximum )(?<!minimum )(?<!profit )of|in|after|per|every"
    r"|each|from|at|with|within|by|during|than|these|those)\s+(?:the\s+|all\s+|these\s+|its\s+)?[$€£]?$",
    re.I,
)
_COPULA = re.compile(
    r"\b(?:is|are|was|were|be|equals?|becomes)\b(?:\s+(?:equal\s+to|approximately|about|exactly|only))?"
)
_NUMBER_WORD = re.compile(
    r"\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|half|twice|dozen)\b", re.I
)
_WORD = re.compile(r"[A-Za-z]{2,}")
_NOT_PROSE = frozenset(
    re.findall(
        r"\w+",
        """sin cos tan cot sec csc log ln lg exp max min gcd lcm mod and or pi sqrt frac inf infty arcsin arccos arctan
        am pm cm mm km kg ft pct percent deg degrees in""",
    )
)
_OPTION = re.compile(r"(?<![A-Za-z0-9])\(?\**\(?([A-J])\)?\**(?![A-Za-z0-9'’])")


@dataclass(frozen=True)
class Extraction:
    """An answer and the rule that found it.

    Attributes:
        answer: the answer as it was written; None where there is none.
        stage: the name of the rule, or "none", "gave_up", "unfinished_thinking".
        parts: the contents of the boxes where several stood in a row; () otherwise.
    """

    answer: str | None
    stage: str
    parts: tuple[str, ...] = ()


def extract(text: str, *, kind: Literal["math", "choice"] = "math", last_number: bool = True) -> Extraction:
    """The answer that a completion states.

    Args:
        text: the completion, thinking included.
        kind: "choice" looks for an option letter where there is no box.
        last_number: whether the last formula or number may stand in for an answer that is not marked as one. Switch
            it off for completions that were cut off, and where the prompt asks for a box and means it.

    Source: the order of EVALUATION section 5 (boxed, answer line, last number where the task allows).
    """
    if len(text) > LONGEST:
        text = text[-LONGEST:]
    thinking, closed, rest = text.rpartition("</think>")
    if not closed and "<think>" in text:
        return Extraction(None, "unfinished_thinking")
    text = rest if closed else text
    turn_ends = _END_OF_TURN.search(text)
    if turn_ends and text[: turn_ends.start()].strip():
        text = text[: turn_ends.start()]

    boxes, after = _last_boxes(text)
    final = _FINAL.search(text, after) if boxes else None
    if final and _HOPE.search(final["tail"]):
        # A box on the way, and after it the closing words of the few-shot prompts: those are the answer.
        found = answer_of_sentence(final["tail"])
        if found:
            return Extraction(found, "answer_line")
    if boxes:
        return Extraction(", ".join(boxes), "boxed", tuple(boxes) if len(boxes) > 1 else ())
    if kind == "choice":
        return _choice(text)
    for tail, rest in _answer_tails(text):
        found = answer_of_sentence(tail)
        if found and last_number and len(rest) > 80 and not _HOPE.search(tail):
            # "So the answer is 24 for now. ..." and later "Therefore, Jeff is 30.": the later conclusion counts.
            later = _unmarked(rest)
            if later.stage == "conclusion":
                return later
        if found:
            return Extraction(found, "answer_line")
    stripped = re.sub(r"^[\s*_]*(?:the\s+)?(?:final\s+)?answer\b[\s*_:]*", "", text.strip(), flags=re.I)
    if looks_like_answer(stripped):
        return Extraction(stripped, "whole")
    if not last_number:
        return Extraction(None, "none")
    return _unmarked(text)


def _last_boxes(text: str) -> tuple[list[str], int]:
    """The contents of the last run of boxes, in order, and where it ends; ([], 0) without a closed, filled box."""
    if not _BOX.search(text):
        return [], 0
    # One pass with a stack. An entry is the start of a box's command, or None for an ordinary brace.
    stack: list[tuple[int, int] | None] = []
    found: list[tuple[int, int, str]] = []  # begin, end, content
    pending: tuple[int, int] | None = None  # a box command: its begin, and where its brace must be
    for token in _BRACE.finditer(text):
        word = token.group()
        if word.startswith("\\") and len(word) > 2:
            brace = _argument(text, token.end())
            pending = (token.start(), brace) if brace is not None else None
            if brace is None:
                bare = _BARE_BOX.match(text, token.start())
                if bare:
                    found.append((token.start(), bare.end(), bare.group(1).rstrip(".,;:")))
        elif word == "{":
            stack.append(pending if pending and pending[1] == token.start() else None)
        elif word == "}" and stack:
            box = stack.pop()
            if box is not None:
                content = text[box[1] + 1 : token.start()].strip()
                while found and found[-1][0] > box[0]:  # boxes inside this one
                    found.pop()
                if content:
                    found.append((box[0], token.end(), content))
    if not found:
        return [], 0
    run = [found[-1]]
    for box_before in reversed(found[:-1]):
        gap = text[box_before[1] : run[0][0]]
        if len(gap) > 80 or not _BETWEEN_BOXES.fullmatch(gap) or ("\n\n" in gap and not _JOINER.search(gap)):
            break
        run.insert(0, box_before)
        if len(run) == 32:
            break
    return list(dict.fromkeys(content for _, _, content in run)), run[-1][1]


def _argument(text: str, at: int) -> int | None:
    """Where the brace of a box's argument stands, past blanks and [options]; None if it has none."""
    while at < len(text) and text[at] in " \t\n":
        at += 1
    while at < len(text) and text[at] == "[":
        close = text.find("]", at, at + 40)
        if close < 0:
            return None
        at = close + 1
    return at if at < len(text) and text[at] == "{" else None


def _answer_tails(text: str) -> Iterator[tuple[str, str]]:
    """What follows "answer is", "Answer:", "####" and the like, and the text after it; the last one first."""
    matches = [m for pattern in (_HASHES, _LETTER_A, _ANSWER, _HEADING) for m in pattern.finditer(text)]
    for match in sorted(matches, key=lambda m: m.start(), reverse=True)[:8]:
        tail = match.groupdict().get("tail") or ""
        if not tail.strip(" *_$\\[("):
            # The answer stands below the words: on the next lines, up to the next empty one.
            below = text[match.end() : match.end() + LONGEST_SENTENCE].lstrip(" *_\n\t")
            tail = tail.strip() + below.split("\n\n")[0]
        if match.re is _HASHES and not re.search(r"\d", tail):
            continue  # a heading
        # "#### 18" and "final answer" are meant as marks, whatever comes after them.
        strong = match.re is _HASHES or re.search(r"final\s*$", text[max(0, match.start() - 8) : match.start()], re.I)
        yield tail, "" if strong else text[match.end("tail") if match.groupdict() else match.end() :]


def answer_of_sentence(sentence: str) -> str | None:
    """The answer that a sentence such as "Jim walks **200 feet** less than Martha." gives; None if it gives none."""
    sentence = _CALCULATOR.sub("", _HOPE.sub("", sentence[:LONGEST_SENTENCE])).strip()
    if looks_like_answer(sentence):
        return _result(sentence)
    sentence = _SENTENCE_END.split(sentence)[0]
    if looks_like_answer(sentence):
        return _result(sentence)
    for bold in reversed(_BOLD.findall(sentence)):
        if bold.strip() == sentence.strip(" *_."):
            continue
        if looks_like_answer(bold) and (_NUMBER.search(bold) or _NUMBER_WORD.search(bold) or maths_in(bold)):
            return _result(bold)
    plain = _SUBORDINATE.sub("", sentence.replace("*", ""))
    maths = maths_in(plain)
    equation = _EQUATION.search(_blank(plain, maths))
    if equation:
        return equation["result"].strip()
    for start in [m.end() for m in reversed(list(_COPULA.finditer(plain)))][:3]:
        tail = plain[start:].strip(" :")
        marked = _numbers_in(tail) or maths_in(tail)
        found = _first_candidate(tail)
        if looks_like_answer(tail) and (marked or not (_numbers_in(plain) or maths)):
            return found if maths_in(tail) else _result(tail)
        if found:
            return found
    if maths:
        return maths[-1][2]
    return _number_of_clause(plain)


_CALCULATOR = re.compile(r"<<[^<>\n]{0,200}>>")
_SUBORDINATE = re.compile(
    r"^(?:(?:so|thus|therefore|hence|then)\b,?\s*)?(?:since|if|because|after|when|as|given|before|with)\b[^,]{3,200},\s+(?=\w)",
    re.I,
)
# Arithmetic spelt out in prose, "he has $40 - $21 = $19 left": its result.
_EQUATION = re.compile(
    r"[\d)%.\"]\s{0,5}(?:[A-Za-z]{1,20}(?:[\s/]{1,3}|(?==))){0,3}="
    r"\s{0,5}(?P<result>[-−]?(?:\\?[$€£]\s?)?[-−]?\d[\d,]*(?:\.\d+)?(?:\s?/\s?\d+)?%?)(?![\d^])(?![^=]*=)"
)


def _result(answer: str) -> str:
    """An answer without the arithmetic in front of it."""
    equation = None if "\\" in answer or maths_in(answer) else _EQUATION.search(answer)
    return equation["result"].strip() if equation else answer


def maths_in(text: str) -> list[tuple[int, int, str]]:
    """(begin, end, content) of the formulas in a text. "$5 and $3" is money, and holds none."""
    found, at = [], 0
    while match := _MATH.search(text, at):
        content = next(group for group in match.groups() if group is not None)
        if match["b"] is not None and _is_money(content, text[match.end() : match.end() + 1]):
            at = match.start() + 1
            continue
        found.append((match.start(), match.end(), content.strip()))
        at = match.end()
    return found


def _is_money(content: str, next_character: str) -> bool:
    if next_character.isdigit() or "**" in content:
        return True
    if not content[:1].isdigit():
        return False
    return (
        content[-1] in "+-−*/=(x×,; "
        and content[:1] != " "
        or bool(re.search(r"(?<![\\{A-Za-z])[A-Za-z]{3,}", content))
    )


def _blank(text: str, maths: list[tuple[int, int, str]]) -> str:
    """A text with its formulas blanked out."""
    for begin, end, _ in maths:
        text = text[:begin] + "~" * (end - begin) + text[end:]
    return text


def _numbers_in(text: str) -> list[re.Match[str]]:
    """The numbers of a sentence, those in adjectives ("the 400-meter hurdles") left out."""
    return [m for m in _NUMBER.finditer(text) if not re.match(r"-[A-Za-z]", text[m.end() : m.end() + 2])]


def _first_candidate(tail: str) -> str | None:
    maths, numbers = maths_in(tail), _numbers_in(tail)
    if numbers and _ADVERBIAL.search(tail[: numbers[0].start()]):
        numbers = []
    if maths and (not numbers or maths[0][0] <= numbers[0].start()):
        return maths[0][2]
    return numbers[0].group() if numbers else None


def _number_of_clause(sentence: str) -> str | None:
    """The last number that does not hang on a preposition ("for the 12 of them"), else the last number."""
    numbers = _numbers_in(sentence)
    free = [m for m in numbers if not _ADVERBIAL.search(sentence[max(0, m.start() - 40) : m.start()])]
    chosen = free or numbers
    return chosen[-1].group() if chosen else None


def looks_like_answer(text: str) -> bool:
    """Whether a text is an answer and nothing else: a formula, a number with its unit, a word or two."""
    text = text.strip().strip("*_").strip()
    if not text or len(text) > 400 or "\n\n" in text or _BOX.search(text):
        return False
    maths = maths_in(text)
    if len(maths) == 1 and maths[0][:2] == (0, len(text.rstrip(" .,"))):
        return True
    text = text.replace("\\$", "$")
    bare = re.sub(r"\\[A-Za-z]+", " ", text)
    words = [w for w in _WORD.findall(bare) if w.lower() not in _NOT_PROSE]
    if len(words) > 2 or any(_COPULA.fullmatch(w) for w in words):
        return False
    digit = re.search(r"\d", text)
    return not (digit and words and text.find(words[0]) < digit.start() and len(words[0]) > 2 and "\\" not in text)


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a completion without calculator marks, code listings and closing pleasantries."""
    text = _CALCULATOR.sub("", text[-20_000:])
    kept = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        lines = [line for line in paragraph.split("\n") if line.strip() and not _CHATTER.match(line)]
        if lines:
            kept.append("\n".join(lines))
    return kept


def _unmarked(text: str) -> Extraction:
    """An answer that no mark points to: the concluding sentence's, or the last formula or number."""
    blocks = paragraphs(text)
    if _GIVES_UP.search(text[-600:]):
        return Extraction(None, "gave_up")
    # The last paragraph may say in words what the one before it shows in figures: one step back, no further.
    for block in blocks[: -3 if len(blocks) > 2 else None : -1]:
        sentences = [s for s in _sentences(block) if _NUMBER.search(s) or maths_in(s)]
        if not sentences:
            continue
        concluding = [s for s in sentences if _CONCLUDES.match(s)]
        if concluding and (sentences[-1] is concluding[-1] or _CHECKS.search(sentences[-1])):
            found = answer_of_sentence(concluding[-1])
            if found:
                return Extraction(found, "conclusion")
        maths, numbers = maths_in(sentences[-1]), _numbers_in(sentences[-1])
        if maths and (not numbers or numbers[-1].start() <= maths[-1][1]):
            return Extraction(maths[-1][2], "last_math")
        found = answer_of_sentence(sentences[-1])
        if found:
            return Extraction(found, "last_number")
    return Extraction(None, "none")


_CHECKS = re.compile(r"\b(?:check|verif|confirm|correct|because|indeed|note that|consistent|satisf)", re.I)


def _sentences(block: str) -> list[str]:
    """The sentences of a paragraph; what ends in a colon goes on in the next line."""
    lines: list[str] = []
    display = False
    for line in block.split("\n"):
        if lines and (display or lines[-1].rstrip(" *").endswith(":") or line.strip() in ("\\]", "$$")):
            lines[-1] += "\n" + line
        else:
            lines.append(line)
        display = line.strip() in ("\\[", "$$") and not (display and line.strip() == "$$")
    return [s for line in lines for s in _SENTENCE_END.split(line)]


def _choice(text: str) -> Extraction:
    """An option's letter: after "answer is", alone on its line, or the last one that stands by itself."""
    for tail, _ in _answer_tails(text):
        found = _OPTION.search(tail[:80])
        if found:
            return Extraction(found.group(1), "answer_line")
    for line in reversed(text.strip()[-4000:].split("\n")):
        alone = re.fullmatch(r"[\s*_>]*\(?([A-Ja-j])\)?[\s*_]*(?:[.):]\s*.{0,200})?", line)
        if alone:
            return Extraction(alone.group(1).upper(), "whole" if line.strip() == text.strip() else "option_line")
    if _GIVES_UP.search(text[-600:]):
        return Extraction(None, "gave_up")
    # A bare "A" opens sentences and "I" is a word: without brackets only in the words "option B", "choice B".
    named = re.findall(r"\(([A-J])\)|\b(?:option|choice)\s+\**([A-J])\b", text[-4000:])
    if named:
        return Extraction(named[-1][0] or named[-1][1], "last_option")
    return Extraction(None, "none")
