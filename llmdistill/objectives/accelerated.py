"""Who forms a divergence of whole rows: on CUDA Triton's kernels or the compiled formula, on a CPU PyTorch.

The formula is written once, in `divergences`. On CUDA the kernels of `triton_rows` are taken where they have it, and
`torch.compile` of the formula otherwise, unless a schedule moves its parameters. What does not compile is left out for
rows of that width and dtype, with one warning, and the next is taken; PyTorch's own operations always remain. The
environment variable LLMDISTILL_KERNELS may name one: triton, compile or pytorch (auto: as described; triton on a CPU
needs TRITON_INTERPRET=1).
"""

import os
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from llmdistill.objectives.cores import Core
from llmdistill.objectives.fused import per_token

# formula(core, student_logits [..., V], teacher_logits [..., V], temperature) -> (value [...], grad_logits [..., V])
DenseFormula = Callable[[Core, Tensor, Tensor, float], tuple[Tensor, Tensor]]

KERNELS = "LLMDISTILL_KERNELS"
ROADS = {"auto": ("triton", "compile"), "triton": ("triton",), "compile": ("compile",), "pytorch": ()}
_given_up: set[tuple[str, str, int, torch.dtype]] = set()
_parameters: dict[str, set[tuple[Any, ...]]] = {}  # that each core was compiled with


def dense_rows(
    formula: DenseFormula, core: Core, student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> Tensor:
    """Values [...] of the formula, gradient attached, by the fastest road that compiles.

    Raises ValueError for an unknown LLMDISTILL_KERNELS, and whatever the core raises.
    """
    for road in _roads(student_logits):
        if _key(road, core, student_logits) in _given_up or road == "compile" and _changes(core):
            continue
        take = _by_triton if road == "triton" else _by_compile
        try:
            values = take(formula, core, student_logits, teacher_logits, temperature)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            _give_up(road, core, student_logits, error)
        else:
            if values is not None:
                return values
    return per_token(student_logits, lambda logits: formula(core, logits, teacher_logits, temperature))


def _roads(logits: Tensor) -> tuple[str, ...]:
    named = os.environ.get(KERNELS, "auto")
    if named not in ROADS:
        raise ValueError(f"{KERNELS} is '{named}'; it must be one of {', '.join(ROADS)}")
    return () if named == "auto" and not logits.is_cuda else ROADS[named]


def _changes(core: Core) -> bool:
    """Whether its parameters move, as a schedule's do: each value would be compiled anew, for half a minute."""
    seen = _parameters.setdefault(_name(core), set())
    seen.add(tuple(sorted(core.keywords.items())) if isinstance(core, partial) else ())
    return len(seen) > 2


def _by_triton(
    formula: DenseFormula, core: Core, student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> Tensor | None:
    """None where there is no kernel for it."""
    from llmdistill.objectives import triton_rows

    known = triton_rows.formula_of(core)
    if known is None or {student_logits.dtype, teacher_logits.dtype} - set(triton_rows.DTYPES):
        return None

    def gradient(student_nV: Tensor, teacher_nV: Tensor, error: Exception) -> Tensor:
        _give_up("triton", core, student_nV, error)
        return formula(core, student_nV, teacher_nV, temperature)[1]

    return triton_rows.divergence(student_logits, teacher_logits, known, temperature, gradient)


def _by_compile(
    formula: DenseFormula, core: Core, student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> Tensor:
    run = _compiled(formula)
    return per_token(student_logits, lambda logits: run(core, logits, teacher_logits, temperature))


@cache
def _compiled(formula: DenseFormula) -> Any:
    return torch.compile(formula)


def _give_up(road: str, core: Core, logits: Tensor, error: Exception) -> None:
    _given_up.add(_key(road, core, logits))
    what = "Triton's kernel" if road == "triton" else "torch.compile"
    reason = next(iter(str(error).strip().splitlines()), "")
    shape = "x".join(map(str, logits.shape))
    warnings.warn(
        f"{what} of {_name(core)} does not work for {shape} logits in {str(logits.dtype).removeprefix('torch.')} on "
        f"{logits.device}: {type(error).__name__} {reason[:300]}. PyTorch's own operations are used there, which take "
        f"more time and memory; {KERNELS}=pytorch silences this",
        stacklevel=2,
    )


def _key(road: str, core: Core, logits: Tensor) -> tuple[str, str, int, torch.dtype]:
    return road, _name(core), logits.shape[-1], logits.dtype


def _name(core: Core) -> str:
    if not isinstance(core, partial):
        return core.__name__
    return str(core.keywords.get("name", core.func.__name__))
