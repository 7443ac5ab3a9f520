"""What a chain of data steps with real models took, lost and gained: a page, a plot and the numbers, from its manifests.

llmdistill data run recipes/data/worked_sums.yaml && python eval/proof/datagen.py --commit "$(git rev-parse --short HEAD)"
"""  # noqa: E501 - a command is one line

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from llmdistill.record.manifest import read_manifest

HERE = Path(__file__).parent
CHAIN = ("traces.jsonl", "verify.jsonl", "split.jsonl", "decontaminate.jsonl", "build_pairs.jsonl", "curate.jsonl")
MEASURED = (("before", "data/quickstart/teacher"), ("after redi", "redi/student"), ("after opd", "opd/student"))


def numbers(folder: Path) -> dict[str, Any]:
    """The chain's steps, and the share of right answers on held-out prompts with its interval."""
    steps = []
    for name in (*CHAIN, "redi.json", "opd.json"):
        made = read_manifest(folder / name)
        if made is None:
            raise SystemExit(f"{folder / name} is not there: run the recipe first")
        steps.append({"step": name.partition(".")[0], **made.counts, "lost": made.lost, "seconds": made.seconds})
    compared = read_manifest(folder / "compare_teachers.md")
    assert compared is not None
    teachers = compared.details["teachers"]
    right = {what: next(t for name, t in teachers.items() if name.endswith(end)) for what, end in MEASURED}
    return {"steps": steps, "heldout": right, "differences": compared.details["differences"]}


def page(found: dict[str, Any], machine: str, commit: str) -> str:
    lines = [
        "# A chain of data steps with real models",
        "",
        f"`recipes/data/worked_sums.yaml`, {machine}, commit {commit}.",
    ]
    lines += ["SmolLM2-135M-Instruct in float32, one thread; every number is of one run and one seed.", ""]
    lines += ["| step | read | written | left out | seconds |", "|---|---|---|---|---|"]
    for step in found["steps"]:
        lost = "; ".join(f"{n:,} {reason}" for reason, n in step["lost"].items())
        written = f"{step['written']:,}" if "written" in step else ""
        lines.append(f"| {step['step']} | {step['read']:,} | {written} | {lost} | {step['seconds']:,.0f} |")
    lines += [
        "",
        "Right on the 48 held-out prompts, 4 samples each, without examples (95 % intervals over prompts):",
        "",
    ]
    lines += ["| student | right | ended by itself |", "|---|---|---|"]
    for name, t in found["heldout"].items():
        low, high = t["right"]["interval"]
        lines.append(f"| {name} | {t['right']['mean']:.1%} [{low:.1%}, {high:.1%}] | {t['finished']:.1%} |")
    return "\n".join([*lines, "", "![right answers on held-out prompts](datagen.svg)"]) + "\n"


def plot(heldout: dict[str, Any]) -> str:
    """Bars with intervals, 0 to 60 %."""
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 420 240" font-family="sans-serif" font-size="12">']
    for value in (0, 20, 40, 60):
        y = 200 - 3 * value
        parts.append(
            f'<path d="M50 {y}H400" stroke="#ddd"/><text x="44" y="{y + 4}" text-anchor="end">{value} %</text>'
        )
    for i, (name, told) in enumerate(heldout.items()):
        x, (low, high) = 80 + 110 * i, told["right"]["interval"]
        height = 300 * told["right"]["mean"]
        parts.append(f'<rect x="{x}" y="{200 - height:.1f}" width="60" height="{height:.1f}" fill="#4477aa"/>')
        parts.append(
            f'<path d="M{x + 30} {200 - 300 * low:.1f}V{200 - 300 * high:.1f}" stroke="#222" stroke-width="2"/>'
        )
        parts.append(f'<text x="{x + 30}" y="220" text-anchor="middle">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/data/worked_sums"))
    parser.add_argument("--machine", default="two AMD EPYC cores, with other work on them")
    parser.add_argument("--commit", required=True)
    words = parser.parse_args()
    found = numbers(words.folder)
    (HERE / "datagen.json").write_text(
        json.dumps({"machine": words.machine, "commit": words.commit, **found}, indent=1) + "\n"
    )
    (HERE / "datagen.md").write_text(page(found, words.machine, words.commit))
    (HERE / "datagen.svg").write_text(plot(found["heldout"]))


if __name__ == "__main__":
    main()
