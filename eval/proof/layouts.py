"""One trajectory in every layout, and from each to each: launches two CPU processes (gloo) and writes layouts.md.

    python -m eval.proof.layouts [--folder FOLDER] [--cells opd,taid] [--layouts zero3,fsdp2]

One process trains every cell first; then every layout trains it too, and of two cells goes on from the checkpoint in
the middle that each other layout wrote. 10 minutes or more on two idle cores. Every difference is kept in layouts.json
as soon as it is known, and layouts.md is written from that: parts of the table can be run by themselves. In a FOLDER
that is given, launches that came to their end are not made again. ``zero3_offload`` has DeepSpeed compile its AdamW for
the CPU first, once, for some minutes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from eval.perf.record import commit, machine, versions
from tests.distributed.launching import begin, end
from tests.distributed.layouts_worker import CROSSED

WORKER = "tests.distributed.layouts_worker"
LAYOUTS = ("one_process", "two_processes", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")
CELLS = ("opd", "opd_lora", "taid", "taid_lora", "redi", "redi_lora", "two_terms", "two_terms_lora", "sharded_teacher")
IN_PARTS = ("zero3", "zero3_offload", "fsdp2")  # every weight is cut in two
SAMPLED_BY_VLLM = ("vllm", "vllm_lora")
WITH_VLLM = ("one_process", "two_processes", "zero3", "fsdp2")
TIME_LIMIT = 3600.0  # seconds a launch
RECORD = Path(__file__).with_suffix(".json")
Seen = dict[tuple[str, str, str], float]  # (layout, cell, where it began: ``undisturbed``, or another layout)


def launched(folder: Path, layout: str, cells: tuple[str, ...], others: list[str], into: str = "") -> dict[str, Any]:
    """What a launch found: {cell/run: its numbers and its weights}."""
    out = folder / (into or layout)
    words = ("-m", WORKER, str(out), ",".join(cells), *(str(folder / other) for other in others))
    if not (out / "done").exists():
        print(end(begin(layout, *words), TIME_LIMIT)[-2000:], flush=True)
        (out / "done").write_text(" ".join(cells))
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


def measured(
    folder: Path,
    layouts: tuple[str, ...],
    cells: tuple[str, ...],
    keep: Callable[[tuple[str, str, str], float], None] = lambda key, difference: None,
) -> Seen:
    """How far each cell is from one process; ``keep`` is told of every one as soon as it is known."""
    sampled = tuple(cell for cell in SAMPLED_BY_VLLM if cell in cells)
    plain = tuple(cell for cell in cells if cell not in sampled)
    alone = launched(folder, "one_process", plain, []) if plain else {}
    seen = Seen()

    def note(layout: str, found: dict[str, Any], reference: dict[str, Any]) -> None:
        for key, value in found.items():
            cell, began_from = key.split("/")
            assert value["processes"] == (1 if layout == "one_process" else 2)
            assert value["share"] < 0.6 or layout not in (
                "zero3",
                "zero3_offload",
                "fsdp2",
            )  # every weight is cut in two
            seen[layout, cell, began_from] = distance(value, reference[f"{cell}/undisturbed"])
            keep((layout, cell, began_from), seen[layout, cell, began_from])
            print(f"{layout}: {cell}, {began_from}: {seen[layout, cell, began_from]:.1e}", flush=True)

    before = ["one_process"]
    for layout in layouts:
        if layout != "one_process" and plain:
            note(layout, launched(folder, layout, plain, before), alone)
            before.append(layout)
    crossed = tuple(cell for cell in plain if cell in CROSSED)
    for i, layout in enumerate(before[:-1] if crossed else ()):  # from those that came after it
        note(layout, launched(folder, layout, crossed, before[i + 1 :], f"{layout}-again"), alone)
    if sampled:
        first = launched(folder, "one_process", sampled, [], "one_process-vllm")
        for layout in layouts:
            if layout in WITH_VLLM[1:]:
                note(layout, launched(folder, layout, sampled, [], f"{layout}-vllm"), first)
    return seen


def keep_in(record: Path) -> Callable[[tuple[str, str, str], float], None]:
    """Writes each difference into a record, with where and when it was seen."""
    where = {"commit": commit(), "machine": machine(), "versions": versions()}

    def keep(key: tuple[str, str, str], difference: float) -> None:
        entries = json.loads(record.read_text()) if record.exists() else {}
        entries["/".join(key)] = {"difference": difference, "date": f"{datetime.now(UTC):%Y-%m-%d}", **where}
        record.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")

    return keep


def in_order(names: set[str], known: tuple[str, ...]) -> list[str]:
    return sorted(names, key=lambda name: known.index(name) if name in known else len(known))


def page(entries: dict[str, dict[str, Any]]) -> str:
    """The table, as Markdown."""
    seen = {tuple(key.split("/")): entry["difference"] for key, entry in entries.items()}
    lines = [
        "# One trajectory in every layout",
        "",
        "Largest relative difference from one process: losses and norms of gradients of four steps, weights in the end",
        "(float32, two CPU processes over gloo; `python -m eval.proof.layouts`). A row that is not `undisturbed` was",
        "resumed after two steps from that layout's checkpoint: weights, AdamW's moments, schedule. The teacher of",
        "`sharded_teacher` has `placement: sharded`; `vllm` samples with vLLM, greedily.",
        "",
    ]
    for place in sorted({(e["commit"], e["date"], e["machine"], e["versions"]) for e in entries.values()}):
        lines.append(f"Commit {place[0]}, {place[1]}; {place[2]}; {place[3]}.")
    cells = in_order({cell for _, cell, _ in seen}, (*CELLS, *SAMPLED_BY_VLLM))
    lines += ["", f"| layout | from | {' | '.join(cells)} |", "|---" * (len(cells) + 2) + "|"]
    for layout in in_order({layout for layout, _, _ in seen}, LAYOUTS):
        for began in in_order({began for of, _, began in seen if of == layout}, ("undisturbed", *LAYOUTS)):
            values = (seen.get((layout, cell, began)) for cell in cells)
            lines.append(f"| {layout} | {began} | {' | '.join('' if v is None else f'{v:.0e}' for v in values)} |")
    return "\n".join([*lines, "", f"The largest of all: {max(seen.values()):.1e}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="", help="where runs are kept; empty: nowhere")
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--cells", default=",".join((*CELLS, *SAMPLED_BY_VLLM)))
    parser.add_argument("--record", default=str(RECORD), help="JSON that differences are kept in")
    options = parser.parse_args()
    record = Path(options.record)
    with tempfile.TemporaryDirectory() as temporary:
        folder, layouts = Path(options.folder or temporary), tuple(options.layouts.split(","))
        try:
            measured(folder, layouts, tuple(options.cells.split(",")), keep_in(record))
        finally:  # what one launch loses is not lost with it
            if record.exists():
                record.with_suffix(".md").write_text(page(json.loads(record.read_text())))


if __name__ == "__main__":
    main()
