"""Exact worlds for the tests: distributions small enough that every state is enumerated, and their exact denoisers.

A denoiser here is called as a model is: ids [B, L] -> logits [B, L, V + 1], MASK = V at minus infinity.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Denoiser = Callable[[Tensor], Tensor]


def golden(name: str) -> Any:
    """A reference file: its source is named inside."""
    return json.loads((Path(__file__).parents[1] / "golden/diffusion" / f"{name}.json").read_text())


def chain(vocab: int, length: int, seed: int = 0, stay: float | None = None) -> Tensor:
    """p(x) [V, …, V] of a Markov chain, float64: random, or one that stays in its state with probability ``stay``."""
    generator = torch.Generator().manual_seed(seed)
    if stay is None:
        start = torch.rand(vocab, generator=generator, dtype=torch.float64).add(0.2)
        step = torch.rand(vocab, vocab, generator=generator, dtype=torch.float64).pow(2).add(0.05)
    else:
        start = torch.ones(vocab, dtype=torch.float64)
        step = torch.full((vocab, vocab), (1 - stay) / (vocab - 1), dtype=torch.float64).fill_diagonal_(stay)
    start, step = start / start.sum(), step / step.sum(-1, keepdim=True)
    p = start
    for _ in range(length - 1):
        p = p.unsqueeze(-1) * step
    return p


def all_ids(vocab: int, length: int) -> Tensor:
    """Every sequence, [V^L, L], in the order of ``p.flatten()``."""
    return torch.tensor(list(itertools.product(range(vocab), repeat=length)))


class Exact:
    """The posterior p(x_i | what is visible) of a distribution p [V, …, V], for every state; perturbed where asked."""

    def __init__(self, p: Tensor, perturb: float = 0.0, seed: int = 1) -> None:
        self.vocab, self.length, self.p = p.shape[0], p.dim(), p
        self.mask_id = self.mask_token_id = p.shape[0]
        self.ids = all_ids(self.vocab, self.length)
        self.states = all_ids(self.vocab + 1, self.length)
        visible = self.states.unsqueeze(1)  # [S, 1, L]
        agrees = ((visible == self.mask_id) | (visible == self.ids.unsqueeze(0))).all(-1)  # [S, X]
        weight = agrees.double() * p.flatten()
        one_hot = torch.nn.functional.one_hot(self.ids, self.vocab).double()  # [X, L, V]
        marginals = torch.einsum("sx,xlv->slv", weight, one_hot)
        posterior = marginals / marginals.sum(-1, keepdim=True)
        logits = posterior.log()
        if perturb:
            generator = torch.Generator().manual_seed(seed)
            logits = logits + perturb * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
        self.table = torch.cat([logits, torch.full_like(logits[..., :1], -torch.inf)], -1)

    def index(self, ids: Tensor) -> Tensor:
        """The number of a state, of ids [..., L]."""
        powers = (self.vocab + 1) ** torch.arange(self.length - 1, -1, -1)
        return (ids * powers).sum(-1)

    def __call__(self, ids: Tensor, **_: Any) -> Tensor:
        return self.table[self.index(ids)]


def entropy(p: Tensor) -> float:
    """Nats."""
    flat = p.flatten()
    return float(-(flat * flat.clamp_min(1e-300).log()).sum())


def total_variation(p: Tensor, q: Tensor) -> float:
    return float((p.flatten() - q.flatten()).abs().sum() / 2)


Chooser = Callable[[Tensor, Tensor, Tensor], list[tuple[float, Tensor]]]


def push(exact: Exact, steps: list[Chooser]) -> Tensor:
    """The exact distribution [V^L] of a sampler: mass over all states, moved step by step.

    In every state all draws of tokens for the masked positions are enumerated. A step, ``choose(logits, tokens,
    masked)``, each of them a batch over those draws, gives sets of positions [B, L] bool to be
    revealed and the chance of each.
    """
    mass = {(exact.mask_id,) * exact.length: 1.0}
    for choose in steps:
        moved: dict[tuple[int, ...], float] = {}
        for state, weight in mass.items():
            ids = torch.tensor(state)
            masked = ids == exact.mask_id
            if not bool(masked.any()):
                moved[state] = moved.get(state, 0.0) + weight
                continue
            draws = all_ids(exact.vocab, int(masked.sum()))
            tokens = ids.repeat(len(draws), 1)
            tokens[:, masked] = draws
            logits = exact(ids.unsqueeze(0)).expand(len(draws), -1, -1)
            chances = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)[:, masked].sum(-1).exp()
            for chance, revealed in choose(logits, tokens, masked.expand(len(draws), -1)):
                new = torch.where(revealed, tokens, ids)
                for row, probability in zip(new.tolist(), (chances * chance * weight).tolist(), strict=True):
                    if probability > 0:
                        moved[tuple(row)] = moved.get(tuple(row), 0.0) + probability
        mass = moved
    result = torch.zeros(exact.vocab**exact.length, dtype=torch.float64)
    for state, weight in mass.items():
        assert exact.mask_id not in state, "the sampler left a mask behind"
        number = 0
        for token in state:
            number = number * exact.vocab + token
        result[number] += weight
    return result
