"""Which rows a step trains on where the shares of the domains move with training (DDK; METHODS 5.1).

Every prompt of the global batch is of a domain drawn by the shares, and the next of that domain's rows, whose order is
shuffled anew each time all have been used. Until the first measurement the shares are those of the rows. Every so many
steps the ratio of perplexities in each domain is exp(mean divergence of its tokens): on text of the teacher, under the
forward KL, that is the ratio of the paper; under another divergence it is what the method itself calls being behind.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from llmdistill.composition.method import Measured, Method, Schedule
from llmdistill.errors import UserError
from llmdistill.objectives.ddk import first_weights, next_weights, ratio
from llmdistill.recipe.config import DistillationConfig
from llmdistill.texts.facts import facts_of


class DomainMixture(Schedule):
    """Shares of the domains, and the rows drawn by them: a function of the seed and of the steps so far.

    Args:
        rows: domain -> numbers of its rows.
        term: whose losses, in nats a token, say how far the student is behind.
        every: steps between two measurements. One that has not met all domains by then goes on.
        alpha: how much of the share follows the discrepancy; the rest is spread evenly.
        seed: of the draws.
    """

    state: ClassVar[tuple[str, ...]] = ("shares", "measured", "sums", "drawn")

    def __init__(self, rows: Mapping[str, Sequence[int]], term: str, *, every: int, alpha: float, seed: int) -> None:
        self.rows = {name: list(rows[name]) for name in sorted(rows)}
        self.term, self.every, self.alpha, self.seed = term, every, alpha, seed
        total = sum(map(len, self.rows.values()))
        self.shares = {name: len(mine) / total for name, mine in self.rows.items()}
        self.measured = False
        self.sums = {name: [0.0, 0.0] for name in self.rows}  # of losses, and of tokens, since the last measurement
        self.drawn = dict.fromkeys(self.rows, 0)
        self._orders = dict[str, tuple[int, list[int]]]()  # the last one shuffled of each domain

    def update(self, measured: Measured) -> None:
        for (term, axis, name), (loss, tokens) in measured.groups.items():
            if (term, axis) == (self.term, "domain") and name in self.sums:
                self.sums[name] = [self.sums[name][0] + loss, self.sums[name][1] + tokens]
        if measured.step % self.every or not all(tokens > 0 for _, tokens in self.sums.values()):
            return
        ratios = {name: ratio(loss / tokens, 0.0) for name, (loss, tokens) in self.sums.items()}
        self.shares = next_weights(self.shares, ratios, alpha=self.alpha) if self.measured else first_weights(ratios)
        self.measured, self.sums = True, {name: [0.0, 0.0] for name in self.rows}

    def numbers(self) -> dict[str, float]:
        return {f"share/{name or 'none'}": share for name, share in self.shares.items()}

    def draw(self, step: int, places: Sequence[int], everywhere: int) -> list[int]:
        """The rows at some places of the global batch of a step. Every rank draws for all of them, and so agrees.

        Args:
            step: optimizer steps done.
            places: of this rank, in turn.
            everywhere: places of all ranks.
        """
        names, chosen = list(self.shares), list[int]()
        for place in range(everywhere):
            left = _chance(self.seed, step, place)
            for name in names[:-1]:
                left -= self.shares[name]
                if left < 0:
                    break
            else:
                name = names[-1]
            chosen.append(self._next(name))
        return [chosen[place] for place in places]

    def _next(self, name: str) -> int:
        """The next row of a domain."""
        rows = self.rows[name]
        time, place = divmod(self.drawn[name], len(rows))
        self.drawn[name] += 1
        if self._orders.get(name, (-1, []))[0] != time:
            order = list(rows)
            random.Random(f"{self.seed}/{name}/{time}").shuffle(order)
            self._orders[name] = (time, order)
        return self._orders[name][1][place]


def mixed_domains(method: Method, examples: Any, args: DistillationConfig) -> DomainMixture | None:
    """The mixture of a method over encoded prompts; None where the settings want none.

    Raises:
        UserError: rows that are streamed, fewer than two domains, or a method that measures no distance from a teacher
            token by token.
    """
    every = args.mixture_every
    if not every:
        return None
    fix = "Fix: leave objective.mixture_every out"
    if not isinstance(examples, Sequence):
        raise UserError(
            f"objective.mixture_every is {every}, and a stream's rows cannot be chosen by domain. {fix}, or "
            "data.streaming."
        )
    term = method.primary
    if term is None or term.loss is None or term.on_student:
        what = "no term compares the student with a teacher" if term is None else f"term {term.name!r} is no divergence"
        raise UserError(
            f"objective.mixture_every is {every}, and {what} token by token, by which domains could be told apart. "
            f"{fix}, or a divergence with estimator full or top_k."
        )
    rows = dict[str, list[int]]()
    facts = facts_of(examples)
    for number, domain in enumerate(facts.domains.tolist()):
        rows.setdefault(facts.names[domain] or "", []).append(number)
    if len(rows) < 2:
        named = ", ".join(map(repr, rows)) or "none"
        raise UserError(
            f"objective.mixture_every is {every}, and the rows have one domain ({named}). {fix}, or name the column "
            "with domains: --data.domain_column NAME."
        )
    return DomainMixture(rows, term.name, every=every, alpha=args.mixture_alpha, seed=args.seed)


def _chance(seed: int, step: int, place: int) -> float:
    """Uniform in [0, 1), the same on every rank, and of no rank's own seeds."""
    digest = hashlib.blake2b(f"mixture:{seed}:{step}:{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64
