"""Reads a run folder as it is: of a finished run, or of one that was killed at any moment.

What cannot be read is left out and named in ``RunData.missing``; nothing here raises for a damaged folder.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmdistill.record.run_folder import read_completions

SHOWN_COMPLETIONS = 60
COMPLETION_FILES = 4  # the newest logged steps share the places evenly; older ones fill what is left


@dataclass
class RunData:
    """What the page shows."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)  # one per log line, each with an integer step
    completions: list[dict[str, Any]] = field(default_factory=list)  # newest steps first
    missing: list[str] = field(default_factory=list)  # sentences

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of one metric."""
        found = [(line["step"], number) for line in self.metrics if (number := finite(line.get(name))) is not None]
        return [float(step) for step, _ in found], [value for _, value in found]

    def option(self, section: str, key: str) -> Any:
        """A setting of config.yaml, or None."""
        return as_dict(self.config.get(section)).get(key)

    @property
    def last_step(self) -> int:
        steps = [line["step"] for line in self.metrics]
        return max([int(finite(self.summary.get("steps")) or 0), *steps])


def load_run(path: Path) -> RunData:
    """Everything in the folder that can be read."""
    data = RunData(path)
    _read_config(data)
    data.before, data.after, data.summary = (
        _read_json(data, f"{name}.json") for name in ("before", "after", "summary")
    )
    _read_metrics(data)
    _read_completions(data)
    _explain(data)
    return data


def finite(value: Any) -> float | None:
    """``value`` as a float where it is a finite number; bools are not numbers."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _read_config(data: RunData) -> None:
    try:
        data.config_text = (data.path / "config.yaml").read_text(encoding="utf-8", errors="replace")
        data.config = as_dict(yaml.safe_load(data.config_text))
        if not data.config:
            data.missing.append("config.yaml holds no settings; it is shown as it is.")
    except OSError:
        data.missing.append("config.yaml is not there, so the settings of the run are not shown.")
    except yaml.YAMLError:
        data.missing.append("config.yaml cannot be parsed; it is shown as it is.")


def _read_json(data: RunData, name: str) -> dict[str, Any]:
    try:
        return as_dict(json.loads((data.path / name).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        data.missing.append(f"{name} cannot be parsed and is left out.")
        return {}


def _read_metrics(data: RunData) -> None:
    file, unreadable = data.path / "metrics.jsonl", 0
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        data.missing.append("metrics.jsonl is not there, so there are no curves.")
        return
    for line in filter(str.strip, lines):
        try:
            values = as_dict(json.loads(line))
        except ValueError:
            values = {}
        if isinstance(values.get("step"), int):
            data.metrics.append(values)
        else:
            unreadable += 1
    if unreadable:
        cut = "; a run that is killed cuts its last line" if unreadable == 1 else ""
        data.missing.append(f"metrics.jsonl: {unreadable} unreadable line(s) left out{cut}.")
    if not any("loss" in line for line in data.metrics):
        every = finite(data.option("train", "logging_steps"))
        hint = f" train.logging_steps is {every:g}." if every else ""
        data.missing.append(f"metrics.jsonl has no line of a training step, so there are no curves.{hint}")


def _read_completions(data: RunData) -> None:
    files = sorted((data.path / "completions").glob("step-*"), key=lambda file: file.stem, reverse=True)
    share = SHOWN_COMPLETIONS // max(1, min(len(files), COMPLETION_FILES))
    for file in files:
        places = min(share, SHOWN_COMPLETIONS - len(data.completions))
        if places < 1:
            break
        try:
            rows = read_completions(file)
        except (OSError, ValueError, ImportError):  # pyarrow's errors are one of the first two
            data.missing.append(f"completions/{file.name} cannot be read and is left out.")
            continue
        # A round is stored shortest sequence first: evenly spaced rows show all lengths.
        picks = sorted({round(i * (len(rows) - 1) / max(places - 1, 1)) for i in range(places)}) if rows else []
        data.completions += [rows[i] for i in picks]
    if not data.completions and not data.option("objective", "chosen_column"):  # pairs were there before
        data.missing.append("No logged completions (completions/), so none are shown.")


def _explain(data: RunData) -> None:
    """Why there is no before or after."""
    texts = ("student", "teacher", "dataset", "pairs")
    measured = [any(as_dict(s.get(text)) for text in texts) for s in (data.before, data.after)]
    if not any(measured) and data.config and not data.option("data", "heldout"):
        data.missing.append(
            "The run had no held-out prompts (data.heldout), so nothing was measured before and after it."
        )
        return
    if not any(measured) and (reason := data.after.get("not_measured")):
        data.missing.append(f"Nothing was measured on held-out prompts, and the teacher is only stored: {reason}")
        return
    if not measured[0]:
        data.missing.append("before.json has no measurement: the untrained student was not measured.")
    if not measured[1]:
        wanted = finite(data.option("train", "max_steps"))
        of = f" of {wanted:g}" if wanted and wanted > 0 else ""
        data.missing.append(
            f"after.json has no measurement: the run is not finished, or it was stopped (last logged step: "
            f"{data.last_step}{of}). Continue it with --resume."
        )
