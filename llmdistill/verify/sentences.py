"""The answer that a sentence gives, and the sentence that gives the answer where nothing announces one."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmdistill.verify.phrases import CONCLUDES, GIVES_UP, HOPE

LONGEST_SENTENCE = 2_000
BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s{0,9}(?:\[[^\]]{0,40}\]\s{0,9})?\{")
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[ap]\.m\.)[*_$]{0,4}\s+(?=[A-Z*$\\(])|(?<=[。！？])")
_CHATTER = re.compile(
    r"^[\s*_#>]*(?:let me know|feel free|would you like|i hope (?:this|that|it)|if you(?:'d| would| have)|please let)",
    re.I,
)
_NOTE = re.compile(r"^[\s*_#>(]*(?:note|remark|p\.?s\.?)[*_]{0,2}\s?[:*]", re.I)
_MATH = re.compile(
    r"(?<!\\)\$\$(?P<a>[^$]{1,1500})\$\$|(?<!\\)\$(?P<b>(?:\\\$|[^$\n]){1,600})(?<!\\)\$"
    r"|\\\[(?P<c>(?:[^\\]|\\(?!\])){1,1500})\\\]|\\\((?P<d>(?:[^\\]|\\(?!\))){1,600})\\\)"
    r"|(?P<e>-?\\[dt]?frac\{[^{}]{1,60}\}\{[^{}]{1,60}\})"
)
_BOLD = re.compile(r"\*\*([^*\n]{1,200})\*\*")
_VULGAR = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # written without spaces: a number stands right behind a word
_NUMBER = re.compile(
    rf"(?<![^\W{_CJK}])(?<![.^_/#])"
    r"(?:\b(?:minus|negative)\s)?(?:[-−+](?=[\d.$€£√]))?(?:\\?[$€£¥]\s?)?[-−]?"
    r"(?:(?P<time>\d{1,2}:\d\d(?:\s?[ap]\.?m\b\.?)?)"
    r"|(?:\d{1,3}(?:[, ]\d{3})+(?![\d])(?:\.\d+)?|\d+,\d{1,2}(?![\d,])|\d+(?:\.\d+)?|\.\d+)"
    rf"(?:\s\d{{1,3}}/\d{{1,3}}(?![\d/])|\s?/\s?\d+(?:\.\d+)?|\s?[{_VULGAR}])?(?:√\(?\d+\)?)?|√\(?\d+\)?|[{_VULGAR}])"
    r"(?:\s?(?:\\?%|percent\b))?"
)
# What belongs to a number behind it: powers of ten, scales, and the smaller unit of a measure in two units.
_GOES_ON = re.compile(
    r"\s?(?:[x×*]|\\times|\\cdot)\s?10\s?(?:\^\s?\{?\s?[-−+]?\d{1,3}\}?|[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]{1,4})"
    r"|\s(?:hundred|thousand|million|billion|trillion|dozen)\b|\s?(?:π|\\pi\b|pi\b)"
    r"|\s(?:dollars?|feet|foot|hours?|hrs?|minutes?|pounds?|yards?|weeks?|days?|meters?|metres?|kilometers?|degrees?)"
    r",?\s(?:and\s)?\d{1,4}(?:\.\d+)?\s(?:cents?|inch(?:es)?|minutes?|mins?|seconds?|ounces?|feet|days?|hours?"
    r"|centimeters?|meters?)\b|\s(?:kg|km|m|lbs?|hr?)\s\d{1,4}\s(?:g|m|cm|oz|min)\b"
)
_ADVERBIAL = re.compile(
    r"\b(?:for|(?<!total )(?<!sum )(?<!average )(?<!mean )(?<!maximum )(?<!minimum )(?<!profit )of|in|after|per|every"
    r"|each|from|at|with|within|by|during|than|these|those|para|por|durante|für|nach|pour|pendant)\s+"
    r"(?:the\s+|all\s+|these\s+|its\s+)?(?:first\s+|last\s+|next\s+|past\s+|other\s+)?[$€£]?$",
    re.I,
)
_DENIED = re.compile(
    r"(?:\b(?:half|third|quarter|double|twice|root|cube|square|reciprocal|inverse|multiple|sum|product"
    r"|difference) of|\bnor|\bneither|\bclose to|\breject|\bdiscard|\bdoubt that (?:it|\w) is"
    r"|\bwhether (?:it is|it['’]s)|\bnot|\bcannot|n['’]t"
    r"|\b(?:less|more|greater|fewer|larger|smaller|higher|lower|bigger|other|rather) than"
    r"|(?:^|\b(?:is|are|be) )at (?:least|most)|\bnever|\binstead of|\bnicht|\bno es)\s+"
    r"(?:[a-z]\s?=\s?)?(?:be\s+|equal(?:\s+to)?\s+|simply\s+|just\s+)?[$(\\]*$",
    re.I,
)
_REFUTED = re.compile(
    r"[)$*]{0,3}\s(?:is|was|are)\s(?:wrong|incorrect|impossible|rejected"
    r"|extraneous|invalid|discarded|too (?:small|large|big|low|high)|not\b)",
    re.I,
)
_BETWEEN = re.compile(
    r"\bbetween\s[^.;\n]{1,40}?\s(?:and|to)\s[^\s]{1,20}|\bfrom\s[-\d.,$]{1,12}\sto\s[-\d.,$]{1,12}", re.I
)
_COPULA = re.compile(
    r"\b(?:is|are|was|were|be|equals?|becomes|ist|beträgt|lautet|es|est)\b(?:\s+(?:equal\s+to|approximately|about|exactly|only))?"
)
_ANY_NUMBER_WORD = (
    r"(?:twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety)(?:-(?:one|two|three|four|five|six|seven|eight|nine))?|zero|one|two"
    r"|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|hundred|thousand|million"
    r"|half|halves|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|dozen"
)
_NUMBER_WORD = re.compile(
    r"\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|hundred|half|third|quarters?|twice|dozen)\b",
    re.I,
)
_SPELT = re.compile(
    rf"(?<![\d-] )(?<![\d-])\b(?:{_ANY_NUMBER_WORD})"
    rf"(?:(?:[ -]|[ -]and[ -]|[ -](?:in|out of)[ -])(?:{_ANY_NUMBER_WORD}|a))*\b(?!-)",
    re.I,
)
_WORD = re.compile(r"[A-Za-z]{2,}")
_NOT_PROSE = frozenset(
    re.findall(
        r"\w+",
        """sin cos tan cot sec csc log ln lg exp max min gcd lcm mod and or pi sqrt frac inf infty arcsin arccos arctan
        am pm cm mm km kg ft pct percent deg degrees in""",
    )
)
_ASIDE = re.compile(r",?\s(?:altogether|in total|total|in all|overall|respectively|combined)[.!\s]*$", re.I)


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


def answer_of_sentence(sentence: str) -> str | None:
    """The answer that a sentence such as "Jim walks **200 feet** less than Martha." gives; None if it gives none."""
    sentence = _ASIDE.sub("", _CALCULATOR.sub("", HOPE.sub("", sentence[:LONGEST_SENTENCE])).strip())
    sentence = re.sub(r"^\s{0,9}\d{1,2}[.)]\s+(?=[-$\d])", "", sentence)  # a step's number
    sentence = _LEADS.sub("", sentence.lstrip(" ,→⇒➜∴"))
    sentence = _NOT_THAT.sub(r"\g<kept>", sentence)
    sentence = _CIRCUMSTANCE.sub(r"\g<kept>", sentence)
    sentence = _BETWEEN.sub(" ", sentence)
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
    several = None if maths else _SEVERAL.search(plain)
    if several:
        return several.group()
    equation = _EQUATION.search(_blank(plain, maths))
    if equation:
        return equation["result"].strip()
    for start in [m.end() for m in reversed(list(_COPULA.finditer(plain)))][:3]:
        if _DENIED.search(plain[max(0, start - 24) : start] + " "):
            continue  # "it cannot be 45"
        tail = plain[start:].strip(" :")
        marked = _numbers_in(tail) or maths_in(tail)
        found = _first_candidate(tail)
        if looks_like_answer(tail) and (marked or not (_numbers_in(plain) or maths)):
            return found if maths_in(tail) else _result(tail)
        if found:
            return found
    if maths:
        return _run_of(plain, maths, len(maths) - 1)
    return _number_of_clause(plain)


# "So 199", "And so, $199$", "Thus Rs 199", "所以199": what leads up to a number is not of it.
_LEADS = re.compile(
    r"^(?:(?:so|and|or|then|thus|hence|therefore|donc|ainsi|somit|also|daher),?\s{1,9}|(?:所以|因此|故|따라서|よって)[,，、]?\s{0,9})"
    r"{1,3}(?=[*_]{0,3}\\?[(\[]?(?:rs\.?\s?|usd\s?|eur\s?|us)?[$€£₹]?[-+−]?\d)",
    re.I,
)
# "45, not 44", "45 rather than 44".
_NOT_THAT = re.compile(
    r"(?P<kept>^.{0,200}?\d.{0,80}?)(?:,\s(?:and\s)?not|,?\srather\sthan|,?\sinstead\sof)\s[^.]{1,80}"
)
# What a number is said of, behind it: "45 when r = 3", "45 left after giving 5 away", "-4 at x = 2".
_CIRCUMSTANCE = re.compile(
    r"(?P<kept>^[^.]{0,200}?\d[^.]{0,80}?),?\s(?:(?:after|before|by|without)\s[a-z]+ing|when|where|attained|occurring|to\sfinish"
    r"|at\s\$?[a-z]\s?=)\s[^.]{1,80}"
)
# "x = 1 and x = -2"
_SEVERAL = re.compile(
    r"(?<!\w)(?P<n>[A-Za-z]_?\d?)\s?=\s?[-−]?\d[\d./]{0,20}(?:,?\s(?:and|or)\s|,\s?)[A-Za-z]_?\d?\s?=\s?[-−]?\d[\d./]{0,20}(?<=\d)"
)
_CALCULATOR = re.compile(r"<<[^<>\n]{0,200}>>")
_SUBORDINATE = re.compile(
    r"^(?:(?:so|thus|therefore|hence|then)\b,?\s*)?(?:since|if|because|after|when|as|given|before|with)\b[^,]{3,200},\s+(?=\w)",
    re.I,
)
# Arithmetic spelt out in prose, "he has $40 - $21 = $19 left": its result.
_EQUATION = re.compile(
    r"[\d)%.\"]\s{0,5}(?:[A-Za-z]{1,20}(?:[\s/]{1,3}|(?==))){0,3}="
    r"\s{0,5}(?P<result>[-−]?(?:\\?[$€£]\s?)?[-−]?\d[\d,]*(?:\.\d+)?(?:\s?/\s?\d+)?%?)(?![\d^])(?![^=]*=)"
    r"(?!\s?[-+*/×·]\s?[\d(])"
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
    """The numbers of a sentence but those in adjectives ("the 400-meter hurdles") and those denied ("not 45")."""
    found: list[re.Match[str]] = []
    end = 0
    for match in _NUMBER.finditer(text):
        if match.start() < end:
            continue  # the cents of "45 dollars and 50 cents"
        more = _GOES_ON.match(text, match.end())
        end = more.end() if more else match.end()
        found.append(match)
    return [
        m
        for m in found
        if not re.match(r"-[A-Za-z]", text[m.end() : m.end() + 2])
        and not _DENIED.search(text[max(0, m.start() - 24) : m.start()])
        and not _REFUTED.match(text, m.end())
        and not _CJK_DENIED[0].search(text[max(0, m.start() - 8) : m.start()])
        and not _CJK_DENIED[1].match(text, m.end())
    ]


# 不是45, 并非45; 45가 아닙니다, 45ではない, 45個じゃありません.
_CJK_DENIED = (
    re.compile(r"(?:不|非|没有|沒有|未)[是等于為为到超过過]{0,3}\s?$"),
    re.compile(rf"\s?[{_CJK}]{{0,3}}?\s?(?:아니|아닙|않|ではな|ではあり|じゃな|じゃあり)"),
)


def _whole_number(text: str, match: re.Match[str]) -> str:
    """A number with what belongs to it: "3 dozen", "3.2×10⁻⁹", "45 dollars and 50 cents"."""
    more = _GOES_ON.match(text, match.end())
    before = re.search(r"(?<![\w.])[$]?\d[\d.,]*\s+or\s+$", text[max(0, match.start() - 24) : match.start()])
    after = re.match(r"\s+or\s+[$]?\d[\d.,]*(?<![.,])", text[match.end() : match.end() + 24])
    if before or after:  # two guesses are not one answer
        return (before.group() if before else "") + match.group() + (after.group() if after else "")
    return text[match.start() : more.end() if more else match.end()]


def _run_of(text: str, maths: list[tuple[int, int, str]], at: int) -> str:
    """The formula, or the formulas with nothing but commas and "and" between them that it is one of."""
    first = last = at
    while first > 0 and _JOINS.fullmatch(text[maths[first - 1][1] : maths[first][0]]):
        first -= 1
    while last < len(maths) - 1 and _JOINS.fullmatch(text[maths[last][1] : maths[last + 1][0]]):
        last += 1
    return ", ".join(content for _, _, content in maths[first : last + 1])


_JOINS = re.compile(r"\s{0,3}(?:,|;|,?\s?\b(?:and|or)\b)\s{0,3}")


def _first_candidate(tail: str) -> str | None:
    maths, numbers = maths_in(tail), _numbers_in(tail)
    if numbers and _ADVERBIAL.search(tail[: numbers[0].start()]):
        numbers = []
    if maths and (not numbers or maths[0][0] <= numbers[0].start()):
        return _run_of(tail, maths, 0)
    return _whole_number(tail, numbers[0]) if numbers else None


def _number_of_clause(sentence: str) -> str | None:
    """The last number that does not hang on a preposition ("for the 12 of them"), else the last number."""
    numbers = _numbers_in(sentence)
    free = [m for m in numbers if not _hangs(sentence[max(0, m.start() - 80) : m.start()])]
    chosen = free or numbers
    if not chosen:
        return _spelt_number(sentence)
    # "16 people think that ...": what a sentence begins with is what it is about.
    subject = chosen[0].start() <= len(sentence) - len(sentence.lstrip(" *_$")) and free
    return _whole_number(sentence, chosen[0] if subject and _SUBJECT.match(sentence, chosen[0].end()) else chosen[-1])


def _hangs(before: str) -> bool:
    """Whether a preposition stands in front of a number; "exceeded it by 20" says the number all the same."""
    return bool(_ADVERBIAL.search(before[-40:])) and not _BY_HOW_MUCH.search(before)


_BY_HOW_MUCH = re.compile(
    r"\b(?:exceed|increas|decreas|ris(?:e|ing)|rose|f[ae]ll|reduc|gr[eo]w|differ|dropp|outnumber)\w{0,5}\b[^.]{0,60}\bby\s+[$€£]?$",
    re.I,
)


def _spelt_number(sentence: str) -> str | None:
    """The last number in words, "three quarters" or "one in four"; a lone "one" or "half" is none."""
    found = [
        m.group() for m in _SPELT.finditer(sentence) if not _DENIED.search(sentence[max(0, m.start() - 24) : m.start()])
    ]
    found = [words for words in found if words.lower() not in ("one", "half", "third", "quarter", "fifth", "two")]
    return found[-1] if found else None


_SUBJECT = re.compile(
    r"\s[a-z]{2,20}(?:\s[a-z]{2,20}){0,2}\s(?:\w{1,15}(?:ed|ing|s)|drove|came|went|think|have|had|left|are|were|took)\b"
)


def looks_like_answer(text: str) -> bool:
    """Whether a text is an answer and nothing else: a formula, a number with its unit, a word or two."""
    text = text.strip().strip("*_").strip()
    if not text or len(text) > 400 or "\n\n" in text or BOX.search(text):
        return False
    if any(_LEADS.match(sentence) for sentence in _SENTENCE_END.split(text)):
        return False
    maths = maths_in(text)
    if len(maths) == 1 and maths[0][:2] == (0, len(text.rstrip(" .,"))):
        return True
    if _CJK_SENTENCE.search(text):
        return False
    text = _SPELT.sub("1", text.replace("\\$", "$"))
    bare = re.sub(r"\\[A-Za-z]+", " ", text)
    words = [w for w in _WORD.findall(bare) if w.lower() not in _NOT_PROSE]
    if len(words) > 2 or any(_COPULA.fullmatch(w) for w in words):
        return False
    digit = re.search(r"\d", text)
    if not digit or not words or "\\" in text:
        return True
    before = [w for w in words if text.find(w) < digit.start()]
    # "It costs $3.50" is a sentence, "So 199" one too; "Rs 5" and "x = 5" are answers.
    return not before or (len(before) == 1 and len(before[0]) <= 2 and not _NO_UNIT.fullmatch(before[0]))


# "一共有199个苹果" is a sentence, "199元" an answer.
_CJK_SENTENCE = re.compile(rf"[{_CJK}]\s?[-$€£¥]?\d|\d\s?[{_CJK}]{{4}}")
_NO_UNIT = re.compile(r"so|as|at|by|if|in|it|of|on|or|to|we|an|be|he|do|go|my|up", re.I)  # and never a unit or a name


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a completion without calculator marks, code listings and closing pleasantries."""
    text = _CALCULATOR.sub("", text[-20_000:])
    kept = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        lines = [line for line in paragraph.split("\n") if line.strip() and not _CHATTER.match(line)]
        if lines and not _NOTE.match(lines[0]):
            kept.append("\n".join(lines))
    return kept


def unmarked(text: str) -> Extraction:
    """An answer that no mark points to: the concluding sentence's, or the last formula or number."""
    blocks = paragraphs(text)
    if GIVES_UP.search(text[-600:]):
        return Extraction(None, "gave_up")
    # The last paragraph may say in words what the one before it shows in figures: one step back, no further.
    for block in blocks[: -3 if len(blocks) > 2 else None : -1]:
        sentences = [
            s
            for s in _sentences(block)
            if _NUMBER.search(s) or maths_in(s) or (CONCLUDES.match(s) and _NUMBER_WORD.search(s)) or _spelt_number(s)
        ]
        if not sentences:
            continue
        concluding = [s for s in sentences if CONCLUDES.match(s)]
        if concluding and (sentences[-1] is concluding[-1] or _CHECKS.search(sentences[-1])):
            found = answer_of_sentence(concluding[-1])
            if found:
                return Extraction(found, "conclusion")
        maths, numbers = maths_in(sentences[-1]), _numbers_in(sentences[-1])
        if maths and (not numbers or numbers[-1].start() <= maths[-1][1]):
            return Extraction(_run_of(sentences[-1], maths, len(maths) - 1), "last_math")
        found = answer_of_sentence(sentences[-1])
        if found:
            return Extraction(found, "last_number")
    return Extraction(None, "none")


_CHECKS = re.compile(r"\b(?:check|verif|confirm|correct|because|indeed|note that|consistent|satisf)", re.I)


def conclusion_within(text: str) -> str | None:
    """The answer of the last concluding sentence of several; None where there is none, or but one sentence."""
    sentences = _sentences(text)
    concluding = [s for s in sentences[1:] if CONCLUDES.match(s)]
    return answer_of_sentence(concluding[-1]) if concluding else None


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
