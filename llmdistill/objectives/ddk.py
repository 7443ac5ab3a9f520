"""How much of each domain to train on: by how far the student is behind the teacher there (DDK; METHODS 5.1).

The discrepancy of a domain is the ratio of perplexities, student's over teacher's, on its text. The first shares are
softmax_i(ratio_i); every so many steps the ratios are measured again and

    psi_i = r_i exp(ratio_i),    r'_i = alpha psi_i / sum_j psi_j + (1 - alpha) / N,

whose second part keeps every domain in the mixture. Logarithms are taken throughout: exp of a ratio of perplexities
overflows where a student knows nothing of a domain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

MOST = 20.0  # the largest ratio that counts: beyond it one domain has all the weight that alpha leaves it


def ratio(student_nats: float, teacher_nats: float) -> float:
    """Student's perplexity over teacher's, at most :data:`MOST`, from nats per token (two tokenizers: per byte)."""
    return min(math.exp(min(student_nats - teacher_nats, 700.0)), MOST)


def first_weights(ratios: Mapping[str, float]) -> dict[str, float]:
    """{domain: share of the mixture} at the start: softmax of the ratios.

    Raises:
        ValueError: no domain, or a ratio that is not a positive number.
    """
    return _normalised({name: _checked(name, value) for name, value in ratios.items()})


def next_weights(weights: Mapping[str, float], ratios: Mapping[str, float], *, alpha: float = 0.5) -> dict[str, float]:
    """{domain: share} after the ratios were measured again.

    Args:
        weights: the shares until now.
        ratios: of the same domains.
        alpha: how much of the share follows the discrepancy; the rest is spread evenly.

    Raises:
        ValueError: ``alpha`` outside [0, 1], other domains than before, a ratio that is not a positive number.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must be in [0, 1]")
    if set(weights) != set(ratios):
        raise ValueError(f"the ratios are of {', '.join(sorted(ratios))}, the weights of {', '.join(sorted(weights))}")
    logs = {n: math.log(w) + _checked(n, ratios[n]) if w > 0 else -math.inf for n, w in weights.items()}
    return {name: alpha * share + (1 - alpha) / len(logs) for name, share in _normalised(logs).items()}


def _checked(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"the ratio of {name} is {value}; it must be a positive number")
    return min(value, MOST)


def _normalised(logs: Mapping[str, float]) -> dict[str, float]:
    if not logs:
        raise ValueError("there is no domain")
    top = max(logs.values())
    powers = {name: math.exp(value - top) for name, value in logs.items()}
    return {name: power / sum(powers.values()) for name, power in powers.items()}
