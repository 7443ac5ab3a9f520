"""What several tests of the sandbox need."""

import pytest

from llmdistill.verify import sandbox
from tests.verify.attack_runner import Scene


@pytest.fixture(scope="module")
def scene():
    made = Scene()
    yield made
    made.close()


@pytest.fixture
def nothing_confines(monkeypatch):
    """A machine on which every means of confinement is refused."""
    real = sandbox._Worker

    def only_unsafe(mode):
        if mode != "none":
            raise sandbox._Refused("not here")
        return real(mode)

    monkeypatch.setattr(sandbox, "_Worker", only_unsafe)
