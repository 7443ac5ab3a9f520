"""What is said of a run's memory before anything is loaded: a table for the doctor, a line or an error for a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmdistill.errors import UserError
from llmdistill.preflight.estimate import GIB, Estimate, launched_zero, of_recipe
from llmdistill.preflight.machine import device_memory
from llmdistill.recipe.launches import asks_for_fsdp, launched_processes

if TYPE_CHECKING:
    from rich.table import Table

    from llmdistill.recipe.command_line import Recipe


def foreseen(
    recipe: Recipe, *, gpus: int | None = None, zero: int | None = None, gpu_gib: float | None = None
) -> tuple[Estimate, int] | None:
    """The estimate and the bytes of the device; None where a model's config cannot be had, which loading will say.

    Args:
        gpus, zero, gpu_gib: of the machine that is meant, where that is not this one.
    """
    gpu = gpu_gib is not None or recipe.args.device.type == "cuda"
    there = int(gpu_gib * GIB) if gpu_gib is not None else device_memory(recipe.args.device)
    try:
        estimate = of_recipe(
            recipe,
            processes=gpus or launched_processes(),
            zero=launched_zero() if zero is None else zero,
            device_bytes=there if gpu else 0,
            gpu=gpu,
        )
    except (OSError, ValueError, AttributeError, TypeError):  # no config, or of a model that is not as others are
        return None
    return estimate, there


def too_large(recipe: Recipe) -> str | None:
    """A line about an estimate above the device's memory, with what to lower; None where it fits.

    Raises:
        UserError: weights and optimizer alone are above it, and nothing shares or offloads them.
    """
    found = foreseen(recipe)
    if found is None or found[0].peak <= found[1]:
        return None
    estimate, there = found
    place = "the GPU" if recipe.args.device.type == "cuda" else "this process"
    shared = launched_zero() or asks_for_fsdp()
    if estimate.fixed > there and not shared and "memory" not in recipe.flags.skip_checks:
        raise UserError(
            f"weights and optimizer alone take about {estimate.fixed / GIB:.1f} GiB, {place} has {there / GIB:.1f}. "
            f"Fix: {estimate.to_lower()}; --skip-check memory goes on."
        )
    return (
        f"this run takes about {estimate.peak / GIB:.1f} GiB at its fullest ({estimate.at}), {place} has "
        f"{there / GIB:.1f}. Fix: {estimate.to_lower()}."
    )


def table(estimate: Estimate, there: int) -> Table:
    """The doctor's."""
    from rich.table import Table

    shown = Table("item", "GiB", title="memory of a device at its fullest, estimated from the recipe")
    for name, size in estimate.items.items():
        shown.add_row(name, f"{size / GIB:.2f}")
    shown.add_section()
    shown.add_row(f"peak ({estimate.at})", f"{estimate.peak / GIB:.2f} of {there / GIB:.1f}")
    up, down = estimate.wire
    if down:
        shown.add_row("over the wire, a step of a process", f"{up / 1e6:.1f} MB up, {down / 1e6:.1f} MB down")
    if estimate.peak > there:
        shown.add_row("to lower it", estimate.to_lower())
    return shown
