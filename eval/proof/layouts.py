"""One trajectory in every layout, and from each to each: launches two CPU processes (gloo) and writes layouts.md.

    python -m eval.proof.layouts [--folder FOLDER] [--cells opd,taid] [--layouts zero3,fsdp2]

One process trains every cell first; then every layout trains it too, and of two cells goes on from the checkpoint in
the middle that each other layout wrote. 10 minutes or more on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from eval.perf.record import commit, machine, versions
from tests.distributed.launching import begin, end
from tests.distributed.layouts_worker import CROSSED

WORKER = "tests.distributed.layouts_worker"
LAYOUTS = ("one_process", "two_processes", "zero1", "zero2", "zero3", "fsdp2")
CELLS = ("opd", "opd_lora", "taid", "taid_lora", "redi", "redi_lora", "two_terms", "two_terms_lora", "sharded_teacher")
SAMPLED_BY_VLLM = ("vllm", "vllm_lora")
WITH_VLLM = ("one_process", "two_processes", "zero3", "fsdp2")
TIME_LIMIT = 3600.0  # seconds a launch


def launched(folder: Path, layout: str, cells: tuple[str, ...], others: list[str], into: str = "") -> dict[str, Any]:
    """What a launch found: {cell/run: its numbers and its weights}."""
    out = folder / (into or layout)
    words = ("-m", WORKER, str(out), ",".join(cells), *(str(folder / other) for other in others))
    end(begin(layout, *words), TIME_LIMIT)
    found: dict[str, Any] = json.loads((out / "found.json").read_text())
    return {key: {**v, "weights": torch.load(out / f"{key.replace('/', '-')}.pt")} for key, v in found.items()}


def distance(found: dict[str, Any], alone: dict[str, Any]) -> float:
    """The largest relative difference of losses and norms of gradients, step by step, and of weights in the end."""
    expected = alone["lines"][found["began"] :]
    assert len(expected) == len(found["lines"]) > 0
    numbers = [
        abs(line[name] - other[name]) / max(1.0, abs(other[name]))
        for line, other in zip(found["lines"], expected, strict=True)
        for name in ("loss", "grad_norm")
    ]
    assert found["weights"].keys() == alone["weights"].keys()
    moved = [float((found["weights"][n] - w).abs().max()) for n, w in alone["weights"].items()]
    return max(*numbers, *moved)


def measured(folder: Path, layouts: tuple[str, ...], cells: tuple[str, ...]) -> dict[tuple[str, str, str], float]:
    """(layout, cell, where it began: ``undisturbed``, or another layout) -> how far it is from one process."""
    sampled = tuple(cell for cell in SAMPLED_BY_VLLM if cell in cells)
    plain = tuple(cell for cell in cells if cell not in sampled)
    alone = launched(folder, "one_process", plain, [])
    seen: dict[tuple[str, str, str], float] = {}

    def note(layout: str, found: dict[str, Any], reference: dict[str, Any]) -> None:
        for key, value in found.items():
            cell, began_from = key.split("/")
            assert value["processes"] == (1 if layout == "one_process" else 2)
            assert value["share"] < 0.6 or layout not in ("zero3", "fsdp2")  # every weight is cut in two
            seen[layout, cell, began_from] = distance(value, reference[f"{cell}/undisturbed"])
            print(f"{layout}: {cell}, {began_from}: {seen[layout, cell, began_from]:.1e}", flush=True)

    before = ["one_process"]
    for layout in layouts:
        if layout != "one_process":
            note(layout, launched(folder, layout, plain, before), alone)
            before.append(layout)
    for i, layout in enumerate(before[:-1]):  # from those that came after it
        crossed = tuple(cell for cell in plain if cell in CROSSED)
        note(layout, launched(folder, layout, crossed, before[i + 1 :], f"{layout}-again"), alone)
    if sampled:
        first = launched(folder, "one_process", sampled, [], "one_process-vllm")
        for layout in layouts:
            if layout in WITH_VLLM[1:]:
                note(layout, launched(folder, layout, sampled, [], f"{layout}-vllm"), first)
    return seen


def page(seen: dict[tuple[str, str, str], float]) -> str:
    """The table, as Markdown."""
    lines = [
        "# One trajectory in every layout",
        "",
        "Largest relative difference from one process: losses and norms of gradients of four steps, weights in the end",
        "(float32, two CPU processes over gloo; `python -m eval.proof.layouts`). A row that is not `undisturbed` was",
        "resumed after two steps from that layout's checkpoint: weights, AdamW's moments, schedule. The teacher of",
        "`sharded_teacher` has `placement: sharded`; `vllm` samples with vLLM, greedily.",
        "",
        f"Commit {commit()}; {machine()}; {versions()}.",
        "",
    ]
    cells = list(dict.fromkeys(cell for _, cell, _ in seen))
    rows = list(dict.fromkeys((layout, began) for layout, _, began in seen))
    lines += [f"| layout | from | {' | '.join(cells)} |", "|---" * (len(cells) + 2) + "|"]
    for layout, began in rows:
        values = (seen.get((layout, cell, began)) for cell in cells)
        lines.append(f"| {layout} | {began} | {' | '.join('' if v is None else f'{v:.0e}' for v in values)} |")
    return "\n".join([*lines, "", f"The largest of all: {max(seen.values()):.1e}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="", help="where runs are kept; empty: nowhere")
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--cells", default=",".join((*CELLS, *SAMPLED_BY_VLLM)))
    parser.add_argument("--page", default=str(Path(__file__).with_suffix(".md")))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        seen = measured(
            Path(options.folder or temporary), tuple(options.layouts.split(",")), tuple(options.cells.split(","))
        )
    Path(options.page).write_text(page(seen))


if __name__ == "__main__":
    main()
