"""What a step did, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmdistill.record.manifest import Manifest


def summary(manifest: Manifest) -> list[str]:
    """Lines: the counts, then each reason with its rows, the commonest first."""
    counts: Mapping[str, Any] = manifest.counts
    head = f"{manifest.step}: {counts.get('read', 0):,} rows read"
    if "written" in counts:  # what writes a page or trains a student writes no rows
        head += f", {counts['written']:,} written"
    if counts.get("rejected"):
        head += f", {counts['rejected']:,} rejected"
    reasons = sorted(manifest.lost.items(), key=lambda item: (-item[1], item[0]))
    outputs = [f"  -> {file}" for file in manifest.outputs]
    return [head, *(f"  {rows:>9,}  {reason}" for reason, rows in reasons), *outputs]
