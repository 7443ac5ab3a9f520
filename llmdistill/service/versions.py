"""Pushed weights that the replicas of a fleet share: a folder that all of them see.

A push reaches one replica, whichever a load balancer picks, and makes a version there: a number, one more than the
last, whatever the trainer calls its step. The others find it and load it before they say again that they are ready; so
does one that starts later. Nothing is ever rolled back: a replica goes from a version to a later one, and one that
cannot load it is out. The two newest versions are kept, since a replica may be reading the one before.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from llmdistill.files import atomic_write

KEPT = 2
ABOUT, BEGUN = "version.json", ".begun-"


@dataclass(frozen=True)
class Version:
    """What was pushed."""

    number: int
    policy_version: int
    digest: str
    teacher: str  # the fingerprint that the engine gave them


class Versions:
    """The versions in a folder, which several processes on several machines may use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def latest(self) -> Version | None:
        """None where nothing was pushed yet."""
        for place in sorted(self.folder.glob("v*"), reverse=True):
            try:
                return Version(**json.loads((place / ABOUT).read_text()))
            except (OSError, ValueError, TypeError):  # gone meanwhile, or none of ours
                continue
        return None

    def path(self, version: Version) -> Path:
        return self.folder / f"v{version.number:012d}"

    def publish(self, weights: Path, policy_version: int, digest: str, teacher: str) -> Version:
        """The safetensors files of ``weights`` as the newest version; that which is there already where it is the same.

        Raises:
            OSError: no room.
        """
        with self._alone():
            last = self.latest()
            if last is not None and (last.policy_version, last.digest) == (policy_version, digest):
                return last
            made = Version((last.number if last else 0) + 1, policy_version, digest, teacher)
            begun = Path(tempfile.mkdtemp(prefix=BEGUN, dir=self.folder))
            try:
                for file in weights.glob("*.safetensors"):
                    shutil.copyfile(file, begun / file.name)
                atomic_write(begun / ABOUT, json.dumps(asdict(made)))
                begun.chmod(0o755)
                begun.rename(self.path(made))
            except BaseException:
                shutil.rmtree(begun, ignore_errors=True)
                raise
            for old in sorted(self.folder.glob("v*"))[:-KEPT]:
                shutil.rmtree(old, ignore_errors=True)
            return made

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Among all that publish here."""
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in self.folder.glob(f"{BEGUN}*"):  # by one that was killed
                shutil.rmtree(left, ignore_errors=True)
            yield
