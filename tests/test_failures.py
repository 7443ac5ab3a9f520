"""What ends a command early is one line, and a fault of ours leaves its traceback in a file."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill import UserError, cli
from llmdistill.failures import reported, to_mend
from llmdistill.recipe.command_line import run_front_door


def broken(argv: Sequence[str]) -> int:
    raise TypeError("unhashable type: 'list'\nand more")


def only_line(err: str) -> str:
    (line,) = err.strip().splitlines()
    return line


def test_a_fault_is_said_in_a_line_with_its_traceback_in_the_run_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_front_door(broken, ["--output_dir", str(tmp_path), "--api_key", "sesame", "--hub-token=sesame"])
    line = only_line(capsys.readouterr().err)
    assert exit_.value.code == 1
    assert line.startswith("error: an unexpected TypeError, unhashable type: 'list'. This is a fault of llmdistill")
    (file,) = tmp_path.iterdir()
    text = file.read_text()
    assert str(file) in line and "Traceback (most recent call last)" in text and "and more" in text
    assert "torch " in text and "--api_key ***" in text and "sesame" not in text


def test_without_a_run_folder_it_is_in_a_temporary_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the training doors before there is a folder, and of the ``llmdistill`` command. Nothing is made in the way."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with pytest.raises(SystemExit):
        run_front_door(broken, ["--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(cli, "verify", lambda words, rest: broken(rest))
    assert cli.main(["verify"]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    files = sorted((tmp_path / "tmp").glob("llmdistill-*/fault-*.txt"))
    assert len(said) == 2 and len(files) == 2
    assert all(any(str(file) in line for file in files) for line in said)


def test_debug_shows_it_here(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert reported(lambda: broken([]), ["--debug"], folder=lambda: tmp_path) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("x is 1"), "x is 1"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
            "the GPU's memory is full. Fix: a lower train",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "memory is full. Fix: a lower"),
        (MemoryError(), "memory is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "/x/y: Permission denied. Fix: permission to"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x"), "/x: Not a directory. Fix: a path where no file"),
    ],
)
def test_what_the_user_can_mend(error: Exception, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> Any:
        raise error

    assert reported(run, []) == 2
    assert only_line(capsys.readouterr().err).startswith(f"error: {said}")


def test_what_the_user_cannot_mend() -> None:
    assert to_mend(FileNotFoundError(errno.ENOENT, "No such file", "/x")) is None
    assert to_mend(RuntimeError("shape mismatch")) is None


def test_a_closed_pipe_is_no_fault(tmp_path: Path) -> None:
    """``llmdistill verify … | head``: nothing is said, and the status is that of a closed pipe."""
    code = "import sys; from llmdistill.failures import reported; sys.exit(reported(lambda: print('x' * 9**6), []))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
