"""One spelling for what is written in many: Unicode signs, Markdown, HTML, math delimiters, spacing commands.

Nothing here changes what a text says: letters keep their case, units and words stay. All of it is linear in the text.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from llmdistill.verify.answers.vocabulary import words

MONEY = "\uff04"  # what stands for a dollar sign that is money, after `tidy`; a plain $ is a delimiter and is gone

_UNICODE = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ",
    "•": r"\cdot ", "÷": r"\div ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ",
    "≈": r"\approx ", "≅": r"\cong ", "≡": r"\equiv ", "∞": r"\infty ", "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ",
    "∩": r"\cap ", "∈": r"\in ", "∉": r"\notin ", "°": r"^\circ ", "º": r"^\circ ", "˚": r"^\circ ",
    "∅": r"\emptyset ", "⁄": "/", "∕": "/", "’": "'", "‘": "'", "′": "'", "″": "''", "“": '"', "”": '"',
    "…": r"\dots ", "⋯": r"\dots ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}", "√": r"\sqrt ", "％": "%", "，": ",", "、": ",", "。": ".", "；": ";", "（": "(", "）": ")",
    "：": ":", "\u200b": "", "\u2060": "", "\ufeff": "", "\x00": "", "∠": r"\angle ", "△": r"\triangle ",
    "ℏ": r"\hbar ",
    "∑": r"\sum ", "∏": r"\prod ", "→": r"\to ", "∖": r"\setminus ", "⟨": r"\langle ", "⟩": r"\rangle ", "∧": r"\land ",
    "∨": r"\lor ", "¬": r"\lnot ", "∣": "|", "μ": r"\mu ", "µ": r"\mu ", "⊥": r"\perp ", "∂": r"\partial ",
}  # fmt: skip
_GREEK = """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda _mu nu xi _omicron pi rho _final sigma tau
upsilon phi chi psi omega"""
_UNICODE |= {chr(0x3B1 + i): f"\\{w} " for i, w in enumerate(_GREEK.split()) if not w.startswith("_")}
_UNICODE |= {
    c: f"\\{n} " for c, n in zip("ΓΔΘΛΞΠΣΦΨΩ", words("Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"), strict=True)
}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_VULGAR = {c: f"\\frac{{{n}}}{{{d}}}" for c, n, d in (
    ("½", 1, 2), ("⅓", 1, 3), ("⅔", 2, 3), ("¼", 1, 4), ("¾", 3, 4), ("⅕", 1, 5), ("⅖", 2, 5), ("⅗", 3, 5), ("⅘", 4, 5),
    ("⅙", 1, 6), ("⅚", 5, 6), ("⅐", 1, 7), ("⅛", 1, 8), ("⅜", 3, 8), ("⅝", 5, 8), ("⅞", 7, 8), ("⅑", 1, 9),
    ("⅒", 1, 10),
)}  # fmt: skip
_TABLE = {ord(k): v for k, v in (_UNICODE | _VULGAR).items()}

TEXT = r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mbox|hbox|operatorname|rm|bf|it)\s*"
WRAPPED = re.compile(TEXT + r"\{([^{}]*)\}")
_DOUBLED = re.compile(
    r"\\\\(?=(?:frac|dfrac|tfrac|left|right|sqrt|text|mathrm|begin|end|pi|le|ge|circ|times|cdot|boxed|pm|infty|cup|in)\b)"
)
_HTML = re.compile(r"</?(?:b|i|u|em|strong|code|span|p|br|div|answer|sub|sup|mark)\b[^<>]{0,40}>", re.I)
_SIZES = re.compile(
    r"\\(?:displaystyle|textstyle|limits|nolimits|(?:[bB]igg?)[lrm]?|left|right|middle|mathopen|mathclose|mathord"
    r"|mathstrut|nonumber|hfill)(?![A-Za-z])\.?"
)
_SPACES = re.compile(
    r"(?<!\\)\\[,;:> ]|\\q?quad(?![A-Za-z])|~|\\(?:thinspace|enspace|space|hspace\*?\s*\{[^{}]*\})(?![A-Za-z])"
)
_SYNONYMS = [
    (re.compile(pattern + r"(?![A-Za-z])"), to)
    for pattern, to in (
        (r"\\[dtc]frac", r"\\frac"), (r"\\[dt]binom", r"\\binom"), (r"\\(?:geq|geqslant|geqq)", r"\\ge"),
        (r"\\(?:leq|leqslant|leqq)", r"\\le"), (r"\\lt", "<"), (r"\\gt", ">"), (r"\\neq", r"\\ne"),
        (r"\\(?:varnothing|emptyset)", r"\\emptyset "), (r"\\(?:ldots|cdots|dotsc|dotsb|dotsm|dots|cdotp)", r"\\dots "),
        (r"\\(?:lvert|rvert|vert|mid)", "|"), (r"\\(?:lbrace)", r"\\{"), (r"\\(?:rbrace)", r"\\}"), (r"\\colon", ":"),
        (r"\\ast", "*"), (r"\\rightarrow", r"\\to "), (r"\\(?:dag|star)", "*"), (r"\\varepsilon", r"\\epsilon"),
        (r"\\varphi", r"\\phi"), (r"\\vartheta", r"\\theta"), (r"\\varrho", r"\\rho"), (r"\\lparen", "("),
        (r"\\rparen", ")"), (r"\\lbrack", "["), (r"\\rbrack", "]"), (r"\\degree", r"^\\circ "),
        (r"\\overrightarrow", r"\\vec"), (r"\\(?:boldsymbol|bm|pmb|mathcal|mathscr|mathfrak)", r"\\mathbf"),
        (r"\\(?:tg)", r"\\tan"), (r"\\(?:ctg)", r"\\cot"), (r"\\(?:arctg)", r"\\arctan"), (r"\\widehat", r"\\hat"),
        (r"\\(?:backslash|smallsetminus)", r"\\setminus"), (r"\\widetilde", r"\\tilde"), (r"\\(?:euro)", "€"),
        (r"\\(?:pounds)", "£"), (r"\\(?:dollar)", MONEY), (r"\\(?:prime)", "'"), (r"\\(?:wedge)", r"\\land "),
        (r"\\(?:[lr]?Vert)", r"\\|"), (r"\\(?:neg)", r"\\lnot "), (r"\\(?:top|intercal)", "T"),
    )
]  # fmt: skip


_FUNCTION_NAMES = re.compile(
    r"\\(?:operatorname\*?|mathrm|text) ?\{ ?(max|min|gcd|lcm|(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|lg|exp) ?\}"
)
# {}_{10}C_3, ^{10}C_3, _nC_k: what is chosen from, in front of the letter.
_COUNTED = re.compile(
    r"(?:\{ ?\} ?|(?<![^\s(+*/={,-]))[_^] ?(?P<n>\{[^{}]{1,20}\}|\w)"
    r" ?(?:\\(?:mathrm|text) ?\{ ?(?P<set>[CP]) ?\}|(?P<bare>[CP])) ?_ ?(?P<k>\{[^{}]{1,20}\}|\w)"
)


def _as_counted(match: re.Match[str]) -> str:
    return f"{match['set'] or match['bare']}_{match['n']}^{match['k']}"


@lru_cache(1024)
def tidy(text: str) -> str:
    """One spelling of a text. Money's dollar signs are ``MONEY`` afterwards, and no other are left."""
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub(r"[₀-₉]+", lambda m: "_{" + m.group().translate(_SUBSCRIPTS) + "}", text)
    text = re.sub(r"√\s*\(([^()]*)\)|√\s*(\d+|[A-Za-z])", lambda m: r"\sqrt{" + (m.group(1) or m.group(2)) + "}", text)
    text = re.sub(r"(?<=\d)(?=[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])", " ", text)
    text = unicodedata.normalize("NFKC", text.translate(_TABLE))
    text = re.sub("[∎□■\u2600-\u27bf\U0001f000-\U0001faff\ufe0f]", " ", text)
    if _DOUBLED.search(text):  # a LaTeX string that was escaped once too often
        single = re.search(r"(?<!\\)\\[A-Za-z]", text)
        text = (
            _DOUBLED.sub(r"\\", text)
            if single and r"\begin" not in text
            else text
            if single
            else text.replace("\\\\", "\\")
        )
    text = _COUNTED.sub(_as_counted, _HTML.sub("", text))
    text = _bold(text)
    text = re.sub(r"(?<!\\)\\[\[\]()]", " ", text)
    text = re.sub(r"(?<![\d.])\.{3}(?!\.)", r"\\dots ", text)
    text = re.sub(r"\\+(?:boxed|fbox|framebox)\s*\{", "{", text)
    text = re.sub(r"\\(?:text|mathrm)\{ ?([:;,./%-]) ?\}", r"\1", text)
    text = re.sub(r"\\phantom\s*(?:\{[^{}]*\}|\S)|\\label\{[^{}]*\}", "", text)
    text = _numbers_in_bold(text)
    text = _money(text)
    text = re.sub(r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}", text)
    text = text.replace(r"\%", "%").replace(r"\#", "#").replace(r"\&", "&").replace(r"\_", "_")
    text = re.sub(
        r"(?<=\d) ?\{ ?, ?\}(?=\d{3}(?!\d))|(?<=\d),\s?\\!\s?(?=\d)|(?<=\d)(?:\\[!,;: ]|~)(?=\d{3}(?!\d))", "", text
    )
    text = re.sub(r"\{ ?, ?\}", ".", text).replace(r"\!", "")
    for pattern, to in _SYNONYMS:
        if "\\" not in text:
            break
        text = pattern.sub(to, text)
    text = _FUNCTION_NAMES.sub(lambda m: f"\\{m.group(1)} ", text)
    text = re.sub(r"\^ ?(?:\{ ?('{1,2}) ?\}|('{1,2}))", lambda m: m.group(1) or m.group(2), text)
    text = re.sub(r"\\(text|mathrm|mbox|textrm)\{([^{}]*[A-Za-z]) ?, ?\}", r"\\\1{\2},", text)
    text = re.sub(r"\\(text|mathrm|mbox|textrm)\{([^{}]*[A-Za-z]),? (and|or) ?\}(?= ?-?[\d\\])", r"\\\1{\2} \3 ", text)
    text = _SIZES.sub("", text)
    text = _SPACES.sub(" ", text)
    text = re.sub(r"\\(max|min|gcd|lcm) ?\\\{([^{}]*)\\\}", r"\\\1(\2)", text)
    text = re.sub(r"\\langle([^<>\\]*(?:\\(?!langle|rangle)[^<>\\]*)*)\\rangle", _angles, text)
    text = _python(text)
    text = re.sub(r"\s+", " ", text).strip()
    return _unbrace(_unquoted(_without_end(text)))


def _bold(text: str) -> str:
    text = text.replace("`", "").strip()
    text = re.sub(r"(?<=[\w)}])\*\*(?=-\d)", "^", text)
    text = re.sub(r"(?<![\w)}])\*\*(?=\S)|(?<=\S)\*\*(?![\w({\\])", "", text)
    text = re.sub(r"(?<=[\w)}])\s?\*\*\s?(?=[\w({\\-])", "^", text)  # Python's power
    return text.strip().strip("*_").strip()


def _angles(match: re.Match[str]) -> str:
    """A vector's angle brackets are round ones; those of a mean value stay what they are."""
    return f"({match.group(1)})" if "," in match.group(1) else match.group()


def _python(text: str) -> str:
    text = re.sub(r"\b(?:np|numpy|math|sp|sympy)\.log(?=\s?\()", r"\\ln", text)
    text = re.sub(r"\b(?:np|numpy|math|sp|sympy)\.(?=[a-z])", "", text)
    text = re.sub(r"(?<![A-Za-z\\])log(?:10|2)(?=\s?\()", lambda m: r"\lg" if "10" in m.group() else r"\log_2", text)
    text = re.sub(r"(?<![A-Za-z\\])pow(?:er)?\(([^(),]{1,60}),([^(),]{1,60})\)", r"(\1)^{(\2)}", text)
    array = re.fullmatch(r"\s*(?:array|Matrix)\((\[.*\])\)\s*", text)
    text = re.sub(r"^\[(?!\[)(.*)\]$", r"(\1)", array.group(1)) if array else text
    text = re.sub(r"(?<![A-Za-z\\])d ?([A-Za-z]) ?/ ?d ?([a-z])(?![A-Za-z])", r"\\frac{d \1}{d \2}", text)
    return re.sub(r"(?<=\d) ?[x×] ?(?=10 ?\^)|(?<=\d) [xX] (?=\d)", r" \\times ", text)


def _numbers_in_bold(text: str) -> str:
    def plain(match: re.Match[str]) -> str:
        held = match.group(1)
        if held.strip() in ("i", "j", "k"):
            return rf"\hat{{{held.strip()}}}"  # a unit vector
        # Typesetters space digits out: \mathbf{1 0 2 , 0 1 8}.
        spaced = re.fullmatch(r"\d(?: ?[\d,.])+", held.strip()) and not re.search(r"\d\d", held)
        if not spaced:
            return f" {held} "
        digits = held.replace(" ", "")
        return digits.replace(",", "") if re.fullmatch(r"\d{1,3}(?:,\d{3})+", digits) else digits

    return re.sub(r"\\(?:mathbf|textbf|boldsymbol|bm)\s*\{([^{}]*)\}", plain, text)


def _money(text: str) -> str:
    """Dollar signs told apart: money's stay, as ``MONEY``; delimiters go."""
    text = text.replace(r"\$", MONEY)
    if "$" not in text:
        return text
    pieces = text.split("$")
    if len(pieces) % 2 == 0 or any(_is_prose(inner) for inner in pieces[1::2]):
        # Not in pairs: what stands before or behind a number is money.
        text = re.sub(r"\$(?= ?-?[\d.])|(?<=\d)\$", MONEY, text)
    return text.replace("$", " ")


def _is_prose(formula: str) -> bool:
    return bool(re.match(r"\d", formula) and re.search(r"(?<![\\{A-Za-z])[A-Za-z]{3,}", formula))


def _without_end(text: str) -> str:
    while (
        len(text) > 1 and text[-1] in ".,;:" and not text.endswith("..") and not re.search(r"\b[ap]\.m\.$", text, re.I)
    ):
        text = text[:-1].rstrip()
    return text


def _unquoted(text: str) -> str:
    if len(text) > 2 and text[0] in "\"'" and text[-1] == text[0] and text[0] not in text[1:-1]:
        return text[1:-1].strip()
    return text


def _unbrace(text: str) -> str:
    """Without the braces around all of it."""
    while len(text) > 2 and text[0] == "{" and text[-1] == "}" and _closes(text) and "," not in text:
        text = text[1:-1].strip()
    return text


def _closes(text: str) -> bool:
    """Whether the bracket that opens a text is closed by its last character."""
    depth = 0
    for at, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if depth == 0:
            return at == len(text) - 1
    return False


def unwrap(text: str) -> str:
    r"""A tidy text with \text{...} and its kin replaced by what they hold."""
    for _ in range(2):
        text = WRAPPED.sub(r" \1 ", text)
    return re.sub(r"\s+", " ", text).strip()


@lru_cache(1024)
def compact(text: str) -> str:
    r"""A tidy text for comparing as strings: \text and blanks do not count, the case of letters does."""
    text = unwrap(text).replace(r"\bullet", "").strip()
    text = re.sub(r"([_^])\{ ?([A-Za-z0-9]) ?\}", r"\1\2", text)
    text = re.sub(r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"(?<![A-Za-z\\])(\d[\d.]*)/(\d+)(?!\d)", r"\\frac{\1}{\2}", text) if "\\" in text else text
    # A blank that ends a command or stands between two words or numbers is part of the text.
    return re.sub(r"(\\[A-Za-z]+ (?=[A-Za-z])|(?<=[A-Za-z0-9]) (?=[A-Za-z0-9]))|\s", lambda m: m.group(1) or "", text)


def split_top(text: str, separators: str = r"[,;]") -> list[str]:
    r"""The parts of a text between separators that stand in no brackets; \{ and \} are brackets too."""
    parts, depth, start, at = [], 0, 0, 0
    pattern = re.compile(rf"(?P<sep>{separators})|\\begin\{{[a-z*]+\}}|\\end\{{[a-z*]+\}}|\\[{{}}]|[{{}}()\[\]]")
    for match in pattern.finditer(text):
        word = match.group()
        if match["sep"] is not None:
            if depth == 0 and match.end() > match.start():
                parts.append(text[start : match.start()])
                start = match.end()
        elif word.startswith("\\begin") or word in ("\\{", "{", "(", "["):
            depth += 1
        else:
            depth -= 1
        at = match.end()
    parts.append(text[start:])
    return [part.strip() for part in parts] if depth == 0 and at >= 0 else [text]
