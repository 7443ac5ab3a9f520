"""Problems and samples as the page carries them: one compressed block per problem, all of them of a bounded size.

Long texts keep their head and tail. Where that is not enough the page carries fewer samples of each problem. What was
left out is counted, and the page says so.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmdistill.evals.records import Grade, Problem, Prompt, Sample

PAGE_BYTES = 24_000_000  # of all blocks, as base64
LONGEST_TEXT = 60_000  # characters of one sample, however small the run
SHORTEST_TEXT = 400  # below this fewer samples are of more use than shorter ones
QUESTION, PROMPT, GOLD, TESTS, EXTRACTED, DETAIL, NAME = 8_000, 12_000, 4_000, 4_000, 2_000, 600, 200
START = 240  # characters of a question in the list
ASSUMED_RATIO = 2.5  # text to base64 of its gzip; prose and formulas give 2.5 to 3.5, what is worse is packed again

Clipped = str | list[str | int]  # whole, or [head, number of characters left out, tail]


@dataclass(frozen=True)
class Packed:
    """Base64 of gzipped JSON, and what it took.

    Attributes:
        index: one small object per problem, for the list.
        blocks: one per problem, in the same order.
        longest: characters of a sample that were kept, head and tail together.
        clipped: how many samples are longer than that.
        absent: how many samples are not on the page at all.
    """

    index: str
    blocks: list[str]
    longest: int
    clipped: int
    absent: int


def pack(
    problems: Sequence[Problem],
    samples_of: Callable[[str], Sequence[Sample]],
    grades_of: Callable[[str], Sequence[Grade]],
    n: int,
    limit: int = PAGE_BYTES,
    prompts_of: Callable[[str], Sequence[Prompt]] = lambda problem: (),
) -> Packed:
    """Packs everything into at most ``limit`` bytes (problems of a suite alone are never left out).

    Args:
        samples_of, grades_of, prompts_of: those of a problem, by its id; asked again rather than kept.
        n: samples asked for per problem; those that are not there are shown as missing.
    """
    index, lengths, most = [], list[int](), 0
    for problem in problems:
        mine = _by_index(samples_of(problem.id))
        index.append(_row(problem, mine, _verdicts(grades_of(problem.id)), n))
        lengths += [len(s.text) for s in mine]
        most = max(most, len(mine))
    packed_index = _packed(index)
    longest = min(max(_fair_share(lengths, int(limit * ASSUMED_RATIO)), SHORTEST_TEXT), LONGEST_TEXT)
    while True:
        blocks, clipped, shown = [], 0, 0
        for problem in problems:
            mine = _by_index(samples_of(problem.id))
            kept = mine[:most]
            block = _block(problem, kept, len(mine), _verdicts(grades_of(problem.id)), longest)
            blocks.append(_packed({**block, "prompt": _prompt(prompts_of(problem.id))}))
            clipped, shown = clipped + sum(len(s.text) > longest for s in kept), shown + len(kept)
        if len(packed_index) + sum(map(len, blocks)) <= limit or most == 0:
            return Packed(packed_index, blocks, longest, clipped, len(lengths) - shown)
        if longest > SHORTEST_TEXT:
            longest = max(longest * 2 // 3, SHORTEST_TEXT)
        else:
            most //= 2


def _by_index(samples: Sequence[Sample]) -> list[Sample]:
    return sorted(samples, key=lambda s: s.index)


def _verdicts(grades: Sequence[Grade]) -> dict[int, Grade]:
    return {grade.index: grade for grade in grades}


def clip(text: str, limit: int) -> Clipped:
    """The text, or two thirds of ``limit`` from its head and one third from its tail, ending at lines if near."""
    text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates are no JSON
    if len(text) <= limit:
        return text
    head, tail = limit * 2 // 3, len(text) - limit // 3
    reach = limit // 8
    head = at + 1 if (at := text.rfind("\n", head - reach, head)) >= 0 else head
    tail = at + 1 if (at := text.find("\n", tail, tail + reach)) >= 0 else tail
    return [text[:head], tail - head, text[tail:]]


def verdict(sample: Sample, grade: Grade | None) -> str:
    """One letter per sample, as the page's script knows them."""
    if grade is None:
        return "u"
    cut = sample.finish == "length"
    if grade.passed:
        return "R" if cut else "r"
    unanswered = grade.kind in ("no_answer", "no_program")
    if cut:
        return "T" if unanswered else "t"
    return "n" if unanswered else "w" if grade.kind == "wrong" else "e"


def _fair_share(lengths: Sequence[int], total: int) -> int:
    """The longest text that may stay so that all together are at most ``total``: short ones leave room to long ones."""
    left = total
    for i, length in enumerate(sorted(lengths)):
        share = left // (len(lengths) - i)
        if length > share:
            return share
        left -= length
    return max(lengths, default=0)


def _row(problem: Problem, samples: Sequence[Sample], grades: Mapping[int, Grade], n: int) -> dict[str, Any]:
    letters = {s.index: verdict(s, grades.get(s.index)) for s in samples}
    places = sorted(set(range(n)) | set(letters))
    return {
        "id": _short(problem.id, NAME),
        "start": _short(problem.question, START),
        "gold": None if problem.gold is None or problem.kind == "code" else _short(problem.gold, NAME),
        "groups": {_short(str(k), NAME): _short(str(v), NAME) for k, v in problem.groups.items()},
        "verdicts": "".join(letters.get(i, "-") for i in places),
        "tokens": round(sum(s.tokens for s in samples) / len(samples), 1) if samples else 0,
    }


def _block(
    problem: Problem, samples: Sequence[Sample], there: int, grades: Mapping[int, Grade], longest: int
) -> dict[str, Any]:
    return {
        "kind": problem.kind,
        "question": clip(problem.question, QUESTION),
        "gold": None if problem.gold is None else clip(problem.gold, GOLD),
        "tests": None if problem.tests is None else clip(json.dumps(problem.tests, indent=1), TESTS),
        "samples": [_sample(s, grades.get(s.index), longest) for s in samples],
        "absent": there - len(samples),
    }


def _prompt(prompts: Sequence[Prompt]) -> dict[str, Any] | None:
    """What the model read; of an endpoint with a template of its own, the messages that it was sent."""
    if not prompts:
        return None
    (prompt,) = prompts
    text = prompt.text or "\n\n".join(f"{m['role']}:\n{m['content']}" for m in prompt.messages)
    return {"text": clip(text, PROMPT), "tokens": prompt.tokens, "messages": not prompt.text}


def _sample(sample: Sample, grade: Grade | None, longest: int) -> dict[str, Any]:
    extracted = grade.extracted if grade else None
    return {
        "index": sample.index,
        "text": clip(sample.text, longest),
        "tokens": sample.tokens,
        "finish": sample.finish,
        "seed": str(sample.seed),  # of 63 bits: JavaScript has 53
        "verdict": verdict(sample, grade),
        "kind": _short(grade.kind, 40) if grade else "not graded",
        "extracted": None if extracted is None else _short(extracted, EXTRACTED),
        "stage": _short(grade.stage, 40) if grade else "",
        "detail": _short(grade.detail, DETAIL) if grade else "",
    }


def _short(text: str, limit: int) -> str:
    kept = text if len(text) <= limit else text[: limit - 1] + "…"
    return kept.encode("utf-8", "replace").decode("utf-8")


def _packed(value: Any) -> str:
    # No time in the header: the same run gives the same page.
    return base64.b64encode(gzip.compress(json.dumps(value, ensure_ascii=False).encode(), 6, mtime=0)).decode()
