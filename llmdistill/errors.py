"""The one exception that means "the input is wrong, and here is what to change"."""

from __future__ import annotations

from pathlib import Path


class UserError(ValueError):
    """A mistake in a setting, a file or a model that the user can mend.

    The message is one line: the setting, the value found, what is needed, the fix. Front doors print that line and
    exit with status 2; the traceback appears only with ``--debug``.
    """


def in_this_folder(path: str | Path) -> str:
    """Of a path that is not there: where it was looked for, if that is not in the path itself. A recipe's paths are
    read from the folder that the command runs in."""
    return "" if Path(path).expanduser().is_absolute() else f" in {Path.cwd()}"
