"""The run folder: config.yaml, metrics.jsonl, completions/, checkpoint-N/, and the callback that writes them.

Everything is appended or renamed into place, so a run that is killed loses at most the line being written.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback

from llmdistill.errors import UserError
from llmdistill.files import atomic_write, full_disk_is_said, read_json
from llmdistill.record.meters import Meters


class RunFolder:
    """Paths and writers of one run. Only the main process writes (``writes`` is set by the trainer's callback)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics_file = self.path / "metrics.jsonl"
        self._completions: list[dict[str, Any]] = []

    def write_config(self, config: Mapping[str, Any]) -> None:
        atomic_write(self.path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))

    def write_json(self, name: str, value: Any) -> None:
        atomic_write(self.path / name, json.dumps(value, indent=1))

    def read_json(self, name: str) -> Any | None:
        """What :meth:`write_json` wrote; None where it is missing, or damaged, which is warned of: nothing in these
        files is needed to go on."""
        try:
            return read_json(self.path / name, "nothing; the run goes on without it")
        except UserError as error:
            warnings.warn(str(error), stacklevel=2)
            return None

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        self.append_line(self.metrics_file.name, line)

    def append_line(self, name: str, line: Mapping[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with full_disk_is_said(self.path / name), (self.path / name).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def rewind(self, step: int) -> None:
        """Drops what a killed run wrote after ``step``, the checkpoint the next one starts from."""
        if self.metrics_file.is_file():
            kept = [line for line in self.metrics_file.read_text().splitlines() if _step(line) <= step]
            atomic_write(self.metrics_file, "".join(f"{line}\n" for line in kept))
        for file in (self.path / "completions").glob("step-*"):
            if int(file.stem.removeprefix("step-")) > step:
                file.unlink()

    def add_completion(self, **row: Any) -> None:
        self._completions.append(row)

    def flush_completions(self, step: int) -> None:
        """Writes the completions noted since the last flush to ``completions/step-N.parquet``; as JSON lines where
        there is no pyarrow."""
        if not self._completions:
            return
        target = self.path / "completions" / f"step-{step:06d}.parquet"
        if importlib.util.find_spec("pyarrow"):
            import pyarrow as pa
            import pyarrow.parquet as pq

            table = pa.Table.from_pylist(self._completions)
            atomic_write(target, lambda file: pq.write_table(table, file))
        else:
            atomic_write(target.with_suffix(".jsonl"), "".join(f"{json.dumps(row)}\n" for row in self._completions))
        self._completions.clear()

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to the end: its state file is the last to be written."""
        return max(filter(self.is_complete, self.path.glob("checkpoint-*")), key=_step_of, default=None)

    @staticmethod
    def is_complete(checkpoint: Path) -> bool:
        """Whether a folder is a checkpoint that was written to the end."""
        named = checkpoint.name.removeprefix("checkpoint-").isdecimal()
        return named and _is_json(checkpoint / "trainer_state.json")

    def put_aside_after(self, checkpoint: Path) -> None:
        """Moves the checkpoints of later steps into ``aside-N/``: the newest of them is no longer this run's."""
        later = [c for c in self.path.glob("checkpoint-*") if _step_of(c) > _step_of(checkpoint)]
        if later:
            n = 1
            while (aside := self.path / f"aside-{n}").exists():
                n += 1
            aside.mkdir()
            for each in later:
                each.rename(aside / each.name)

    def move_aside(self) -> Path | None:
        """Renames an earlier run in this place to ``NAME.N``; nothing is ever overwritten."""
        if not self.path.exists() or not any(self.path.iterdir()):
            return None
        n = 1
        while (aside := self.path.with_name(f"{self.path.name}.{n}")).exists():
            n += 1
        self.path.rename(aside)
        return aside


def read_completions(file: Path) -> list[dict[str, Any]]:
    """The rows of one file of ``completions/``.

    Raises:
        OSError, ValueError: it cannot be read.
        ImportError: it is Parquet, and there is no pyarrow.
    """
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text().splitlines()]
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    return rows


class RunFolderCallback(TrainerCallback):
    """Writes a line of metrics per log, completions with it, and shows one progress bar with rate and ETA."""

    def __init__(self, folder: RunFolder, meters: Meters) -> None:
        self.folder, self.meters = folder, meters
        self.progress: Any = None  # rich's bar, where there is rich
        self.optimizer_began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.folder.rewind(state.global_step)
        if importlib.util.find_spec("rich") is None:
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.progress = Progress(
            TextColumn("distilling"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True, markup=False),
        )
        self.progress.start()
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step, rate="", note="")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer_began = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meters.add("time/optimizer", time.perf_counter() - self.optimizer_began)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress is not None:
            speed = self.progress.tasks[0].speed
            rate = f"{1 / speed:.2f} s/step" if speed and speed < 1 else f"{speed or 0:.2f} steps/s"
            self.progress.update(self.task, completed=state.global_step, rate=rate)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        self.folder.append_metrics({"step": state.global_step, **logs})
        self.folder.flush_completions(state.global_step)
        if "loss" in logs:
            parts = [f"loss {float(logs['loss']):.3f}"]
            if "distill/top1_agreement" in logs:
                parts.append(f"top-1 {logs['distill/top1_agreement']:.2f}")
            line = f"step {state.global_step}/{state.max_steps}  {' '.join(parts)}"
            if self.progress is None:
                print(line, file=sys.stderr)
                return
            self.progress.update(self.task, note=" ".join(parts))
            if not self.progress.console.is_terminal:  # a log file gets lines instead of a bar
                self.progress.console.print(line)

    def stop(self) -> None:
        """Takes the bar down, also after an error."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):  # the line that was being written when the run was killed
        return 1 << 62


def _step_of(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return True
