"""Rules of curation that compare rows: (number of a row to leave out, why), given all rows that are still there.

``rows`` may be gone through as often as a rule likes; each time the file is read anew, so that no rule holds more of a
row than it must. Rules of one row are in ``llmdistill.datagen.rules``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any, Literal

from llmdistill.datagen import mixture as mixtures
from llmdistill.datagen import selection
from llmdistill.datagen.near_duplicates import near_duplicates as near
from llmdistill.datagen.schema import as_messages, prompt_of
from llmdistill.datagen.sentences import Scale, select
from llmdistill.objectives.ddk import first_weights
from llmdistill.recipe.config import DType

Row = Mapping[str, Any]
Numbered = Callable[[], Iterator[tuple[int, Row]]]
Dropped = Iterable[tuple[int, str]]
Of = Literal["completion", "prompt"]


def pass_rate(rows: Numbered, *, least: float = 0.0, most: float = 1.0) -> Dropped:
    """Prompts that are solved in a share of their graded traces from ``least`` to ``most``."""
    graded, passed = Counter[str](), Counter[str]()
    for _, row in rows():
        if row.get("passed") is not None:
            graded[prompt_of(row)] += 1
            passed[prompt_of(row)] += bool(row["passed"])
    for number, row in rows():
        name = prompt_of(row)
        if not graded[name]:
            yield number, "prompt without verdicts"
        elif not selection.in_band(passed[name], graded[name], least=least, most=most):
            yield number, "solved too seldom" if passed[name] / graded[name] < least else "solved too often"


def exact_duplicates(rows: Numbered, *, of: Of = "completion") -> Dropped:
    """Rows whose text stood before, spaces aside; of completions: before, for the same prompt."""
    seen = set[bytes]()
    for number, row in rows():
        key = (prompt_of(row) + "\0" if of == "completion" else "") + " ".join(_text(row, of).split())
        mark = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=12).digest()
        if mark in seen:
            yield number, f"{of} stood before"
        seen.add(mark)


def near_duplicates(rows: Numbered, *, of: Of = "completion", threshold: float = 0.8) -> Dropped:
    """Rows whose text is nearly that of an earlier row (``llmdistill.datagen.near_duplicates``).

    ``of: prompt`` compares different prompts: all traces of a prompt that is nearly an earlier one go.
    """
    if of == "completion":
        numbers = list[int]()

        def texts() -> Iterator[str]:
            for number, row in rows():
                numbers.append(number)
                yield _text(row, of)

        for duplicate in near(texts(), threshold=threshold):
            yield numbers[duplicate.row], "completion nearly stood before"
        return
    prompts = dict[str, None]()

    def distinct() -> Iterator[str]:
        for _, row in rows():
            if (name := prompt_of(row)) not in prompts:
                prompts[name] = None
                yield _text(row, of)

    gone = {duplicate.row for duplicate in near(distinct(), threshold=threshold)}
    names = {name for i, name in enumerate(prompts) if i in gone}
    yield from ((number, "prompt nearly stood before") for number, row in rows() if prompt_of(row) in names)


def diverse(rows: Numbered, *, k: int, by: selection.Distance = "edit", least: float = 0.0) -> Dropped:
    """Of each prompt's traces up to k that are far apart (``llmdistill.datagen.selection.far_apart``).

    ``by: minhash`` takes time in proportion to the texts' length, ``edit`` to its square.
    """
    for number in _left_out(rows, lambda texts: selection.far_apart(selection.distances(texts, by), k, least=least)):
        yield number, "like the prompt's other traces"


def shortest(rows: Numbered, *, k: int) -> Dropped:
    """Of each prompt's traces the k with the fewest tokens; of those who do not say, characters."""
    found = defaultdict[str, list[tuple[int, int]]](list)
    for number, row in rows():
        found[prompt_of(row)].append((int(row.get("tokens") or len(_text(row, "completion"))), number))
    for traces in found.values():
        kept = set(selection.shortest([size for size, _ in traces], k))
        yield from (
            (number, "longer than the prompt's other traces") for i, (_, number) in enumerate(traces) if i not in kept
        )


def first(rows: Numbered, *, k: int) -> Dropped:
    """Of each prompt's traces the first k."""
    seen = Counter[str]()
    for number, row in rows():
        seen[prompt_of(row)] += 1
        if seen[prompt_of(row)] > k:
            yield number, f"beyond the prompt's first {k}"


def sentences(
    rows: Numbered,
    *,
    student: str,
    tokenizer: str,
    each: int | None = None,
    total: int | None = None,
    margin: float = 0.1,
    scale: Scale = "probability",
    score: Literal["share", "mean"] = "share",
    dtype: DType = "auto",
) -> Dropped:
    """The traces richest in sentences that the teacher says and the student does not (DASD; see
    ``llmdistill.datagen.sentences`` for ``margin``, ``scale`` and ``score``).

    Args:
        student: folder or hub name of the model to be trained, which reads every trace once.
        tokenizer: folder or hub name of the teacher's, whose ``token_ids`` and ``logprobs`` the traces carry.
        each: the best so many of every prompt; or
        total: the best so many of all.
        dtype: of the student's weights.

    Raises:
        ValueError: not one of ``each`` and ``total``.
        UserError: student or tokenizer cannot be loaded.
    """
    from llmdistill.datagen.divergence_aware import trace_statistics
    from llmdistill.datagen.student import Student
    from llmdistill.evals.engines.make import load_tokenizer

    if (each is None) == (total is None):
        raise ValueError("sentences takes one of each and total")
    scores = defaultdict[str, list[tuple[int, float]]](list)
    prompts = {number: prompt_of(row) for number, row in rows()}
    reader = Student(student, dtype)
    teacher = load_tokenizer(tokenizer, setting="tokenizer")
    for number, found in trace_statistics(rows(), reader, teacher, margin=margin, scale=scale):
        if isinstance(found, str):
            yield number, found
        else:
            scores[prompts[number]].append((number, found.score(score)))
    ordered = [sorted(traces) for traces in scores.values()]
    kept = select([[value for _, value in traces] for traces in ordered], each=each, total=total)
    for traces, mine in zip(ordered, kept, strict=True):
        yield from (
            (number, "poor in the teacher's own sentences") for i, (number, _) in enumerate(traces) if i not in mine
        )


def mixture(
    rows: Numbered,
    *,
    weights: Mapping[str, float] | None = None,
    ratios: Mapping[str, float] | None = None,
    total: int | None = None,
    seed: int = 0,
) -> Dropped:
    """Rows of each domain in proportion, drawn by ``seed`` (``llmdistill.datagen.mixture``).

    Args:
        weights: {domain: share}; or
        ratios: {domain: perplexity of the student over that of the teacher}, from which DDK's first weights follow.
        total: rows in all; as many as the scarcest domain allows when None.

    Raises:
        ValueError: not one of ``weights`` and ``ratios``, or a domain of the rows that has none.
    """
    if (weights is None) == (ratios is None):
        raise ValueError("mixture takes one of weights and ratios")
    numbers = defaultdict[str, list[int]](list)
    for number, row in rows():
        numbers[str(row.get("domain"))].append(number)
    shares = dict(weights) if weights is not None else first_weights(ratios or {})
    if unknown := sorted(set(numbers) - set(shares)):
        raise ValueError(f"mixture has no weight for the domain {unknown[0]}; 0 leaves its rows out")
    available = {name: len(n) for name, n in numbers.items()}
    taken = mixtures.counts(shares, available, total)
    drawn = mixtures.draw(available, {name: taken[name] for name in available}, seed)
    for name, mine in numbers.items():
        kept = set(drawn[name])
        yield from ((number, "beyond its domain's share") for i, number in enumerate(mine) if i not in kept)


def _left_out(rows: Numbered, choose: Callable[[list[str]], list[int]]) -> Iterator[int]:
    """Rows that ``choose`` does not pick among the completions of their prompt. The texts of a prompt are in memory
    together, and those of all prompts that are not complete: a file sorted by prompt needs one prompt's."""
    left = Counter(prompt_of(row) for _, row in rows())
    waiting = defaultdict[str, list[tuple[int, str]]](list)
    for number, row in rows():
        name = prompt_of(row)
        waiting[name].append((number, _text(row, "completion")))
        left[name] -= 1
        if not left[name]:
            traces = waiting.pop(name)
            kept = set(choose([text for _, text in traces])) if len(traces) > 1 else {0}
            yield from (trace for i, (trace, _) in enumerate(traces) if i not in kept)


def _text(row: Row, of: Of) -> str:
    if of == "completion":
        return str(row["completion"])
    return "\n".join(str(message["content"]) for message in as_messages(row["prompt"]))
