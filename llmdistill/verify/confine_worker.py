"""Confinement of processes that read hostile text with libraries of ours (workers.py): answers, formulas.

They need to read Python and the libraries, and nothing else: no other file, no network, no process, no environment.
What the machine does not grant is left out (unlike a program's sandbox, which is refused then): what runs in a worker
is the library, unless the library has a hole.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from llmdistill.verify import confine, confine_identity, confine_namespaces, confine_seccomp


def clean_environment() -> dict[str, str]:
    """Variables for a process that hostile text may take over: no token of the user's is among them."""
    environment = {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
    environment |= {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return environment


def package_folders() -> list[str]:
    """Where this process finds installed packages; a working directory or an editable checkout is none of it."""
    return [path for path in sys.path if path.rstrip("/").endswith(("site-packages", "dist-packages"))]


class Confinement:
    """What a worker's children give up. Made once in the worker, which must have one thread and its libraries loaded.

    Attributes:
        means: what is in force, in words; empty where nothing is.
    """

    def __init__(self) -> None:
        self.means: list[str] = []
        if sys.platform != "linux":
            return
        self._paths = confine_namespaces.readable_paths([*package_folders(), *_loaded_packages()])
        self._identity = confine_identity.own_identity(self._paths)
        confine.bound_capabilities()
        self._tasks = confine_identity.TaskLimit(counted_apart=self._identity.uid is not None)
        self._landlock, self._seccomp = confine.landlock_abi() >= 1, confine_seccomp.supported()
        granted = [("Landlock", self._landlock), ("a system-call filter", self._seccomp)]
        granted += [("a uid of its own", self._identity.uid is not None), ("a limit on tasks", self._tasks.enforced)]
        self.means = [name for name, given in granted if given]

    def enter(self, parent: int, keep: tuple[int, ...]) -> None:
        """Give it up, in a child of ``parent``: for good. Only the descriptors ``keep`` stay open."""
        os.environ.clear()
        confine.close_files(keep)
        if sys.platform != "linux":
            return
        confine.limit_tasks(self._tasks.now())
        os.chdir("/")
        confine.become(self._identity.uid, self._identity.capability)
        confine.die_with_parent()
        if os.getppid() != parent:
            os._exit(1)
        if self._landlock:
            confine.landlock([*self._paths, *confine_namespaces.DEVICES], ["/dev/null"])
        if self._seccomp:
            confine_seccomp.filter_system_calls(may_change_files=False, may_truncate=False)


def _loaded_packages() -> list[str]:
    """Folders of the packages that are imported already, wherever they lie: they import more of themselves later."""
    tops = [module for name, module in list(sys.modules.items()) if "." not in name]
    folders = {str(folder) for module in tops for folder in getattr(module, "__path__", None) or ()}
    return sorted(folder for folder in folders if Path(folder).is_dir())
