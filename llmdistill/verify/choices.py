"""The option that a completion chooses.

The last statement of a choice counts: "Answer: D", "option D is correct", "I choose (d)", "故选：D". Two letters in one
statement are two choices, and are given back as they stand ("A and C"), which no gold of one letter equals.
"""

from __future__ import annotations

import re

from llmdistill.verify.phrases import CROSSED_OUT, DENIED_BEHIND, DENIES, FOREIGN, GIVES_UP, HASHES, announcing

_BARE = r"\[?[*_\"'“`]{0,4}(?:\\(?:text|mathrm|textbf|mathbf|boldsymbol|bm)\{)?[*_\"'“`]{0,4}"
_LETTER = rf"{_BARE}(?:[(（\[](?P<round>[A-Za-z])[)）\]]|(?P<alone>[A-Z])(?![A-Za-z0-9]|['’][A-Za-z]))"
_UNNAMED = _LETTER.replace("?P<round>", "").replace("?P<alone>", "")
_NEXT = re.compile(
    rf"[*_\"'”`}} ]{{0,4}}(?:,|/|&|\+|[ ](?=[A-HJ-Z]\b)|\band\b|\bor\b|\bund\b|\boder\b|\by\b|\bet\b|和|或|、)[ ]?"
    rf"(?:option |choice )?{_UNNAMED}"
)
_FILLER = (
    "option|choice|statement|letter|opción|alternativa|opzione|opção|correct|definitely|clearly"
    "|probably|simply|either|indeed|therefore|thus"
)
# Articles are written small: "A" is an option.
_HEAD = re.compile(
    rf"(?:[ \t]|[*_$:：\"“]|\\[(]|(?:{_FILLER})(?=[\s*_$:：(])|(?:选项|選項|选|選)"
    rf"|(?-i:the|la|le|die|der|das|o|a|el)(?=[\s*_(]))"
    rf"{{0,12}}{_LETTER}",
    re.I,
)
# "A triangle" and "I think" are no options.
_ARTICLE = re.compile(r" (?!(?:is|or|and|because|since|as|by|which|with|for|in|that|on|from)\b)[a-z]{2,}")
_NOT = re.compile(
    r"^[ \t*_:]{0,6}(?:definitely |clearly |probably )?"
    r"(?:not|n't|neither|never|none|nicht|no es|n'est pas|не|不)(?![A-Za-z])",
    re.I,
)
_STATEMENT = re.compile(
    r"\b(?:correct|right|best|true|proper|chosen|final|selected)\s{1,3}"
    r"(?:answer|option|choice|statement|response|one|letter)s?\b[*_ \t]{0,4}"
    r"(?:is|are|would be|must be|should be|=|:|：)+"
    r"|\b(?:answers?|options?|choices?)\b[*_\"' \t]{0,4}(?:is|are|would be|must be|should be|:|：|=)+"
    r"|\bI(?:['’](?:ll|d|m))?[ \t](?:would |will |am |therefore |thus |finally |still )*"
    r"(?:choose|choosing|pick|picking|select|selecting|go(?:ing)? with|answer|say)\b"
    r"|\b(?:choose|pick|select|go with|going with)(?= +(?:the )?(?:option|choice|\(|[A-Z][.,!*]?\s*$))"
    r"|^\W{0,6}(?:correct|right)[*_ \t]{0,3}[:：]|\brichtig(?:e \w{3,12})? ist\b"
    r"|\b(?:it|that|this)(?: is|['’]s| must be| has to be)(?= +(?:option |choice |\()?\(?[A-Z]\b\)?[.,!\s*]*$)"
    r"|\b(?:therefore|thus|hence|so)\b,?(?= {1,3}[*_]{0,2}\(?[A-Z]\)?[*_.\s]{0,6}$)"
    r"|(?:故|应|應|所以|因此|因而|则|就)?(?:选择|選擇|选|選)(?:项|項)?(?:是|为|為)?[:：]?"
    r"|правильный (?:ответ|вариант)[ \t]{0,3}[:—–-]?|\brichtige \w{3,12} (?:ist|lautet)\b|\bbonne \w{3,12} est\b"
    r"|\b(?:opción|respuesta|alternativa|opção|risposta|opzione) (?:correct|corret)\w{1,2} (?:es|é|è)\b",
    re.I | re.M,
)
# A noun and its letter, without a verb, in languages that say it so: "Réponse B", "Đáp án B", "Cevap B şıkkıdır".
_NAMED = re.compile(
    rf"\b(?:réponse|respuesta|resposta|risposta|antwort|alternativa|opción|opção|opzione|вариант(?: ответа)?"
    rf"|ответ|cevap|đáp án|odpowiedź|svar|antwoord|jawaban|vastaus|الإجابة|उत्तर|选项|選項)\b"
    rf"(?:[ \t:—-]{{1,3}}(?!(?:oder|ou|или)\b)\w{{2,12}}){{0,2}}[ \t:—-]{{1,3}}"
    rf"(?={_UNNAMED}(?:[\s.,!*)।]|$))",
    re.I,
)
_RIGHT = r"richtig|korrekt|correcta?|correcte|corretta?|correto|juste|верен|правильн\w{1,3}|doğru"
_IS_RIGHT = re.compile(
    rf"(?-i:{_LETTER.replace('?P<round>', '?P<round3>').replace('?P<alone>', '?P<alone3>')})"
    rf"[*_)]{{0,3}}(?:[ \t](?:ist|est|es|é|è|jest|is|är)[ \t](?:la |le |die |a |o )?(?:{_RIGHT})\b"
    r"|(?:选项|選項|项|項)?(?:是)?(?:正确|正確))",
    re.I,
)
_BUT = re.compile(r"[ \t*_:]{0,6}not[ \t]{1,3}\(?[A-Z]\)?,?[ \t]{1,3}(?:but|rather|it['’]s|it is)(?=[ \t])", re.I)
_SECOND = _LETTER.replace("round", "round2").replace("alone", "alone2")
_IS_CORRECT = re.compile(
    rf"(?:\b(?:option|choice|answer|statement)[ \t]{{1,3}}{_LETTER}|{_SECOND})[*_)\"' \t]{{0,6}}"
    r"(?:is|seems|looks|appears|fits|matches|must be|would be)[ \t]{1,3}"
    r"(?:therefore |thus |clearly |definitely |indeed |also )?"
    r"(?:the )?(?:most )?(?:correct|right|best|true|answer|only|plausible|likely)\b(?! for (?:a|the) wrong)",
    re.I,
)
_ALONE = re.compile(r"[\s*_>$]{0,9}[(\[]{0,2}([A-Za-z])[)\]]{0,2}[\s*_$]{0,9}(?:[.):,]\s*.{0,300})?")


def chosen(text: str) -> tuple[str | None, str]:
    """(the option's letter, the rule that found it); (None, "none") or (None, "gave_up") without one."""
    statements: list[tuple[int, int]] = []
    for pattern in announcing(text):
        for match in pattern.finditer(text):
            if pattern is HASHES or "tail" not in match.re.groupindex:
                at = match.start("tail") if pattern is HASHES else match.end()
            else:
                at = match.start("tail")
            if pattern is FOREIGN and DENIES.search(match.group()):
                continue
            statements.append((at, match.start()))
    statements += [(match.end(), match.start()) for match in _STATEMENT.finditer(text)]
    statements += [(match.end(), match.start()) for match in _NAMED.finditer(text) if not DENIES.search(match.group())]
    best: tuple[int, str] | None = None
    for at, _ in sorted(statements, reverse=True)[:24]:
        found = letters_at(text, at)
        if found is not None:
            best = (at, found)
            break
    for match in list(_IS_CORRECT.finditer(text))[-6:]:
        letter = match["round"] or match["alone"] or match["round2"] or match["alone2"]
        if letter.isupper() and (best is None or match.start() > best[0]):
            best = (match.start(), letter)
    for match in list(_IS_RIGHT.finditer(text))[-6:]:
        if best is None or match.start() > best[0]:
            best = (match.start(), match["round3"] or match["alone3"])
    if best is not None:
        return best[1], "answer_line"
    return _unannounced(text)


_OPTION = re.compile(r"[*_$\s(\[（]{0,6}[A-Za-z](?![A-Za-z])")
_BRACKETS = re.compile(r"[)\]）*_$\s]{0,6}[（(]")


def _denied_behind(text: str, end: int) -> bool:
    """Whether the letter that ends there is crossed out, or denied in another language.

    What stands in brackets behind it is what the option reads, also where that is "wrong".
    """
    if CROSSED_OUT.match(text, end):
        return True
    return not _BRACKETS.match(text, end) and DENIED_BEHIND.match(text, end) is not None


def letters_at(text: str, at: int) -> str | None:
    """The letter that stands at a place, or the letters where there are several; None where there is none."""
    but = _BUT.match(text, at)
    ahead = text[but.end() if but else at :][:200]
    option = _OPTION.match(ahead)
    if _NOT.match(ahead) or (option and _denied_behind(ahead, option.end())):
        return None
    stripped = ahead.lstrip(" \t*_:\n") if not ahead.split("\n")[0].strip(" \t*_:") else ahead.split("\n")[0]
    match = _HEAD.match(stripped)
    if not match:
        return None
    letter = match["round"] or match["alone"]
    if match["alone"] and not letter.isupper() and not re.fullmatch(r"[a-z][.):*_ ]*", stripped):
        return None  # a bare "a" is an article
    if match["alone"] and letter in "AI" and _ARTICLE.match(stripped, match.end()):
        return None
    following = _NEXT.match(stripped, match.end())
    if following:
        return stripped[: following.end()].strip(" *_$")
    return letter.upper()


_MENTIONED = re.compile(
    r"(?P<not>\bnot\s+)?(?:\((?P<round>[A-Z])\)|\b(?:[Oo]ption|[Cc]hoice)\s+\**(?P<named>[A-Z])\b)"
    r"(?P<wrong>\s+is\s+(?:wrong|incorrect|false|not))?"
)


def _unannounced(text: str) -> tuple[str | None, str]:
    """An option's line, or the last option in brackets or by name."""
    lines = [line for line in text.strip()[-4000:].split("\n") if line.strip()]
    only_named = re.fullmatch(r"\s*(?:option|choice|answer)\s{1,3}\(?([A-Za-z])\)?[\s.*]*", text, re.I)
    if only_named:
        return only_named.group(1).upper(), "whole"
    options = [line for line in lines if _ALONE.fullmatch(line)]
    if len(lines) == 1 and (only := _ALONE.fullmatch(lines[0])):
        return only.group(1).upper(), "whole"
    for line in reversed(lines):
        alone = _ALONE.fullmatch(line)
        if alone and (alone.group(1).isupper() or line.strip(" *_$()") == alone.group(1)) and len(options) < 3:
            return alone.group(1).upper(), "option_line"
    if GIVES_UP.search(text[-600:]):
        return None, "gave_up"
    closing = re.search(r"[.!?]\s{1,3}([A-Z])[.\s]{0,4}\Z", text[-200:])
    if closing and not re.search(r"\b(?:not|except|neither)\b", text[-200:]):
        return closing.group(1), "last_option"
    # A bare "A" opens sentences and "I" is a word: without brackets only in the words "option B", "choice B".
    end = text[-4000:]
    for match in reversed(list(_MENTIONED.finditer(end))):
        which = "round" if match["round"] else "named"
        if not (match["not"] or match["wrong"] or _denied_behind(end, match.end(which))):
            return match[which], "last_option"
    return None, "none"
