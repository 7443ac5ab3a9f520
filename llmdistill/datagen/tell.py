"""What a step did, for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from llmdistill.errors import UserError
from llmdistill.record.manifest import Manifest


def told(work: Callable[[], Manifest]) -> int:
    """Does a step, prints what it read, lost and wrote, and returns the exit status: 2 with one line for an error."""
    try:
        manifest = work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in summary(manifest):
        print(line)
    return 0


def summary(manifest: Manifest) -> list[str]:
    """Lines: the counts, then each reason with its rows, the commonest first."""
    counts: Mapping[str, Any] = manifest.counts
    head = f"{manifest.step}: {counts.get('read', 0):,} rows read, {counts.get('written', 0):,} written"
    if counts.get("rejected"):
        head += f", {counts['rejected']:,} rejected"
    reasons = sorted(manifest.lost.items(), key=lambda item: (-item[1], item[0]))
    outputs = [f"  -> {file}" for file in manifest.outputs]
    return [head, *(f"  {rows:>9,}  {reason}" for reason, rows in reasons), *outputs]
