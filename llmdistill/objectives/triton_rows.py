"""The divergences of `divergences` as two Triton kernels: one forward, one backward, over rows of logits.

The forward kernel reads a row of both logits twice: once for the two log-sum-exps, a tile of columns at a time, and
once for the value and the sum of the slopes. It keeps five numbers a row. The backward kernel forms the slopes again
and writes the gradient once, in the logits' dtype, so no float32 [n, V] tensor ever exists; PyTorch's version keeps one
and makes several on the way. What differs between divergences is one elementwise function, `_terms`: the core of
`cores` and `f_cores` in Triton's words.

Arithmetic is float32. Logits and gradient may be float32, bfloat16 or float16; columns lie side by side, rows anywhere.

Simplified away: `adaptive_kl`, whose weights need a sorted row, targets that need a normaliser of their own (TAID), and
float64: those are PyTorch's.
"""

# mypy: disable-error-code="no-untyped-def"
# (of a kernel Triton reads every annotation, and knows tl.constexpr alone)

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmdistill.objectives import cores, f_cores

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = 4096  # columns at a time: 16 a thread of eight warps
WARPS = 8
STATS = 5  # of a row: both sides' largest logit and log of the sum of the rest, and the sum of the slopes

Otherwise = Callable[[Tensor, Tensor, Exception], Tensor]  # (student [n, V], teacher [n, V], error) -> [n, V]


class Formula(NamedTuple):
    """A divergence as the kernels know it."""

    kind: str
    a: float = 0.0  # beta, alpha or the power's exponent
    scale: float = 1.0


def formula_of(core: cores.Core) -> Formula | None:
    """What the kernels call ``core``; None where they do not have it, or where its parameters are out of range."""
    function, named = (core.func, core.keywords) if isinstance(core, partial) else (core, {})
    if function is f_cores.f_divergence:
        name = named["name"]
        if name in f_cores.F_DIVERGENCES:
            return formula_of(f_cores.F_DIVERGENCES[name])
        return _power_of(name)
    if function is f_cores.power:
        return _power(named["alpha"], named.get("scale", 1.0))
    if function is cores.jsd:
        return _between(named["beta"], "forward_kl", "jsd", "reverse_kl")
    if function is cores.skew_forward_kl:
        return _between(named["alpha"], "forward_kl", "skew_forward_kl", None)
    if function is cores.skew_reverse_kl:
        return _between(named["alpha"], "reverse_kl", "skew_reverse_kl", None)
    plain = {
        cores.forward_kl: "forward_kl",
        cores.reverse_kl: "reverse_kl",
        cores.total_variation: "total_variation",
        f_cores.triangular: "triangular",
        f_cores.jeffreys: "jeffreys",
    }
    return Formula(plain[function]) if function in plain else None


def _between(share: float, at_zero: str, inside: str, at_one: str | None) -> Formula | None:
    if 0.0 < share < 1.0:
        return Formula(inside, share)
    kind = at_zero if share == 0.0 else at_one if share == 1.0 else None
    return None if kind is None else Formula(kind)


def _power_of(name: str) -> Formula | None:
    try:
        return _power(float(name.removeprefix("alpha_")), 1.0) if name.startswith("alpha_") else None
    except ValueError:
        return None


def _power(alpha: float, scale: float) -> Formula | None:
    if alpha in (0.0, 1.0):
        return Formula("forward_kl" if alpha else "reverse_kl", 0.0, scale)
    return Formula("power", alpha, scale) if abs(alpha) < float("inf") else None


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    formula: Formula,
    temperature: float,
    gradient_otherwise: Otherwise | None = None,
) -> Tensor:
    """[...] float32 of logits [..., V], with the gradient to the student's attached.

    Args:
        gradient_otherwise: what gives d value / d logits of rows of logits where the backward kernel does not compile;
            None: its error is raised.
    """
    columns = student_logits.shape[-1]
    student_nV = _rows(student_logits, columns)
    teacher_nV = _rows(teacher_logits.detach(), columns)
    value_n: Tensor = _Divergence.apply(student_nV, teacher_nV, formula, 1.0 / temperature, gradient_otherwise)
    return value_n.view(student_logits.shape[:-1])


def _rows(logits: Tensor, columns: int) -> Tensor:
    rows_nV = logits.reshape(-1, columns)
    return rows_nV if rows_nV.stride(-1) == 1 or columns == 1 else rows_nV.contiguous()


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_nV: Tensor,
        teacher_nV: Tensor,
        formula: Formula,
        inv_temperature: float,
        gradient_otherwise: Otherwise | None,
    ) -> Tensor:
        value_n, stats_nK = forward_rows(student_nV, teacher_nV, formula, inv_temperature)
        ctx.save_for_backward(student_nV, teacher_nV, stats_nK)
        ctx.formula, ctx.inv_temperature, ctx.otherwise = formula, inv_temperature, gradient_otherwise
        return value_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value_n: Tensor) -> tuple[Tensor | None, ...]:
        student_nV, teacher_nV, stats_nK = ctx.saved_tensors
        try:
            grad_nV = backward_rows(student_nV, teacher_nV, stats_nK, grad_value_n, ctx.formula, ctx.inv_temperature)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if ctx.otherwise is None:
                raise
            grad_nV = ctx.otherwise(student_nV, teacher_nV, error).mul_(grad_value_n.unsqueeze(-1)).to(student_nV.dtype)
        return grad_nV, None, None, None, None


def forward_rows(
    student_nV: Tensor, teacher_nV: Tensor, formula: Formula, inv_temperature: float
) -> tuple[Tensor, Tensor]:
    """Values [n] and what the backward pass needs of each row [n, STATS]."""
    n, columns = student_nV.shape
    value_n = student_nV.new_empty(n, dtype=torch.float32)
    stats_nK = student_nV.new_empty((n, STATS), dtype=torch.float32)
    if n:
        _forward[(n,)](
            *(student_nV, teacher_nV, value_n, stats_nK, student_nV.stride(0), teacher_nV.stride(0)),
            *(columns, formula.a, formula.scale, inv_temperature),
            KIND=formula.kind,
            TILE=tile(columns),
            num_warps=WARPS,
        )
    return value_n, stats_nK


def backward_rows(
    student_nV: Tensor,
    teacher_nV: Tensor,
    stats_nK: Tensor,
    grad_value_n: Tensor,
    formula: Formula,
    inv_temperature: float,
) -> Tensor:
    """d (grad_value . value) / d student logits [n, V], in their dtype."""
    n, columns = student_nV.shape
    grad_nV = student_nV.new_empty((n, columns))
    if n:
        _backward[(n, triton.cdiv(columns, tile(columns)))](
            *(student_nV, teacher_nV, stats_nK, grad_value_n.float().contiguous(), grad_nV),
            *(student_nV.stride(0), teacher_nV.stride(0), grad_nV.stride(0)),
            *(columns, formula.a, formula.scale, inv_temperature),
            KIND=formula.kind,
            TILE=tile(columns),
            num_warps=WARPS,
        )
    return grad_nV


def tile(columns: int) -> int:
    """Columns that a program holds at one time."""
    return max(16, min(TILE, int(triton.next_power_of_2(columns))))


@triton.jit
def _forward(
    student,
    teacher,
    value,
    stats,
    student_stride,
    teacher_stride,
    columns,
    a,
    scale,
    inv_temperature,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
):
    """A row: log-sum-exps of both sides, then the value and the sum of the slopes."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    s_max, s_sum = _tile_of_nothing()
    t_max, t_sum = _tile_of_nothing()
    for start in range(0, columns, TILE):
        s_x, t_x, _ = _load(student, teacher, start, columns, inv_temperature, TILE)
        s_max, s_sum = _log_sum_exp_tile(s_x, s_max, s_sum)
        t_max, t_sum = _log_sum_exp_tile(t_x, t_max, t_sum)
    s_log, t_log = tl.log(s_sum), tl.log(t_sum)
    total, slopes = 0.0, 0.0
    for start in range(0, columns, TILE):
        s_x, t_x, inside = _load(student, teacher, start, columns, inv_temperature, TILE)
        terms, slope, _ = _terms((s_x - s_max) - s_log, (t_x - t_max) - t_log, a, scale, KIND)
        total += tl.sum(tl.where(inside, terms, 0.0))
        slopes += tl.sum(tl.where(inside, slope, 0.0))
    tl.store(value + row, total)
    stats += row * 5
    tl.store(stats, s_max)
    tl.store(stats + 1, s_log)
    tl.store(stats + 2, t_max)
    tl.store(stats + 3, t_log)
    tl.store(stats + 4, slopes)


@triton.jit
def _backward(
    student,
    teacher,
    stats,
    grad_value,
    grad,
    student_stride,
    teacher_stride,
    grad_stride,
    columns,
    a,
    scale,
    inv_temperature,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile of a row: its slopes through the softmax, times the gradient of the value."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * TILE
    student += row * student_stride
    teacher += row * teacher_stride
    stats += row * 5
    s_x, t_x, inside = _load(student, teacher, start, columns, inv_temperature, TILE)
    log_s = (s_x - tl.load(stats)) - tl.load(stats + 1)
    log_t = (t_x - tl.load(stats + 2)) - tl.load(stats + 3)
    _, slope, s = _terms(log_s, log_t, a, scale, KIND)
    through_softmax = slope - s * tl.load(stats + 4)
    result = through_softmax * inv_temperature * tl.load(grad_value + row)
    at = start + tl.arange(0, TILE)
    tl.store(grad + row * grad_stride + at, result.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def _load(student, teacher, start, columns, inv_temperature, TILE: tl.constexpr):
    at = start + tl.arange(0, TILE)
    inside = at < columns
    s_x = tl.load(student + at, mask=inside, other=-float("inf")).to(tl.float32) * inv_temperature
    t_x = tl.load(teacher + at, mask=inside, other=-float("inf")).to(tl.float32) * inv_temperature
    return s_x, t_x, inside


@triton.jit
def _tile_of_nothing():
    return -float("inf"), 0.0


@triton.jit
def _log_sum_exp_tile(x, largest, total):
    """Takes a tile into (largest, sum of exp(x - largest)); tiles that are -inf throughout change nothing."""
    larger = tl.maximum(largest, tl.max(x, 0))
    base = tl.where(larger == -float("inf"), 0.0, larger)
    return larger, total * tl.exp(largest - base) + tl.sum(tl.exp(x - base), 0)


@triton.jit
def _terms(log_s, log_t, a, scale, KIND: tl.constexpr):
    """What a column adds to the value, d value / d log_s, and S; see the functions of the same names in `cores`."""
    s, t = tl.exp(log_s), tl.exp(log_t)
    if KIND == "forward_kl":
        terms = _kl_terms(t, log_t, log_s)
        slope = s - t
    elif KIND == "reverse_kl":
        terms = _kl_terms(s, log_s, log_t)
        slope = terms
    elif KIND == "jsd":
        log_m = _log_mixture(log_t, log_s, a)
        slope = _kl_terms(s, log_s, log_m) * (1.0 - a)
        terms = _kl_terms(t, log_t, log_m) * a + slope
    elif KIND == "skew_forward_kl":
        log_m = _log_mixture(log_t, log_s, a)
        terms = _kl_terms(t, log_t, log_m)
        slope = tl.where(s == 0, 0.0, (s - s * tl.exp(log_t - log_m)) * (1.0 - a))
    elif KIND == "skew_reverse_kl":
        log_m = _log_mixture(log_t, log_s, 1.0 - a)
        terms = _kl_terms(s, log_s, log_m)
        slope = tl.where(s == 0, 0.0, (tl.exp(log_t - log_m) - 1.0) * s * (1.0 - a) + terms)
    elif KIND == "total_variation":
        gap = s - t
        terms = tl.abs(gap) * 0.5
        slope = tl.where(gap > 0, 0.5, tl.where(gap < 0, -0.5, 0.0)) * s
    elif KIND == "triangular":
        relative = (t - s) / tl.maximum(t + s, 1.1754943508222875e-38)
        terms = (t - s) * relative
        slope = -(s * relative * (relative + 2.0))
    elif KIND == "jeffreys":
        backward = _kl_terms(s, log_s, log_t)
        terms = _kl_terms(t, log_t, log_s) + backward
        slope = (s - t) + backward
    else:
        tl.static_assert(KIND == "power")
        limit = 80.0 / tl.maximum(tl.maximum(tl.abs(a), tl.abs(1.0 - a)), 1.0)
        log_u = tl.where((s == 0) & (t == 0), 0.0, log_t - log_s)
        log_u = tl.minimum(tl.maximum(log_u, -limit), limit)
        slope = _expm1(log_u * a) * s * (-scale / a)
        terms = _expm1(log_u * (a - 1.0)) * (scale / (a - 1.0)) * t + slope
        uncovered = ((a > 1) & (t > 0) & (log_s == -float("inf"))) | ((a < 0) & (s > 0) & (log_t == -float("inf")))
        return tl.where(uncovered, float("inf"), terms), slope, s
    return terms * scale, slope * scale, s


@triton.jit
def _kl_terms(p, log_p, log_q):
    return tl.where(p == 0, 0.0, p * (log_p - log_q))


@triton.jit
def _log_mixture(log_t, log_s, teacher_share):
    x, y = log_t + tl.log(teacher_share), log_s + tl.log(1.0 - teacher_share)
    larger = tl.maximum(x, y)
    both = larger + tl.log(1.0 + tl.exp(tl.minimum(x, y) - larger))
    return tl.where(larger == -float("inf"), larger, both)


@triton.jit
def _expm1(x):
    """exp(x) - 1 to float32's precision: by its series where the difference would cancel."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(tl.abs(x) < 0.3, series, tl.exp(x) - 1.0)
