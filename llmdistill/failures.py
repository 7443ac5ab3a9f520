"""What one reads when a command ends early: one line, whatever it was, from every front door.

A mistake that the user can mend is said with its fix, and the exit status is 2. Anything else is a fault of this
package: its traceback goes into a file, the line says where, and the status is 1. Nothing heavy is imported here.
"""

from __future__ import annotations

import errno
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from llmdistill.errors import UserError
from llmdistill.extras import how_to_install, installed_version
from llmdistill.files import atomic_write

MENDABLE, FAULT, INTERRUPTED, PIPE_CLOSED = 2, 1, 130, 141
# Of the system about a path: what there is to do about it is the user's.
OF_A_PATH = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "permission to write there, or another path"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST, errno.EISDIR), "a path where no file is in the way"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space, or another path"),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP), "another path"),
}
PACKAGES = ("llmdistill", "torch", "transformers", "accelerate", "peft", "trl", "deepspeed", "vllm")
SECRETS = ("token", "key", "password")  # in the name of an option: its value is not written down


def reported(
    run: Callable[[], int | None],
    argv: Sequence[str],
    *,
    folder: Callable[[], Path | None] = lambda: None,
    interrupted: str = "interrupted",
) -> int:
    """Runs a command, says what ended it if something did, and returns its exit status.

    Args:
        argv: its words; ``--debug`` among them shows tracebacks.
        folder: where the traceback of a fault is written; a temporary folder where there is none.
        interrupted: what is said after Ctrl-C.
    """
    try:
        return run() or 0
    except KeyboardInterrupt:
        _show_traceback(argv)
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `... | head`: nobody is left to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:
        _show_traceback(argv)
        if said := to_mend(error):
            print(f"error: {said}", file=sys.stderr)
            return MENDABLE
        first = next(iter(str(error).strip().splitlines()), "").rstrip(".")
        what = f"an unexpected {type(error).__name__}" + (f", {first}" if first else "")
        told = f"please report it with {_written(argv, folder)}, which has the traceback (--debug shows it here too)"
        print(f"error: {what}. This is a fault of llmdistill; {told}.", file=sys.stderr)
        return FAULT


def to_mend(error: BaseException) -> str | None:
    """What the user can do about it; None where it is not the user's."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return how_to_install(error)
    if isinstance(error, MemoryError) or _is_torch_out_of_memory(error):
        where = "the GPU's memory" if "CUDA" in str(error) or "HIP" in str(error) else "memory"
        return (
            f"{where} is full. Fix: a lower train.per_device_train_batch_size (and more gradient_accumulation_steps), "
            "rollouts.batch_tokens, teacher.batch_tokens or objective.chunk_tokens; train.gradient_checkpointing, "
            "train.bf16, or student.lora_r; of a service --batch_tokens or --max_model_len."
        )
    if isinstance(error, OSError) and error.filename is not None and error.errno in OF_A_PATH:
        return f"{os.fspath(error.filename)}: {error.strerror}. Fix: {OF_A_PATH[error.errno]}."
    return None


def _is_torch_out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _show_traceback(argv: Sequence[str]) -> None:
    if "--debug" in argv:
        traceback.print_exc()


def _written(argv: Sequence[str], folder: Callable[[], Path | None]) -> Path:
    """The file with the traceback, the command and the versions: in the run's folder, or where that cannot be."""
    text = "".join(
        [
            f"command: {sys.argv[0]} {' '.join(_without_secrets(argv))}\n",
            f"python {platform.python_version()}, {platform.platform()}\n",
            *(f"{name} {version}\n" for name in PACKAGES if (version := installed_version(name))),
            "\n",
            traceback.format_exc(),
        ]
    )
    name = f"fault-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    try:
        place = folder()
        if place is not None and place.is_dir():
            atomic_write(place / name, text)
            return place / name
    except Exception:  # what went wrong may be the folder: what is said of it must not
        pass
    file = Path(tempfile.mkdtemp(prefix="llmdistill-")) / name
    atomic_write(file, text)
    return file


def _without_secrets(argv: Sequence[str]) -> list[str]:
    shown, hide = list[str](), False
    for word in argv:
        name, given, _ = word.partition("=")
        secret = word.startswith("--") and name.replace("-", "_").endswith(SECRETS)
        shown.append("***" if hide and not word.startswith("--") else f"{name}=***" if secret and given else word)
        hide = secret and not given
    return shown
