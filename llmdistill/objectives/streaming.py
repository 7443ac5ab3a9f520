"""Runs per-token objectives over the vocabulary projection in chunks of tokens: [N, V] logits never exist.

`streamed(objective, hidden_NH, lm_head, teacher)` equals, in value and gradient,
`objective(lm_head(hidden_NH), *teacher).sum()`. Its forward pass takes a chunk of rows at a time through
projection, loss and gradient, and keeps only d loss / d hidden [N, H] and d loss / d weight [V, H]; the extra
memory is O(chunk_tokens x V) whatever N. The gradient is complete when forward returns, so backward only
scales it.

Several objectives on the same rows, each with its evidence, weights and share (`Part`), take one pass: the logits of a
chunk are formed once for all of them.

Simplified away: second derivatives, and a second backward through the same loss.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmdistill.objectives.fused import compute_dtype
from llmdistill.objectives.projection import Projection, matmul_dtype
from llmdistill.objectives.rows import Teacher, TeacherRows, as_rows

CPU_ROWS, GPU_BYTES = 128, 2**30  # of a chunk

Objective = Callable[..., Tensor]
Metrics = Callable[..., dict[str, Tensor]]


def streamed(
    objective: Objective,
    hidden_NH: Tensor,
    lm_head: nn.Linear,
    teacher: Teacher,
    *,
    chunk_tokens: int = 0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    weights_N: Tensor | None = None,
    metrics: Metrics | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over rows of weight * objective, with gradients to hidden_NH and lm_head, and the sums of metrics.

    objective(student_logits [n, V], *teacher_args) -> [n]. teacher: logits [N, V], a (hidden, lm_head) pair,
    or rows. logit_scale multiplies the student's logits, then softcap c maps them to c tanh(x / c).
    chunk_tokens rows are taken at a time, 0: `rows_at_once`.
    vocab_size cuts the columns of both sides before any softmax. weights_N [N] multiplies the losses and
    carries no gradient. metrics(student_logits, *teacher_args) -> {name: [n]} comes back summed over rows,
    unweighted, as float64 scalars.

    Matmuls run in autocast's dtype where it is on, else in hidden_NH's; losses and the gradient of the weight
    accumulate in float32. With N = 0 the loss is 0 with zero gradients, still attached, for distributed ranks
    without a counted token. Reads lm_head's weight and bias, not its forward, so it may run inside a replaced
    forward.

    Raises ValueError for row counts that differ, chunk_tokens < 0, or a vocab_size wider than either side.
    """
    part = Part(objective, as_rows(teacher), weights_N=weights_N, metrics=metrics)
    result = streamed_parts(
        [part],
        hidden_NH,
        lm_head,
        chunk_tokens=chunk_tokens,
        logit_scale=logit_scale,
        softcap=softcap,
        vocab_size=vocab_size,
    )
    return result.total, result.metric_sums[0]


@dataclass(frozen=True, eq=False)
class Part:
    """One objective among several: on which of the rows, with what evidence, weights and share in the total."""

    objective: Objective
    teacher: TeacherRows  # of these rows only
    rows: slice | None = None  # start and stop among the N rows; None: all
    weights_N: Tensor | None = None  # of these rows only
    scale: float = 1.0
    metrics: Metrics | None = None
    weigh_metrics: bool = False  # by weights_N, as the losses are


@dataclass(frozen=True, eq=False)
class Streamed:
    """What came of the parts, K of them."""

    total: Tensor  # sum of scale * sum, with gradient to hidden states and head
    sums: Tensor  # [K] weighted sums of each part's losses, unscaled, detached
    metric_sums: list[dict[str, Tensor]]
    row_losses: list[Tensor]  # [n_k] of each part, unweighted, detached
    squared_norms: Tensor | None  # [K] of each part's scaled gradient by hidden_NH, where asked for


def streamed_parts(
    parts: Sequence[Part],
    hidden_NH: Tensor,
    lm_head: nn.Linear,
    *,
    chunk_tokens: int = 0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    norms: bool = False,
) -> Streamed:
    """Several objectives in one pass over the projection; arguments as in `streamed`.

    ``norms`` also measures the gradient that each part alone has at the hidden states (a backward through its loss
    for each of them; where there is one part the gradient is taken once anyway).
    """
    parts = [replace(part, teacher=as_rows(part.teacher)) for part in parts]
    for part in parts:
        start, stop = _bounds(part, len(hidden_NH))
        _check(hidden_NH[start:stop], lm_head, part.teacher, chunk_tokens, vocab_size, part.weights_N)
    chunk_tokens = chunk_tokens or rows_at_once(len(lm_head.weight), hidden_NH.device)
    head = Projection.of(lm_head, matmul_dtype(hidden_NH), vocab_size, logit_scale, softcap)
    loop = _Loop(parts, head, hidden_NH.detach(), chunk_tokens, vocab_size, norms)
    inputs = (hidden_NH, lm_head.weight, lm_head.bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        total = _Streamed.apply(*inputs, loop)
    else:
        total = loop.run(None)
    return Streamed(total, loop.sums, loop.metric_sums, loop.row_losses, loop.squared_norms if norms else None)


def rows_at_once(columns: int, device: torch.device) -> int:
    """Rows of a chunk where nobody says how many: 128 on a CPU, whose caches they fit; on a GPU, which needs work for
    all of its cores, as many as have 1 GiB of float32 logits (of a small one: a sixty-fourth of its memory)."""
    if device.type == "cpu":
        return CPU_ROWS
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 2**34
    return rows_for_memory(columns, there)


def rows_for_memory(columns: int, there: int) -> int:
    """Of a device with that many bytes, see `rows_at_once`."""
    rows = min(GPU_BYTES, there // 64) // (4 * columns)
    return max(CPU_ROWS, min(8192, rows // CPU_ROWS * CPU_ROWS))


def _bounds(part: Part, rows: int) -> tuple[int, int]:
    return (0, rows) if part.rows is None else (part.rows.start, part.rows.stop)


@torch.no_grad()
def streamed_metrics(
    metrics: Metrics,
    hidden_NH: Tensor,
    lm_head: nn.Linear,
    teacher: Teacher,
    *,
    chunk_tokens: int = 0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> dict[str, Tensor]:
    """{name: [N]} of metrics(student_logits, *teacher_args) -> {name: [n]}; arguments as in `streamed`."""
    rows = as_rows(teacher)
    _check(hidden_NH, lm_head, rows, chunk_tokens, vocab_size, None)
    chunk_tokens = chunk_tokens or rows_at_once(len(lm_head.weight), hidden_NH.device)
    head = Projection.of(lm_head, matmul_dtype(hidden_NH), vocab_size, logit_scale, softcap)
    with torch.autocast(hidden_NH.device.type, enabled=False):  # see _Loop.run
        pieces = [
            metrics(head.rescale(head.matmul(hidden_NH[chunk])), *rows.chunk(chunk, vocab_size))
            for chunk in _chunks(len(rows), chunk_tokens)
        ]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, loop: "_Loop") -> Tensor:
        inputs = (hidden_NH, weight_VH, bias_V)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        ctx.gradients = _Gradients.zeros(*inputs, needed=ctx.needs_input_grad[:3])
        return loop.run(ctx.gradients)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("second backward through a streamed loss: its gradients are scaled in place, once")
        g, ctx.gradients = ctx.gradients, None
        scaled = [None if x is None else x.mul_(grad_loss) for x in (g.hidden_NH, g.weight_VH, g.bias_V)]
        return *(None if x is None else x.to(dtype) for x, dtype in zip(scaled, ctx.dtypes, strict=True)), None


@dataclass
class _Gradients:
    hidden_NH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None

    @classmethod
    def zeros(
        cls, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, *, needed: Sequence[bool]
    ) -> "_Gradients":
        def wide(x: Tensor | None, need: bool) -> Tensor | None:
            return torch.zeros_like(x, dtype=compute_dtype(x)) if x is not None and need else None

        # A row of hidden is written once; the others sum over chunks, which 16 bits would round away.
        hidden = torch.zeros_like(hidden_NH) if needed[0] else None
        return cls(hidden, wide(weight_VH, needed[1]), wide(bias_V, needed[2]))

    def add(self, chunk: slice, grad_x_nV: Tensor, hidden_nH: Tensor, head: Projection) -> None:
        columns = slice(grad_x_nV.shape[-1])
        if self.hidden_NH is not None:
            self.hidden_NH[chunk] = grad_x_nV @ head.weight_VH
        if self.weight_VH is not None:
            total = self.weight_VH[columns]
            if total.dtype == grad_x_nV.dtype:
                total.addmm_(grad_x_nV.T, hidden_nH)
            else:  # in blocks of tokens, so that the 16-bit product stays in cache and no second [V, H] exists
                for block in _chunks(len(total), 4096):
                    total[block].add_(grad_x_nV.T[block] @ hidden_nH)
        if self.bias_V is not None:
            self.bias_V[columns] += grad_x_nV.sum(0, dtype=self.bias_V.dtype)


@dataclass
class _Loop:
    """One pass over the chunks: sums the losses and the metrics, and the gradients if asked for."""

    parts: Sequence[Part]
    head: Projection
    hidden_NH: Tensor
    chunk_tokens: int
    vocab_size: int | None
    norms: bool = False
    sums: Tensor = field(init=False)  # [K]
    squared_norms: Tensor = field(init=False)  # [K]
    metric_sums: list[dict[str, Tensor]] = field(init=False)
    row_losses: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.sums = self.hidden_NH.new_zeros(len(self.parts), dtype=compute_dtype(self.head.weight_VH))
        self.squared_norms = torch.zeros_like(self.sums)
        self.metric_sums = [{} for _ in self.parts]
        # Made at once: small tensors kept from every chunk would fragment the memory that its large ones leave.
        self.row_losses = [self.sums.new_zeros(len(part.teacher)) for part in self.parts]

    @torch.no_grad()
    def run(self, gradients: _Gradients | None) -> Tensor:
        total = self.sums.new_zeros(())
        with torch.autocast(self.hidden_NH.device.type, enabled=False):  # head and rows already have its dtype
            for chunk in _chunks(len(self.hidden_NH), self.chunk_tokens):
                total += self._chunk(chunk, gradients)
        return total

    def _chunk(self, chunk: slice, gradients: _Gradients | None) -> Tensor:
        """The only frame that holds [n, V] tensors: they are freed before the next chunk begins."""
        hidden_nH = self.hidden_NH[chunk].to(self.head.weight_VH.dtype)
        x_nV = self.head.matmul(hidden_nH).requires_grad_(gradients is not None)
        with torch.set_grad_enabled(gradients is not None):
            student_logits_nV = self.head.rescale(x_nV)
            losses = [self._part(k, chunk, student_logits_nV) for k in range(len(self.parts))]
            scaled = [x if part.scale == 1.0 else x * part.scale for x, part in zip(losses, self.parts, strict=True)]
            loss = scaled[0] if len(scaled) == 1 else torch.stack(scaled).sum()
        if gradients is not None:
            if self.norms and len(scaled) > 1:
                self._note_norms(scaled, x_nV)
            (grad_x_nV,) = torch.autograd.grad(loss, x_nV)
            gradients.add(chunk, grad_x_nV, hidden_nH, self.head)
            if self.norms and len(scaled) == 1:
                self.squared_norms += self._squared_norm(grad_x_nV)
        return loss.detach()

    def _part(self, k: int, chunk: slice, student_logits_nV: Tensor) -> Tensor:
        """The weighted sum of part ``k`` over its rows in the chunk; notes its losses and metrics."""
        part = self.parts[k]
        start, stop = _bounds(part, len(self.hidden_NH))
        first, last = max(chunk.start, start), max(min(chunk.stop, stop), max(chunk.start, start))
        if first == last and len(self.hidden_NH):  # none of its rows is here
            return student_logits_nV.new_zeros((), dtype=self.sums.dtype) + 0 * student_logits_nV[:0].sum()
        part_rows = slice(first - start, last - start)
        whole = (first, last) == (chunk.start, chunk.stop)
        logits_nV = student_logits_nV if whole else student_logits_nV[first - chunk.start : last - chunk.start]
        teacher_args = part.teacher.chunk(part_rows, self.vocab_size)
        losses_n = part.objective(logits_nV, *teacher_args)
        self.row_losses[k][part_rows] = losses_n.detach()
        if part.weights_N is not None:
            losses_n = losses_n * part.weights_N[part_rows].detach()
        loss = losses_n.sum()
        self.sums[k] += loss.detach()
        if part.metrics is not None:
            sums = self.metric_sums[k]
            for name, values_n in part.metrics(logits_nV.detach(), *teacher_args).items():
                if part.weigh_metrics and part.weights_N is not None:
                    values_n = values_n * part.weights_N[part_rows]
                total = values_n.sum(dtype=torch.float64)
                sums[name] = sums[name] + total if name in sums else total
        return loss

    def _note_norms(self, losses: Sequence[Tensor], x_nV: Tensor) -> None:
        for k, loss in enumerate(losses):
            (grad_x_nV,) = torch.autograd.grad(loss, x_nV, retain_graph=True)
            self.squared_norms[k] += self._squared_norm(grad_x_nV)

    def _squared_norm(self, grad_x_nV: Tensor) -> Tensor:
        return (grad_x_nV @ self.head.weight_VH).float().square().sum()


def _chunks(rows: int, chunk_tokens: int) -> Iterator[slice]:
    """Slices of at most chunk_tokens rows; if there are none, an empty one: each metric gets its 0."""
    for start in range(0, max(rows, 1), chunk_tokens):
        yield slice(start, min(start + chunk_tokens, rows))


def _check(
    hidden_NH: Tensor,
    lm_head: nn.Linear,
    rows: TeacherRows,
    chunk_tokens: int,
    vocab_size: int | None,
    weights_N: Tensor | None,
) -> None:
    if chunk_tokens < 0:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1, or 0 to go by the bytes of a row")
    if len(rows) != len(hidden_NH):
        raise ValueError(
            f"the student has {len(hidden_NH)} hidden rows, the teacher {len(rows)} rows: both must speak of "
            "the same tokens"
        )
    if weights_N is not None and weights_N.shape != hidden_NH.shape[:1]:
        raise ValueError(f"weights_N has shape {tuple(weights_N.shape)}; it needs one weight for {len(hidden_NH)} rows")
    for side, width in (("student", lm_head.weight.shape[0]), ("teacher", rows.width)):
        if vocab_size is not None and width is not None and not 1 <= vocab_size <= width:
            raise ValueError(
                f"vocab_size is {vocab_size}, but the {side} has {width} logit columns; set it to the "
                "tokenizer's size, or to the smaller of the two widths"
            )
