"""Denoisers are trained by two processes as by one, and go on from a checkpoint bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.diffusion_worker import CASES, one_case
from tests.distributed.launching import launched_once

pytestmark = pytest.mark.slow
LAUNCHES = ("two_processes", "zero3")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Case -> what one process trains."""
    known: dict[str, Any] = {}

    def of(case: str) -> Any:
        if case not in known:
            known[case] = one_case(tmp_path_factory.mktemp("alone"), case, 1)
        return known[case]

    return of


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Launch file -> the folder of what its worker wrote."""

    def of(config: str) -> Path:
        return launched_once(tmp_path_factory, config, "tests.distributed.diffusion_worker", "{folder}")

    return of


@pytest.mark.parametrize("config", LAUNCHES)
@pytest.mark.parametrize("case", list(CASES))
def test_two_processes_train_what_one_trains(alone: Any, together: Any, config: str, case: str) -> None:
    """To the rounding of float32 sums in another order: the masks of a sequence do not depend on who holds it, nor what
    is written where rows have seeds of their own; reinforcement has other numbers of slices on its ranks."""
    folder = together(config)
    found = json.loads((folder / "out.json").read_text())[case]
    expected, weights = alone(case)
    assert found["undisturbed"] == pytest.approx(expected["undisturbed"], rel=1e-4)
    assert found["heldout"]["eval_bound/tokens"] == expected["heldout"]["eval_bound/tokens"]
    assert found["heldout"]["eval_loss"] == pytest.approx(expected["heldout"]["eval_loss"], rel=1e-3)
    saved = torch.load(folder / f"{case}.pt")
    assert saved.keys() == weights.keys()
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("config", LAUNCHES)
@pytest.mark.parametrize("case", list(CASES))
def test_a_resumed_run_is_the_undisturbed_one(together: Any, config: str, case: str) -> None:
    found = json.loads((together(config) / "out.json").read_text())[case]
    assert len(found["undisturbed"]) == 4 and found["resumed"][-2:] == found["undisturbed"][-2:]
