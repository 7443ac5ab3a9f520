"""Files of records, one a line, read as they grow: where each record lies is kept, what it says is read when asked for.

An evaluation of 10,000 problems with 16 long samples each is gigabytes. What stays in memory is a place for each
record and the texts of one problem; and looking for what is new reads what is new.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

Record = TypeVar("Record")
Place = tuple[str, int]  # file, offset of its line


class Lines(Generic[Record]):
    """Records by problem and index. Of several with one key the first counts, by file name and line.

    Args:
        files: those there are now; some may come later.
        read: a line's content to its record.
        key: a line's content to (problem, index); None: no record.
        last: of several with one key the last counts.
        name: what they are, for messages.
    """

    def __init__(
        self,
        files: Callable[[], Iterable[Path]],
        read: Callable[[dict[str, Any]], Record],
        key: Callable[[dict[str, Any]], tuple[str, int] | None],
        *,
        last: bool = False,
        name: str = "record",
    ) -> None:
        self._files, self._read, self._key, self._last, self._name = files, read, key, last, name
        self._places: dict[str, dict[int, Place]] = {}
        self._seen: dict[Path, tuple[int, int]] = {}  # bytes and lines that were looked at
        self._count = 0

    def look(self) -> list[tuple[str, int]]:
        """Reads what was written since the last time; the keys that were not there before.

        A line that is being written is left for the next time, one that cannot be read is left out with a warning.
        """
        new = []
        for file in sorted(self._files()):
            for place, row in self._appended(file):
                try:
                    self._read(row)
                    key = self._key(row)
                except (TypeError, KeyError, AttributeError):
                    warnings.warn(f"{file} holds a line that is no {self._name}; it is left out", stacklevel=2)
                    continue
                if key is None:
                    continue
                places = self._places.setdefault(key[0], {})
                if key[1] not in places:
                    new.append(key)
                    self._count += 1
                    places[key[1]] = place
                elif self._last or place < places[key[1]]:
                    places[key[1]] = place
        return new

    def _appended(self, file: Path) -> Iterator[tuple[Place, dict[str, Any]]]:
        offset, number = self._seen.get(file, (0, 0))
        if not file.is_file() or file.stat().st_size <= offset:
            return
        with file.open("rb") as lines:  # as bytes: what is being written may end in the middle of a character
            lines.seek(offset)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                place, number = (str(file), offset), number + 1
                offset += len(line)
                try:
                    row = json.loads(line)
                except ValueError:
                    warnings.warn(f"{file} line {number} cannot be read and is left out", stacklevel=3)
                    continue
                yield place, row
        self._seen[file] = (offset, number)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Record]:
        """All records, problem by problem."""
        for problem in self._places:
            yield from self.of(problem)

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key[1] in self._places.get(key[0], ())

    def problems(self) -> list[str]:
        """Those that have a record, in the order in which their first ones were found."""
        return list(self._places)

    def indices(self, problem: str) -> list[int]:
        return sorted(self._places.get(problem, ()))

    def of(self, problem: str) -> list[Record]:
        """The records of a problem, by index."""
        places = sorted(self._places.get(problem, {}).items())
        found: dict[int, Record] = {}
        for file in {place[0] for _, place in places}:
            with Path(file).open("rb") as lines:
                for index, (where, offset) in places:
                    if where == file:
                        lines.seek(offset)
                        found[index] = self._read(json.loads(lines.readline()))
        return [found[index] for index, _ in places]
