"""All readings of an answer's text. A text that is nothing we know is ``Text``, equal to itself only."""

from __future__ import annotations

import re
from functools import lru_cache

from llmdistill.verify.answers.matrices import read_combination, read_matrix, read_rows, read_vector
from llmdistill.verify.answers.notation import WRAPPED, tidy, unwrap
from llmdistill.verify.answers.numerals import read_digits, read_time
from llmdistill.verify.answers.quantities import read_quantities
from llmdistill.verify.answers.realsets import read_set
from llmdistill.verify.answers.relations import read_builder, read_relation, read_union
from llmdistill.verify.answers.sequences import (
    Reader,
    alternatives,
    read_permutation,
    read_ratio,
    read_sequence,
    split_list,
)
from llmdistill.verify.answers.values import Quantity, Ratio, Readings, Text, Time, Value
from llmdistill.verify.answers.wording import read_option, read_words

LONGEST = 2_000
DEEPEST = 5
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}|\d{1,2}/\d{1,2}/\d{4}")
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore|i\.e\.),? )?(?:the )?(?:final |correct |required )?"
    r"(?:answer|result|solution|value)s? ?(?:is|are|equals|=|:)[: ]*"
    r"|\\?therefore ?|\\bullet ?|\\(?:approx|sim|simeq)(?![A-Za-z]) ?|(?:approximately|about|exactly|roughly) "
    r"|= ?|[xyn] ?: ?(?=-?\d+$)",
    re.I,
)
# "The number of ways is 77": what is counted or measured, in words that name no other answer.
_SENTENCE = re.compile(
    r"^(?:(?:so|thus|hence|therefore|then|we (?:get|have|find))\b,? ?)?(?:(?:the|a|an|our|my|its|their) )?"
    r"(?:(?:final|correct|required|desired|total|minimum|maximum|smallest|largest|greatest|least|exact|numerical|common)"
    r" ){0,3}"
    r"(?:(?:answer|ans|result|solution|value|total|sum|number|count|area|perimeter|circumference|volume|length|width|height"
    r"|distance|probability|difference|product|quotient|remainder|ratio|cost|price|amount|average|mean|median|minimum"
    r"|maximum|time|speed|age|radius|diameter|slope|angle)s?(?: of(?: [A-Za-z]{1,15}){1,4})?"
    r"(?: (?:is|are|equals|was)| ?[:=])"
    r"|there (?:are|is)(?: a total of| exactly)?|it (?:is|equals))[: ]*(?=[-+(\[{\\\d\uff04])",
    re.I,
)
_SO = re.compile(r"^(?:so|thus|hence|therefore|then)\b,? ?(?=[A-Za-z\\](?:_\w)? ?=)", re.I)
_QUANTIFIED = re.compile(
    r"^(?P<applied>[A-Za-z]\([a-z]\) ?=.{1,80}?),? ?\b(?:for|where) (?:all|any|every)(?: real)?(?: \w+)? ?[a-z]$"
)
_MAPPED = re.compile(r"^(?P<name>[A-Za-z]) ?: ?(?P<variable>[a-z]) ?\\mapsto(?![A-Za-z]) ?")
_SETS = {
    **dict.fromkeys(
        ("all real numbers", "all reals", "real numbers", "all real x", "set of all real numbers"), r"\mathbb{R}"
    ),
    **dict.fromkeys(("all integers", "set of all integers", "set of integers"), r"\mathbb{Z}"),
}
_ALSO_ABOUT = re.compile(
    r",? ?\(?(?:or |which is |that is )?(?<!\\)(?:approximately|approx\.?|about|roughly) (?P<value>-?\d[\d.,]*%?)\)?$",
    re.I,
)
_APPROXIMATE = re.compile(
    r"(?<=[\d}%]) ?\((?:approximately|approx\.?|about|rounded)[^()]*\)|(?<=[\d}%]) (?:approximately|approx\.?)$"
)


@lru_cache(1024)
def bare(text: str) -> str:
    """A tidy text without the words that announce an answer."""
    plain = re.sub(
        r"^\\(?:text|mathrm)\{ ?((?:the |so |thus )?(?:final )?(?:answer|result|solution) ?(?:is|:)) ?\}",
        r"\1 ",
        text,
        flags=re.I,
    )
    whole = WRAPPED.fullmatch(plain)
    if whole and _LEAD.match(whole.group(1).strip()):
        plain = whole.group(1).strip(" .")
    for _ in range(2):
        match = _LEAD.match(plain)
        if match and match.end() < len(plain) and match.end() > 0:
            plain = plain[match.end() :].strip()
    plain = re.sub(r"(?<=\d) ?\[[A-Za-z ]{1,20}\]$", "", _spelt_out(plain))  # 45 [units]
    plain = _ALSO_ABOUT.sub(lambda m: rf" \approx {m['value']}" if m.start() else m.group(), plain)
    return _APPROXIMATE.sub("", plain).strip() or text


def _spelt_out(text: str) -> str:
    """A text without the sentence around its answer, and with what words name in signs."""
    if not re.search(r"[A-Za-z]{3}|\\mapsto", text):
        return text
    words = unwrap(text)
    if words.lower().removeprefix("the ") in _SETS:
        return _SETS[words.lower().removeprefix("the ")]
    so = _SO.match(words)
    if so:
        return words[so.end() :]
    lead = _SENTENCE.match(words)
    # Only one value may follow: "Alice: 5, Bob: 3" is a list.
    if lead and not split_list(words[lead.end() :])[1:] and not re.search(r"[:=<>]", words[lead.end() :]):
        kept = len(words) - lead.end()
        return words[-kept:].removesuffix(" is the answer").strip()
    words = re.sub(r" (?:is|are) (?:the|our|my) (?:final |correct )?(?:answer|result|solution)$", "", words)
    if words != unwrap(text) and not split_list(words)[1:]:
        return words
    quantified = _QUANTIFIED.match(words)
    text = quantified["applied"].strip() if quantified else text
    return _MAPPED.sub(lambda m: f"{m['name']}({m['variable']}) = ", text)


@lru_cache(2048)
def read(text: str) -> Readings:
    """The readings of a text as it was written."""
    return readings(bare(tidy(text)))


def readings(text: str, depth: int = 0) -> Readings:
    """The readings of a tidy text; never empty."""
    if not text or len(text) > LONGEST or depth > DEEPEST or _DATE.fullmatch(text):
        return (Text(text),)

    def inner(part: str) -> Readings:
        return readings(part.strip(), depth + 1)

    whole = WRAPPED.fullmatch(text)
    if whole and (len(parts := split_list(whole.group(1))) > 1) and not alternatives(whole.group(1), parts):
        several = read_sequence(", ".join(rf"\text{{{part}}}" for part in parts), inner)
        words = read_words(text)
        one = [value for value in read_quantities(whole.group(1)) if isinstance(value, Quantity)]  # "one and a half"
        return (*one, *several, *([words] if words else [])) or (Text(text),)
    found: list[Value] = []
    simple = not split_list(text)[1:]
    for single in (read_time(text), read_digits(text), read_permutation(text), read_option(text)):
        if single is not None:
            found.append(single)
    quantities = read_quantities(text)
    found += quantities
    if r"\hat" in text and quantities:
        found += read_vector(text)
    if (
        simple
        and (":" in text or "to" in text)
        and not any(isinstance(value, Time) and value.marked for value in found)
    ):
        ratio = read_ratio(text)
        found += [ratio] if ratio else []
    if not any(isinstance(q, Quantity) for q in quantities) or re.search(r",|\\pm", text):
        found += _structured(text, simple, inner)
    if not quantities or re.fullmatch(r"[A-Za-z]{1,3}", text):
        words = read_words(text)
        found += [words] if words else []
    return tuple(dict.fromkeys(found)) or (Text(text),)


def _structured(text: str, simple: bool, inner: Reader) -> list[Value]:
    found: list[Value] = []
    real = read_set(text)
    if real is not None:
        found.append(real)
    if r"\begin" in text:
        found += read_matrix(text, inner) or read_combination(text, inner)
    if text.startswith("[[") or text.endswith(("T", "T}")):
        found += read_rows(text, inner)
    if "|" in text or ":" in text or r"\in" in text or "integer" in text:
        found += read_builder(text, inner)
    if simple:
        found += read_relation(text, inner)
    elif re.search(r"[<>]|\\[lgn]e(?![A-Za-z])", text):
        union = read_union(text, inner)
        if union:
            return found + union  # "x < 1 or x > 2" is one answer, no list
    if found and isinstance(found[0], Ratio):
        return found
    return found + read_sequence(text, inner)


def option_letter(text: str) -> str | None:
    """The option a choice's answer or gold names, in either case."""
    found = read_option(tidy(text).upper() if len(unwrap(tidy(text))) < 5 else tidy(text))
    return found.letter if found else None
