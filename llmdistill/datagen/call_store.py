"""The calls that were answered, on disk as they come: what was paid for survives the process, and is not asked again.

    OUT.calls/config.json      whose calls these are: models, writer, sampling, seed
    OUT.calls/calls.jsonl      {"name", "role", "drawn": {...}} or {"name", "role", "refused": why} a line, appended
    OUT.calls/probes.json      what stands for the weights of its endpoints, by role
    OUT.calls/verdicts.jsonl   {"name": ..., "verdict": {...}}, where traces are judged as they come

A line that was being written when the process died is dropped. In memory is a place for each line, no text.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmdistill.datagen.calls import Drawn
from llmdistill.datagen.engines.probe import Probe
from llmdistill.errors import UserError
from llmdistill.evals.differing import differing
from llmdistill.evals.records import Appender, as_line
from llmdistill.files import atomic_write, read_json


class Ledger:
    """Rows of JSON by name, which is hexadecimal; appended, and read by their places. Of several with one name the last
    counts. Threads may share it.

    Raises:
        UserError: another process has the file.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self._lock = threading.Lock()
        self._appender = Appender(self.file)  # cuts off what was half written
        self._places: dict[bytes, int] = {}
        self._size = 0
        self._failed: UserError | None = None
        self._index()
        self._reader = self.file.open("rb")

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: str) -> bool:
        return bytes.fromhex(name) in self._places

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows that can be read."""
        with self.file.open("rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):
                    try:
                        yield json.loads(line)
                    except ValueError:
                        continue

    def get(self, name: str) -> dict[str, Any] | None:
        """The row of a name, or None."""
        with self._lock:
            place = self._places.get(bytes.fromhex(name))
            if place is None:
                return None
            self._reader.seek(place)
            return json.loads(self._reader.readline())  # type: ignore[no-any-return]

    def put(self, name: str, row: Mapping[str, Any]) -> None:
        """Keeps a row. When this returns it survives the process.

        Raises:
            UserError: the disk is full; the rows before are whole.
        """
        whole = {"name": name, **row}
        with self._lock:
            if self._failed is not None:  # nothing may follow a line that was cut off
                raise self._failed
            try:
                self._appender.add(whole)
            except UserError as error:
                self._failed = error
                raise
            self._places[bytes.fromhex(name)] = self._size
            self._size += len(as_line(whole).encode())

    def close(self) -> None:
        """Closing twice is harmless."""
        self._reader.close()
        if self._failed is None:
            self._appender.close()
        else:
            with suppress(UserError):  # what could not be written is said already
                self._appender.close()

    def _index(self) -> None:
        with self.file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    self._places[bytes.fromhex(json.loads(line)["name"])] = self._size
                except (ValueError, KeyError, TypeError):
                    warnings.warn(f"{self.file} line {number} is damaged; what it held is asked again", stacklevel=3)
                self._size += len(line)


class CallStore:
    """Answers by the names of their calls.

    Args:
        folder: made if need be.
        identity: what all its calls have in common. JSON-like.

    Raises:
        UserError: it holds calls of another identity (the first difference is named), or another process has it.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.calls = Ledger(self.folder / "calls.jsonl")
        try:
            self._claim(identity)
            self.verdicts = Ledger(self.folder / "verdicts.jsonl")
        except BaseException:
            self.calls.close()
            raise

    def get(self, name: str) -> Drawn | None:
        """What was drawn for a call; None where it was not asked yet, or refused: it is worth asking again."""
        row = self.calls.get(name)
        return Drawn.read(row["drawn"]) if row is not None and "drawn" in row else None

    def refusal(self, name: str) -> str | None:
        """Why there is no answer."""
        return (self.calls.get(name) or {}).get("refused")

    def put(self, name: str, drawn: Drawn | None = None, *, role: str = "", refused: str = "") -> None:
        """Keeps an answer of a role, or why there is none. Raises as :meth:`Ledger.put`."""
        self.calls.put(name, {"role": role, **({"refused": refused} if drawn is None else {"drawn": drawn.stored()})})

    def tokens(self) -> dict[str, tuple[int, int]]:
        """Prompt and completion tokens of all answers, by role."""
        found: dict[str, tuple[int, int]] = {}
        for row in self.calls:
            drawn, (prompt, completion) = row.get("drawn", {}), found.get(row.get("role", ""), (0, 0))
            found[row.get("role", "")] = prompt + drawn.get("prompt_tokens", 0), completion + drawn.get("tokens", 0)
        return found

    def check_probe(self, role: str, now: Probe | None) -> None:
        """Keeps what an endpoint said to the probes, and compares what it says later with that.

        Raises:
            UserError: it has other weights than those that the answers here are of.
        """
        file = self.folder / "probes.json"
        probes = read_json(file, f"remove {self.folder}, and with it the answers") or {}
        if now is None:
            return
        if role not in probes:
            atomic_write(file, json.dumps({**probes, role: now.stored()}, indent=1, ensure_ascii=False) + "\n")
        elif other := Probe.read(probes[role]).other(now):
            raise UserError(
                f"{self.folder} holds calls of other weights than {role} has now under the same name: {other}. "
                "Fix: the weights of before, another output, or remove that folder."
            )

    def close(self) -> None:
        """Closing twice is harmless."""
        try:
            self.calls.close()
        finally:
            self.verdicts.close()

    def _claim(self, identity: Mapping[str, Any]) -> None:
        file = self.folder / "config.json"
        before = read_json(file, f"remove {self.folder}, and with it the answers")
        if not len(self.calls):  # of a command that failed before its first answer: there is nothing to be mixed up
            before = None
        elif before is None:
            raise UserError(f"{self.folder} holds calls and no config.json says whose. Fix: another output.")
        if before is None:
            atomic_write(file, json.dumps(identity, indent=1, ensure_ascii=False) + "\n")
            return
        for setting, then, now in differing(before, identity):
            raise UserError(
                f"{self.folder} holds calls made with {setting} {then}, now it is {now}. "
                "Fix: another output, or remove that folder."
            )
