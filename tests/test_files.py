"""Files that are replaced: whole, synced, and of several writers one; a full disk is a message."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmdistill.errors import UserError
from llmdistill.files import atomic_write, full_disk_is_said, read_json
from llmdistill.record.run_folder import RunFolder


def test_file_and_folder_are_synced_before_and_after_the_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In that order: a power loss leaves the old file or the new one. The system's own calls are watched."""
    calls: list[tuple[str, Any]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def moved(source: Any, target: Any) -> None:
        calls.append(("replace", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", moved)
    target = tmp_path / "run" / "summary.json"
    assert atomic_write(target, "new")
    kinds = [kind for kind, _ in calls]
    assert kinds == ["fsync", "replace", "fsync"]
    assert Path(calls[0][1]).parent == target.parent and calls[2][1] == str(target.parent)
    assert target.read_text() == "new" and [p.name for p in target.parent.iterdir()] == ["summary.json"]


def test_what_was_there_stays_where_writing_fails(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    atomic_write(target, "old")
    target.chmod(0o640)

    def broken(file: Path) -> None:
        file.write_text("half")
        raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        atomic_write(target, broken)
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]
    atomic_write(target, b"new")
    assert target.read_bytes() == b"new" and target.stat().st_mode & 0o777 == 0o640


def test_of_two_that_claim_a_file_one_wins(tmp_path: Path) -> None:
    assert atomic_write(tmp_path / "info.json", "first", exclusive=True)
    assert not atomic_write(tmp_path / "info.json", "second", exclusive=True)
    assert (tmp_path / "info.json").read_text() == "first" and len(os.listdir(tmp_path)) == 1


def test_a_full_disk_is_one_line_that_says_what_is_safe() -> None:
    words = r"/dev/full cannot be written: No space left .* before is whole. Fix: make room"
    with pytest.raises(UserError, match=words), full_disk_is_said("/dev/full"), open("/dev/full", "w") as file:
        file.write("x")
        file.flush()
    with pytest.raises(PermissionError), full_disk_is_said("a"):
        raise PermissionError(errno.EACCES, "no")


@pytest.mark.parametrize("content", ["", "{", '{"a": 1', "\0\0\0", "\x00" * 4096])
def test_json_that_a_power_loss_has_left_is_a_message(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path / 'a.json'))} is damaged: .* Fix: do this"):
        read_json(tmp_path / "a.json", "do this")
    assert read_json(tmp_path / "b.json", "do this") is None


@pytest.mark.parametrize("name", ["before.json", "after.json", "inputs.json"])
def test_a_damaged_file_of_a_run_that_nothing_needs_is_left_out(name: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json(name, {"a": 1})
    assert folder.read_json(name) == {"a": 1}
    (tmp_path / name).write_text("")
    with pytest.warns(UserWarning, match=f"{name} is damaged"):
        assert folder.read_json(name) is None


def test_nothing_in_the_package_replaces_a_file_by_itself() -> None:
    """Every file that is replaced goes through one function; sockets of the kind would lose the sync."""
    package = Path(__file__).parents[1] / "llmdistill"
    own = [
        f"{file.relative_to(package)}:{number}"
        for file in package.rglob("*.py")
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if re.search(r"os\.(replace|rename)\(|\.write_text\(|\.write_bytes\(", line)
    ]
    assert [place for place in own if not place.startswith("files.py:")] == []


@pytest.mark.slow
def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    """Four processes replace one file; every reading is a whole version."""
    program = (
        "import sys; from llmdistill.files import atomic_write\n"
        "for i in range(60): atomic_write(sys.argv[1], sys.argv[2] * 50_000)"
    )
    target = tmp_path / "shared.json"
    atomic_write(target, "0" * 50_000)
    writers = [subprocess.Popen([sys.executable, "-c", program, str(target), str(i)]) for i in range(4)]
    while any(w.poll() is None for w in writers):
        text = target.read_text()
        assert len(text) == 50_000 and len(set(text)) == 1
    assert all(w.returncode == 0 for w in writers) and os.listdir(tmp_path) == ["shared.json"]
