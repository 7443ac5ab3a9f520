"""Every divergence under test, and the reference inputs."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmdistill.objectives import divergences, sparse

GOLDEN = Path(__file__).parents[1] / "golden"
INF = float("inf")


@dataclass(frozen=True)
class Case:
    """One divergence with its parameters; the flags are facts about the mathematics."""

    name: str
    function: str
    params: dict[str, Any] = field(default_factory=dict)
    inf_without_student: bool = False  # +inf where S = 0 < T
    inf_without_teacher: bool = False  # +inf where T = 0 < S
    coarsens: bool = True  # obeys the data-processing inequality

    @property
    def dense(self) -> Callable[..., Tensor]:
        return partial(getattr(divergences, self.function), **self.params)

    @property
    def sparse(self) -> Callable[..., Tensor]:
        return partial(getattr(sparse, self.function), **self.params)


CASES = [
    Case("forward_kl", "forward_kl", inf_without_student=True),
    Case("reverse_kl", "reverse_kl", inf_without_teacher=True),
    Case("jsd_0", "jsd", {"beta": 0.0}, inf_without_student=True),
    Case("jsd_.1", "jsd", {"beta": 0.1}),
    Case("jsd_.5", "jsd", {"beta": 0.5}),
    Case("jsd_.9", "jsd", {"beta": 0.9}),
    Case("jsd_1", "jsd", {"beta": 1.0}, inf_without_teacher=True),
    Case("skew_forward_kl", "skew_forward_kl"),
    Case("skew_forward_kl_0", "skew_forward_kl", {"alpha": 0.0}, inf_without_student=True),
    Case("skew_reverse_kl", "skew_reverse_kl"),
    Case("skew_reverse_kl_0", "skew_reverse_kl", {"alpha": 0.0}, inf_without_teacher=True),
    Case("total_variation", "total_variation"),
    # Its weights are no function of a column: coarsening may raise it.
    Case("adaptive_kl", "adaptive_kl", inf_without_student=True, inf_without_teacher=True, coarsens=False),
    Case("f_kl_forward", "f_divergence", {"name": "kl_forward"}, inf_without_student=True),
    Case("f_kl_reverse", "f_divergence", {"name": "kl_reverse"}, inf_without_teacher=True),
    Case("f_jensen_shannon", "f_divergence", {"name": "jensen_shannon"}),
    Case("f_jeffreys_sum", "f_divergence", {"name": "jeffreys_sum"}, True, True),
    Case("f_total_variation", "f_divergence", {"name": "total_variation"}),
    Case("f_pearson_chi2", "f_divergence", {"name": "pearson_chi2"}, inf_without_student=True),
    Case("f_neyman_chi2", "f_divergence", {"name": "neyman_chi2"}, inf_without_teacher=True),
    Case("f_squared_hellinger", "f_divergence", {"name": "squared_hellinger"}),
    Case("f_triangular", "f_divergence", {"name": "triangular"}),
    Case("f_alpha_0.5", "f_divergence", {"name": "alpha_0.5"}),
    Case("f_alpha_1.5", "f_divergence", {"name": "alpha_1.5"}, inf_without_student=True),
    Case("f_alpha_2.0", "f_divergence", {"name": "alpha_2.0"}, inf_without_student=True),
    Case("f_alpha_-0.5", "f_divergence", {"name": "alpha_-0.5"}, inf_without_teacher=True),
    Case("f_alpha_0", "f_divergence", {"name": "alpha_0"}, inf_without_teacher=True),
    Case("f_alpha_1", "f_divergence", {"name": "alpha_1"}, inf_without_student=True),
]


def golden(name: str) -> dict[str, Any]:
    """A reference file with its inputs as float64 tensors (token ids int64, masks bool)."""
    data = json.loads((GOLDEN / f"{name}.json").read_text())
    for key, value in data["inputs"].items():
        kind = {"mask": torch.bool, "tokens": torch.int64, "labels": torch.int64}.get(key, torch.float64)
        data["inputs"][key] = torch.tensor(value, dtype=kind)
    return data


def logits(seed: int, *shape: int, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def value_and_grad(loss: Callable[[Tensor], Tensor], student_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token values and the gradient of their sum with respect to the student's logits."""
    leaf = student_logits.detach().clone().requires_grad_()
    value = loss(leaf)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), grad
