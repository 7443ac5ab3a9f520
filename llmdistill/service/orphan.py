"""A service killed with SIGKILL cannot end the processes it started; the kernel does."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT = "LLMDISTILL_PARENT"  # set by the service for those


def die_with_parent() -> None:
    """Ties this process to the life of the one that started it."""
    if sys.platform == "linux" and PARENT in os.environ:
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() == 1:
            os._exit(1)
