"""Curation of published traces, counted once by llmdistill.datagen and once by this script's own few lines.

    python eval/proof/curation.py --traces mip_traces.jsonl.gz gsm8k_gpt3_solutions.jsonl.gz

The second count shares no code with the first: rules are written again from their description, pass rates and exact
duplicates with dictionaries, near duplicates by the exact Jaccard similarity of all pairs that share a run of words.
Prints a table; exit status 1 where a count differs that must not (near duplicates are estimated: shares are told).
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
import tempfile
import unicodedata
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from llmdistill.datagen.curation import curate
from llmdistill.datagen.tables import read_rows, write_rows

CHAIN: list[Any] = [
    "finished",
    "structured",
    "no_loops",
    "one_writing_system",
    {"pass_rate": {"least": 0.2, "most": 0.99}},
    "right",
    {"characters": {"least": 100, "most": 20000}},
    "exact_duplicates",
    {"shortest": {"k": 3}},
]


def traces(file: Path) -> list[dict[str, Any]]:
    """Published rows in the columns of a trace."""
    made = []
    for line in gzip.decompress(file.read_bytes()).splitlines():
        row = json.loads(line)
        thought = f"<think>\n{row['thinking']}\n</think>\n\n" if row.get("thinking") else ""
        made.append(
            {
                "id": row["id"],
                "prompt": row["problem"],
                "completion": thought + row["response"],
                "passed": row["correct"],
                "finish": "stop" if row.get("finished", True) else "length",
                "teacher": row["teacher"],
            }
        )
    return made


# ------------------------------------------------------------------ the second count


def loops(text: str) -> bool:
    last = text.split()[-200:]
    fours = [tuple(last[i : i + 4]) for i in range(len(last) - 3)]
    if len(last) >= 40 and len(set(fours)) < 0.3 * len(fours):
        return True
    tail = text.encode("utf-8", "replace")[-2000:]
    if len(tail) >= 500 and len(zlib.compress(tail, 1)) < 0.12 * len(tail) and re.search(r"\w", text[-2000:]):
        return True
    words = text.split()
    if len(words) < 64:
        return False
    first = {}
    repeated = [False] * len(words)
    for i in range(len(words) - 7):
        run = " ".join(words[i : i + 8])
        if run in first:
            repeated[i : i + 8] = [True] * 8
        first.setdefault(run, i)
    return sum(repeated) > 0.2 * len(words)


def structured(text: str) -> bool:
    if not text.strip():
        return False
    if "<think>" not in text and "</think>" not in text:
        return True
    found = re.fullmatch(r"\s*(?:<think>)?((?:(?!</?think>).)*)</think>((?:(?!</?think>).)*)", text, re.S)
    return bool(found and found[2].strip())


def systems(text: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    for c in text:
        if c.isalpha():
            name = unicodedata.name(c, "OTHER")
            kind = name.split()[0].split("-")[0]
            if kind in ("FULLWIDTH", "MATHEMATICAL", "DOUBLE", "SCRIPT", "FEMININE", "MASCULINE", "SUPERSCRIPT"):
                kind = "LATIN"
            counts["GREEK" if kind == "MICRO" else kind] += 1
    del counts["GREEK"]
    return counts


def mixes(text: str, prompt: str) -> bool:
    counts = systems(text)
    if not counts:
        return False
    allowed = {counts.most_common(1)[0][0], "LATIN", *systems(prompt)}
    return sum(n for name, n in counts.items() if name not in allowed) > 0.05 * counts.total()


def second_count(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    left, after = rows, []

    def keep(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        after.append((name, len(rows)))
        return rows

    left = keep("finished", [r for r in left if r["finish"] == "stop"])
    left = keep("structured", [r for r in left if structured(r["completion"])])
    left = keep("no_loops", [r for r in left if not loops(r["completion"])])
    left = keep("one_writing_system", [r for r in left if not mixes(r["completion"], r["prompt"])])
    rates = defaultdict(list)
    for r in left:
        rates[r["prompt"]].append(r["passed"])
    left = keep("pass_rate", [r for r in left if 0.2 <= sum(rates[r["prompt"]]) / len(rates[r["prompt"]]) <= 0.99])
    left = keep("right", [r for r in left if r["passed"]])
    left = keep("characters", [r for r in left if 100 <= len(r["completion"]) <= 20000])
    once: dict[tuple[str, str], dict[str, Any]] = {}
    for r in left:
        once.setdefault((r["prompt"], re.sub(r"\s+", " ", r["completion"]).strip()), r)
    left = keep("exact_duplicates", list(once.values()))
    groups = defaultdict(list)
    for r in left:
        groups[r["prompt"]].append(len(r["completion"]))
    keep("shortest", [{} for lengths in groups.values() for _ in sorted(lengths)[:3]])
    return after


def near_pairs(texts: list[str], threshold: float) -> int:
    """How many texts have an earlier one of at least this exact similarity, in runs of 5 words."""
    runs = []
    for text in texts:
        text = unicodedata.normalize("NFKC", text).lower()
        words = re.findall(r"[+\-*/=<>^%×÷−·≤≥]|\d+|[^\W\d_]+", text)
        runs.append({tuple(words[i : i + 5]) for i in range(max(len(words) - 4, 1))})
    holders = defaultdict(list)
    found = 0
    for i, mine in enumerate(runs):
        shared = Counter(j for run in mine for j in holders[run])
        found += any(n / len(mine | runs[j]) >= threshold for j, n in shared.items())
        for run in mine:
            holders[run].append(i)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", nargs="+", type=Path, required=True, metavar="FILE", help=".jsonl.gz of traces")
    differs = False
    for file in parser.parse_args().traces:
        rows = traces(file)
        with tempfile.TemporaryDirectory() as folder:
            source, out, near = (Path(folder) / f"{name}.jsonl" for name in ("in", "out", "near"))
            write_rows(source, rows)
            manifest = curate(source, out, steps=CHAIN)
            first = [(rule["rule"], rule["left"]) for rule in manifest.details["rules"]]
            gone = sum(curate(source, near, steps=["near_duplicates"]).lost.values())
            assert len(list(read_rows(out))) == first[-1][1]
        second = second_count(rows)
        texts = [r["completion"] for r in rows]
        exact = (
            f"{near_pairs(texts, 0.8):,}" if sum(map(len, texts)) < 5_000_000 else "not counted (the texts are long)"
        )
        print(f"\n{file.name}: {len(rows):,} traces\n\n| rule | left | by the second count |\n|---|---|---|")
        for (name, left), (other, again) in zip(first, second, strict=True):
            assert name == other
            differs |= left != again
            print(f"| {name} | {left:,} | {again:,}{'' if left == again else ' **differs**'} |")
        print(f"\nNear duplicates at 0.8: {gone:,} rows estimated, {exact} by exact similarity.")
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
