"""What a chain of data steps with real models took, lost and gained: a page, a plot and the numbers, from its manifests.

llmdistill data run recipes/data/worked_sums.yaml && python eval/proof/datagen.py --commit "$(git rev-parse --short HEAD)"
llmdistill data run recipes/data/imitate_explore_improve.yaml
python eval/proof/datagen.py --loop runs/data/improve --commit "$(git rev-parse --short HEAD)"

Each keeps what the other has written; ``notes`` in datagen.json are by hand.
"""  # noqa: E501 - a command is one line

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmdistill.record.manifest import read_manifest

HERE = Path(__file__).parent
CHAIN = ("traces.jsonl", "verify.jsonl", "split.jsonl", "decontaminate.jsonl", "build_pairs.jsonl", "curate.jsonl")
LOOP = ("shown.jsonl", "curate.jsonl", "imitate.json")  # before the rounds, and in each of them:
ROUND = ("generate.jsonl", "verify.jsonl", "split.jsonl", "curate.jsonl", "build_pairs.jsonl", "train.json")
MEASURED = (("before", "data/quickstart/teacher"), ("after redi", "redi/student"), ("after opd", "opd/student"))


def steps_of(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """What each step took and lost."""
    steps = []
    for name in names:
        made = read_manifest(folder / name)
        if made is None:
            raise SystemExit(f"{folder / name} is not there: run the recipe first")
        told = {"lost": made.lost, "seconds": made.seconds, "verdicts": made.details.get("verdicts", {})}
        steps.append({"step": name.partition(".")[0], **made.counts, **told})
    return steps


def loop(folder: Path) -> dict[str, Any]:
    """The steps before the rounds and in each of them, and what every student was worth on held-out prompts."""
    rounds = sorted(folder.glob("round-*"))
    steps = steps_of(folder, LOOP) + [
        {**step, "step": f"{one.name}/{step['step']}"} for one in rounds for step in steps_of(one, ROUND)
    ]
    compared = read_manifest(rounds[-1] / "compare_teachers.md")
    assert compared is not None
    return {
        "steps": steps,
        "prompts": compared.details["prompts"],
        "heldout": {_student(path): told for path, told in compared.details["teachers"].items()},
        "differences": compared.details["differences"],
    }


def _student(path: str) -> str:
    """Which student of a loop a folder has."""
    made_by = Path(path).parts[-2] if path.endswith("student") else ""
    return {"": "before", "imitate": "after imitation"}.get(made_by, f"after {Path(path).parts[-3]}")


def numbers(folder: Path) -> dict[str, Any]:
    """The chain's steps, and the share of right answers on held-out prompts with its interval."""
    steps = steps_of(folder, (*CHAIN, "redi.json", "opd.json"))
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
    lines += table(found["steps"])
    lines += [
        "",
        "Right on the 48 held-out prompts, 4 samples each, without examples (95 % intervals over prompts):",
        "",
    ]
    lines += [*worth(found["heldout"]), "", "![right answers on held-out prompts](datagen.svg)"]
    if "loop" in found:
        lines += loop_lines(found["loop"])
    for title, notes in found.get("notes", {}).items():
        lines += ["", f"## {title}", "", *notes]
    return "\n".join(lines) + "\n"


def table(steps: list[dict[str, Any]]) -> list[str]:
    """A row a step."""
    lines = ["| step | read | written | left out | seconds |", "|---|---|---|---|---|"]
    for step in steps:
        lost = "; ".join(f"{n:,} {reason}" for reason, n in step["lost"].items())
        written = f"{step['written']:,}" if "written" in step else ""
        lines.append(f"| {step['step']} | {step['read']:,} | {written} | {lost} | {step['seconds']:,.0f} |")
    return lines


def worth(heldout: dict[str, Any]) -> list[str]:
    """A row a student."""
    lines = ["| student | right | ended by itself |", "|---|---|---|"]
    for name, t in heldout.items():
        low, high = t["right"]["interval"]
        lines.append(f"| {name} | {t['right']['mean']:.1%} [{low:.1%}, {high:.1%}] | {t['finished']:.1%} |")
    return lines


def loop_lines(found: dict[str, Any]) -> list[str]:
    """Imitate, explore, improve."""
    made = f"`recipes/data/imitate_explore_improve.yaml`, {found['machine']}, commit {found['commit']}."
    lines = [
        "",
        "## Imitate, explore, improve",
        "",
        made,
        "The same models; one run, one seed.",
        "",
        *table(found["steps"]),
    ]
    judged = [step for step in found["steps"] if step["verdicts"]]
    right = "; ".join(f"{s['step']} {s['verdicts'].get('right', 0)} of {s['written']}" for s in judged)
    asked = f"Right on the {found['prompts']} held-out prompts, 4 samples each (95 % intervals over prompts):"
    lines += ["", f"Right among the traces: {right}.", "", asked, "", *worth(found["heldout"]), ""]
    lines += ["| prompt by prompt | difference | 95 % interval | p |", "|---|---|---|---|"]
    for pair, d in found["differences"].items():
        a, b = (_student(side) for side in pair.split(" - "))
        lines.append(
            f"| {a} - {b} | {d['difference']:+.1%} | {d['low']:+.1%} to {d['high']:+.1%} | {d['p_value']:.3f} |"
        )
    return lines


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
    parser.add_argument("--loop", type=Path, help="folder of a recipe with rounds, in place of the chain")
    words = parser.parse_args()
    file, said = HERE / "datagen.json", {"machine": words.machine, "commit": words.commit}
    before = json.loads(file.read_text()) if file.is_file() else {}
    found = (
        {**before, "loop": {**said, **loop(words.loop)}} if words.loop else {**before, **said, **numbers(words.folder)}
    )
    file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    (HERE / "datagen.md").write_text(page(found, found["machine"], found["commit"]))
    (HERE / "datagen.svg").write_text(plot(found["heldout"]))


if __name__ == "__main__":
    main()
