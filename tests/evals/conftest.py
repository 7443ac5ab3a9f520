"""What several files of these tests share: one browser for each of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.evals.chromium import Chromium, chromium, executable


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    if not executable():
        pytest.skip("no Chromium on this machine")
    with chromium(tmp_path_factory.mktemp("profile")) as tab:
        tab.size(1200, 900)
        yield tab
