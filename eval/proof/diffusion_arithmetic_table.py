"""The table and the plot of diffusion_arithmetic.json."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEAD = """# A masked diffusion model on arithmetic: SFT, TraceRL, MCD

    OMP_NUM_THREADS=1 python eval/proof/diffusion_arithmetic.py --seeds {seeds}

Two-digit additions with every column written out (eval/arena/task.py), in blocks of 4 tokens; a Llama of 48 x 2 layers
with bidirectional attention inside blocks, from nothing, float32, one thread of two cores that other work shared. SFT
is on text whose answer is wrong in two of five rows, TraceRL is rewarded for right ones; MCD is on what the reinforced
model writes at temperature 1, and so is its control, as many steps of SFT. Exact answers in percent on {heldout}
held-out problems, and forward passes per answer with the block cache; of several seeds means, and in brackets one by
one.
"""
COLOURS = {0.0: "#0072b2", 1.0: "#009e73", 4.0: "#d55e00"}


def cell(values: Sequence[float], percent: bool) -> str:
    scale = 100 if percent else 1
    each = ", ".join(f"{v * scale:.1f}" for v in values)
    return f"{statistics.fmean(values) * scale:.1f} ({each})" if len(values) > 1 else each


def write(results: list[dict[str, Any]], folder: Path) -> None:
    seeds = [r["seed"] for r in results]
    lines = [HEAD.format(seeds=" ".join(map(str, seeds)), heldout=results[0]["heldout"])]
    steps = " + ".join(map(str, results[0]["steps"]))
    lines.append(f"Seeds {', '.join(map(str, seeds))}; optimizer steps {steps}.\n")
    names = list(results[0]["stages"]["SFT"]["decoding"])
    lines.append("| stage | CPU s | " + " | ".join(f"{n}: exact | forwards" for n in names) + " |")
    lines.append("|---|---" + "|---|---" * len(names) + "|")
    for stage in results[0]["stages"]:
        row = [stage, cell([r["stages"][stage]["cpu_seconds"] for r in results], False)]
        for name in names:
            scores = [r["stages"][stage]["decoding"][name] for r in results]
            row += [cell([s["exact"] for s in scores], True), cell([s["forwards"] for s in scores], False)]
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", *(result["note"] for result in results if "note" in result)]
    if not all("diversity" in r for r in results):
        (folder / "diffusion_arithmetic.md").write_text("\n".join([*lines, ""]))
        return
    lines.append("\nODD on the model after SFT, two steps a block, 8 samples of 32 problems (means over seeds):\n")
    lines.append("| temperature | alpha | pass@1 | pass@8 | distinct@8 |\n|---|---|---|---|---|")
    curve = averaged(results)
    for (temperature, alpha), point in curve.items():
        numbers = " | ".join(f"{point[key]:.3f}" for key in ("pass@1", "pass@8"))
        lines.append(f"| {temperature} | {alpha:g} | {numbers} | {point['distinct@8']:.2f} |")
    lines.append(
        "\nA prompt has one right answer and one way to write it: repulsion of 4 makes texts differ, and wrong; of 1\n"
        "it costs next to nothing, and what it gains in pass@8 at temperatures of 1 and more is within chance."
    )
    lines.append("\n![pass@8 against temperature](diffusion_arithmetic.svg)\n")
    (folder / "diffusion_arithmetic.md").write_text("\n".join(lines))
    (folder / "diffusion_arithmetic.svg").write_text(plot(curve))


def averaged(results: list[dict[str, Any]]) -> dict[tuple[float, float], dict[str, float]]:
    """(temperature, alpha) -> means over seeds."""
    found: dict[tuple[float, float], list[dict[str, float]]] = {}
    for result in results:
        for point in result["diversity"]:
            found.setdefault((point["temperature"], point["alpha"]), []).append(point)
    keys = ("pass@1", "pass@8", "distinct@8")
    return {at: {key: statistics.fmean(p[key] for p in points) for key in keys} for at, points in found.items()}


def plot(curve: dict[tuple[float, float], dict[str, float]]) -> str:
    """Two panels, pass@8 and distinct texts of 8, a line for each alpha."""
    temperatures = sorted({t for t, _ in curve})
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="720" height="260" font-family="sans-serif" font-size="12">'
    ]
    for panel, (key, top) in enumerate((("pass@8", 1.0), ("distinct@8", 8.0))):
        left = 50 + panel * 340
        parts.append(f'<text x="{left}" y="20" font-weight="600">{key} against temperature</text>')
        for share in (0.0, 0.5, 1.0):
            y = 210 - 170 * share
            parts.append(f'<line x1="{left}" x2="{left + 240}" y1="{y}" y2="{y}" stroke="#e4e4e4"/>')
            parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end" fill="#555">{top * share:g}</text>')
        place = {t: left + 240 * i / (len(temperatures) - 1) for i, t in enumerate(temperatures)}
        for t, x in place.items():
            parts.append(f'<text x="{x:.0f}" y="228" text-anchor="middle" fill="#555">{t:g}</text>')
        for alpha, colour in COLOURS.items():
            points = " ".join(f"{x:.1f},{210 - 170 * curve[t, alpha][key] / top:.1f}" for t, x in place.items())
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
    for i, (alpha, colour) in enumerate(COLOURS.items()):
        name = f"ODD, alpha {alpha:g}" if alpha else "without"
        parts.append(f'<rect x="{50 + i * 120}" y="240" width="12" height="3" fill="{colour}"/>')
        parts.append(f'<text x="{66 + i * 120}" y="246">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])
