r"""The phrases that announce an answer, in the languages that models write.

Every pattern is bounded where it repeats, so that no text takes more than linear time.
"""

from __future__ import annotations

import re

HOPE = re.compile(r"\.?\s*I hope (?:it|this) is correct.*", re.I | re.S)
FINAL = re.compile(r"\bfinal answer is\b[ \t]{0,9}:?(?=(?P<tail>[^\n]{0,2000}))", re.I)
HASHES = re.compile(r"^[ \t]{0,20}####(?P<tail>[^\n]{1,2000})", re.M)
LETTER_A = re.compile(r"^[ \t]{0,20}A[ \t]{0,20}:(?P<tail>[^\n]{1,2000})", re.M)
ANSWER = re.compile(
    r"\b(?:answers?|solution set)\b[\"'*_ \t]{0,9}(?:\([^()\n]{0,40}\)[*_ \t]{0,9})?(?:(?:to|for|of)\b[^\n:.]{0,80}?)?"
    r"(?:\b(?:is|are|equals|must be|should be|would be|will be|comes out to|comes to)\b[ \t]{0,9}:?"
    r"|[*_ \t]{0,9}[:：=]|[ \t]{0,3}[-–—]{1,2}[ \t])[*_ \t]{0,9}(?=(?P<tail>[^\n]{0,2000}))",
    re.I,
)
HEADING = re.compile(r"^[#*_ \t]{0,20}(?:final[ \t]{1,9})?answer[ \t]{0,9}[*_:]{0,9}[ \t]{0,9}$", re.I | re.M)
TAG = re.compile(r"<answer>(?P<tail>[^<]{0,2000}(?:<(?!/?answer>)[^<]{0,500}){0,20})</answer>", re.I)
_NOUNS = (
    r"antwort|ergebnis|lösung|résultat|resultado|risultato|результат|απάντηση|คำตอบ|vastaus|结果|結果|結論|"
    r"respuesta|solución|resposta|risposta|réponse|reponse|ответ|відповідь|odpowiedź|odpowiedz|odpověď"
    r"|svaret|svar|antwoord|cevap|yanıt|đáp án|jawaban|答案|答え|解答|答|正解|정답|답|الإجابة|الجواب|उत्तर"
)
_NOUN_LIST = tuple(_NOUNS.split("|"))
_VERBS = (
    r"[:：=]|\b(?:ist|lautet|beträgt|es|est|é|è|jest|to|равен|это|is|är|er|là|adalah)\b"
    r"|n['’]est\b|\b(?:είναι|on|ei ole|bukan(?:lah)?|هو|هي|será|sarà|sera)\b|คือ"
    r"|(?<=[\u3040-\u9fff\uac00-\ud7a3])(?:是|为|為|は|が|은|는|选|選)"
    # Languages that need no verb, or have it at the end: "Ответ 199", "Cevap 199'dur", "उत्तर 199 है".
    r"|(?:(?<=उत्तर[ \t])|(?<=cevap[ \t])|(?<=ответ[ \t]))(?=(?:не[ \t])?[$\\(]{0,3}[-−]?\d)"
)
# An answer in another language: the noun, at most three words, and the verb.
FOREIGN = re.compile(
    rf"(?:{_NOUNS})(?:[*_ \t]{{0,3}}(?:\w{{1,15}}[ \t]{{1,3}}){{0,3}}?)[*_ \t]{{0,4}}(?:{_VERBS})"
    r"(?:选|選)?[*_ \t:：]{0,9}(?=(?P<tail>[^\n。]{0,400}))",
    re.I,
)
DENIES = re.compile(
    r"\b(?:no|non|não|nicht|kein\w{0,2}|не|nie|inte|ikke|ikkje|niet|tidak|bukan(?:lah)?|không|chưa|değil|ei|δεν|ليس\w?)\b"
    r"|\bn['’]|\bpas\b|नहीं|不|ない|아니|ไม่",
    re.I,
)
# What calls an answer wrong, in other languages than English; in Chinese behind what may stand before it.
_WRONG_CHINESE = r"[这那]?是?(?:不对|不對|不正确|不正確|错误?|錯誤?)"
_WRONG = (
    r"falsch|nicht (?:richtig|korrekt)|incorrect[oa]?|fau(?:x|sse)|sbagliat[oa]|errad[oa]|неверно|неправильно"
    r"|błędn\w|fel|forkert|feil|väärin|onjuist|fout|yanlış|salah"
)
# Languages that deny behind the number, and what calls it wrong: "199ではない", "199 değil", "199 ist falsch".
DENIED_BEHIND = re.compile(
    r"[*_$\s)\\\]]{0,6}(?:[^\W\d]{0,4}?(?:では|じゃ)(?:な|あり|ござ)(?![^。\n]{0,8}か)"
    r"|[^\W\d]{0,3}?\s?아(?:니|닙|님|닌)|[^\W\d]{0,12}\s?\bdeğil|नहीं"
    rf"|[^\W\d]{{0,2}}[（(，,]?\s?{_WRONG_CHINESE}|(?:は|이라는 답은)?(?:間違|誤り|틀)"
    rf"|(?:(?:ist|es|est|è|é|is|är|er|on|jest|to|là)\s)?(?:{_WRONG}|sai)\b)",
    re.I,
)
# A cross behind an answer, and brackets that call a number wrong. Behind an option brackets say what it reads.
CROSSED_OUT = re.compile(r"[*_$\s)\\\]]{0,6}[❌✗✘✖]")
CALLED_WRONG = re.compile(
    r"[*_$\s)\\\]]{0,6}[（(]\s?(?:(?:that|this|it)(?: is|['’]s) |which is )?(?:wrong|incorrecte?"
    rf"|not (?:correct|right)|{_WRONG_CHINESE}|間違い|誤り|틀림|오답|{_WRONG})\s?[.!。！]?\s?[)）]",
    re.I,
)
# What is said in its place.
INSTEAD = re.compile(
    r"\b(?:sondern|sino|mais|bensì|mas|а|lecz|ale|maar|men|utan|vaan|aksine|melainkan|mà là)\b"
    r"|而是|(?<=な)く|(?<=아니)라|(?<=değil),",
    re.I,
)
ANNOUNCED = (HASHES, LETTER_A, ANSWER, HEADING)


def announcing(text: str) -> tuple[re.Pattern[str], ...]:
    """The patterns of what announces an answer in a text: other languages' only where one of their nouns stands."""
    lower = text.lower()
    return (*ANNOUNCED, FOREIGN, TAG) if any(noun in lower for noun in _NOUN_LIST) else (*ANNOUNCED, TAG)


CONCLUDES = re.compile(
    r"^[\s*_#>-]*(?:therefore|thus|hence|so|consequently|in conclusion|finally|in total|altogether|overall"
    r"|por lo tanto|por tanto|donc|ainsi|somit|daher|следовательно|значит|所以|因此|故|따라서|よって)(?!\w)",
    re.I,
)
CORRECTS = re.compile(
    r"\b(?:oh|ah|ugh|meant?|typo|should|wait|no|nope|not|actually|oops|sorry|correct(?:ion|ed|ing)?|rather|instead|hmm|but|mistake|wrong|incorrect|recheck"
    r"|reconsider|however|scratch)\b|n['’]t\b",
    re.I,
)
GIVES_UP = re.compile(
    r"(?:can(?:no|')t|can not|could not|couldn't|unable to|impossible to|difficult to|not possible to)"
    r"\s+(?:be\s+)?(?:accurately\s+|exactly\s+|directly\s+|uniquely\s+|definitively\s+)?"
    r"(?:determine|find|solve|calculate|compute|answer|know|give|provide|say)"
    r"|not enough information|insufficient (?:information|data)|i (?:don't|do not) know|i am not sure|i'm not sure"
    r"|work through the|walk through the|\b(?:me|you) to (?:continue|proceed|complete|finish|solve)",
    re.I,
)
