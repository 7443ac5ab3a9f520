"""Run by test_triton_rows.py in a process with triton: `interpret` on CPU tensors, `lower` for GPUs nobody has here.

Exits with an AssertionError that says which case differs.
"""

import os
import sys
from functools import partial

import torch
from objective_cases import INF, logits, value_and_grad
from torch import nn

from llmdistill.objectives import divergences
from llmdistill.objectives.accelerated import KERNELS
from llmdistill.objectives.divergences import f_divergence
from llmdistill.objectives.rows import HiddenRows
from llmdistill.objectives.streaming import streamed

# Every branch of the kernels, and the limits at which a divergence is another one.
LOSSES = {
    "forward_kl": divergences.forward_kl,
    "reverse_kl": divergences.reverse_kl,
    "jsd": partial(divergences.jsd, beta=0.3),
    "skew_forward_kl": divergences.skew_forward_kl,
    "skew_reverse_kl": divergences.skew_reverse_kl,
    "total_variation": divergences.total_variation,
    "triangular": partial(f_divergence, name="triangular"),
    "jeffreys": partial(f_divergence, name="jeffreys_sum"),
    "power 2": partial(f_divergence, name="pearson_chi2"),
    "power -.5": partial(f_divergence, name="alpha_-0.5"),
    "jsd 0": partial(divergences.jsd, beta=0.0),
}
# rows, columns, dtype, temperature, columns at -inf; 5,000 columns are two tiles, the last of them not full.
SHAPES = [
    (2, 257, torch.bfloat16, 0.7, True),
    (1, 5000, torch.float32, 1.0, True),
]


def main_interpret() -> None:
    for name, loss in LOSSES.items():
        for n, columns, dtype, temperature, holes in SHAPES:
            student, teacher = logits(1, n, columns + 3, dtype=dtype), logits(2, n, columns + 3, dtype=dtype)
            student, teacher = student[:, :columns], teacher[:, :columns]  # rows that do not lie side by side
            if holes:
                student[:, ::3], teacher[:, ::3], teacher[:, 1] = -INF, -INF, -INF
            check(name, partial(loss, teacher_logits=teacher, temperature=temperature), student)
    check_streamed()
    student = logits(1, 2, 3, 11)  # leading dimensions, and no rows at all
    check("leading", partial(divergences.reverse_kl, teacher_logits=logits(2, 2, 3, 11)), student)
    check("empty", partial(divergences.reverse_kl, teacher_logits=student[:0, 0]), student[:0, 0])


def check(name, loss, student) -> None:
    """Equal in value and gradient, NaN and infinity included. A float32 sum of 5,000 terms is good to 1e-5; a gradient
    in 16 bits to its last place; TV's jumps where the two sides agree to rounding."""
    found, expected = by("triton", loss, student), by("pytorch", loss, student)
    limits = (1e-5, 1 / 128 if student.dtype == torch.bfloat16 else 1e-3 if name == "total_variation" else 1e-5)
    for what, ours, theirs, limit in zip(("value", "gradient"), found, expected, limits, strict=True):
        where = f"{name}, {tuple(student.shape)} {student.dtype}: {what}"
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, where
        if student.numel():
            scale = theirs[theirs.isfinite()].abs().max() if theirs.isfinite().any() else 1.0
            torch.testing.assert_close(
                ours, theirs, rtol=limit, atol=float(limit * scale), equal_nan=True, msg=lambda m, w=where: f"{w}: {m}"
            )


def by(road, loss, student):
    os.environ[KERNELS] = road
    return value_and_grad(loss, student)


def check_streamed() -> None:
    """The engine with softcap, scale, weights of which some are 0, a vocabulary cut and a shorter last chunk."""
    torch.manual_seed(0)
    head, teacher_head = nn.Linear(6, 40), nn.Linear(6, 37)
    weights = logits(3, 7).abs() * (torch.arange(7) % 3 > 0)
    results = []
    for road in ("triton", "pytorch"):
        os.environ[KERNELS] = road
        hidden = logits(0, 7, 6).requires_grad_()
        teacher = HiddenRows(logits(7, 7, 6), teacher_head, logit_scale=0.5, softcap=4.0)
        options = dict(chunk_tokens=4, logit_scale=2.0, softcap=5.0, vocab_size=33, weights_N=weights)
        loss, _ = streamed(divergences.jsd, hidden, head, teacher, **options)
        results.append((loss, *torch.autograd.grad(loss, [hidden, head.weight, head.bias])))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def main_lower() -> None:
    """Every branch passes Triton's own type rules, which the interpreter does not know; one goes all the way to code
    for an A100 and an H100."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile, make_backend

    from llmdistill.objectives import triton_rows

    pointers = {
        triton_rows._forward: {"student": "*bf16", "teacher": "*bf16", "value": "*fp32", "stats": "*fp32"},
        triton_rows._backward: {
            **{"student": "*bf16", "teacher": "*bf16", "stats": "*fp32", "grad_value": "*fp32"},
            "grad": "*bf16",
        },
    }
    backend = make_backend(GPUTarget("cuda", 80, 32))
    options, context = backend.parse_options({}), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    kinds = ["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation", "triangular"]
    for kernel, types in pointers.items():
        rest = {name: "constexpr" if name in ("KIND", "TILE") else "i64" for name in kernel.arg_names}
        rest |= {"columns": "i32", "a": "fp32", "scale": "fp32", "inv_temperature": "fp32"}
        for kind in [*kinds, "jeffreys", "power"]:
            source = ASTSource(kernel, {**rest, **types}, {"KIND": kind, "TILE": triton_rows.TILE})
            parts = (backend.get_codegen_implementation(options), backend.get_module_map())
            source.make_ir(GPUTarget("cuda", 80, 32), options, *parts, context)
        for capability in (80, 90) if kernel is triton_rows._backward else (90,):
            source = ASTSource(kernel, {**rest, **types}, {"KIND": "reverse_kl", "TILE": triton_rows.TILE})
            made = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": triton_rows.WARPS})
            assert len(made.asm["cubin"]) > 1000


if __name__ == "__main__":
    {"interpret": main_interpret, "lower": main_lower}[sys.argv[1]]()
