"""What training changed on held-out sequences: before and after on the same prompts, so prompt by prompt.

Some prompts are hard before and after. The intervals of the two means hold that spread and overlap where every single
prompt got better; the interval of the mean difference does not hold it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmdistill.record.intervals import paired_bootstrap, paired_permutation
from llmdistill.record.page.load import as_dict, as_list, finite

LEVEL = 0.05
TOKENS = "tokens"  # beside the metrics of a text's sequences: counted tokens of each


@dataclass(frozen=True)
class Change:
    """After minus before, its 95 % interval over prompts, and whether it is told apart from no change.

    That it is when the interval leaves 0 out and the sign-flip test rejects at 5 %: an interval over a handful of
    prompts is too narrow, and five or fewer can tell nothing.
    """

    difference: float
    low: float
    high: float
    told: bool

    @property
    def leaves_zero_out(self) -> bool:
        return self.low > 0 or self.high < 0


def change(before: Mapping[str, Any], after: Mapping[str, Any], text: str, metric: str) -> Change | None:
    """The change of a metric on a text.

    Args:
        before, after: as ``before.json`` and ``after.json`` have it.

    Returns:
        None where the two do not hold a value for each of the same two or more sequences.
    """
    a, b = (_scores(as_dict(as_dict(side.get("sequences")).get(text)), metric) for side in (after, before))
    if a is None or b is None or len(a) != len(b) or len(a) < 2:
        return None
    found = paired_bootstrap(a, b)
    told = (found.low > 0 or found.high < 0) and paired_permutation(a, b) <= LEVEL
    return Change(found.difference, found.low, found.high, told)


def per_token(means: Sequence[float], tokens: Sequence[float]) -> list[float]:
    """A score per sequence whose plain mean is the mean per token: m + n_b (m_b - m) / mean n.

    The mean per token m = sum n_b m_b / sum n_b is a ratio of two sums that both depend on which sequences there are.
    This is m and every sequence's influence on it (the linearisation of the ratio), so that resampling the scores
    resamples the ratio.

    Args:
        means: [B] mean per token of each sequence.
        tokens: [B] how many those are; some are above 0.
    """
    total = sum(tokens)
    mean = sum(m * n for m, n in zip(means, tokens, strict=True)) / total
    return [mean + n * len(tokens) / total * (m - mean) for m, n in zip(means, tokens, strict=True)]


def _scores(sequences: Mapping[str, Any], metric: str) -> list[float] | None:
    values = _series(sequences, metric)
    if values is None or TOKENS not in sequences:  # pairs weigh alike; so do sequences of runs of earlier versions
        return values
    tokens = _numbers(sequences[TOKENS])
    return None if tokens is None or len(tokens) != len(values) or sum(tokens) <= 0 else per_token(values, tokens)


def _series(sequences: Mapping[str, Any], metric: str) -> list[float] | None:
    if metric in sequences:
        return _numbers(sequences[metric])
    if metric not in ("margin", "accuracy"):
        return None
    chosen, rejected = (_numbers(sequences.get(f"{side}_logp")) for side in ("chosen", "rejected"))
    if chosen is None or rejected is None or len(chosen) != len(rejected):
        return None
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    return margins if metric == "margin" else [float(margin > 0) for margin in margins]


def _numbers(values: Any) -> list[float] | None:
    """All of them, if they are: what is paired may lack none."""
    numbers = [number for value in as_list(values) if (number := finite(value)) is not None]
    return numbers if numbers and len(numbers) == len(values) else None
