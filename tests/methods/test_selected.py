"""The reverse KL on the first tokens of every completion, and without some ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.methods import rounds


@pytest.mark.parametrize(
    ("settings", "rows"),
    # of the eleven completion tokens 9 10 1 | 13 14 15 16 17 | 1 | 33 34
    [
        ({"first": 2}, [0, 1, 3, 4, 8, 9, 10]),
        ({"without": [1, 15]}, [0, 1, 3, 4, 6, 7, 9, 10]),
        ({"first": 3, "without": [1]}, [0, 1, 3, 4, 5, 9, 10]),
    ],
)
@pytest.mark.parametrize("left", [0, 3])
def test_only_the_selected_tokens_count(tmp_path: Path, settings: dict[str, Any], rows: list[int], left: int) -> None:
    """Also with padding on the left, where the place in the tensor is not the place in the completion."""
    student, teacher = tiny.llama(1), tiny.llama(2)
    t = rounds.make(tmp_path, "selected", student=student, teacher=teacher, **settings)
    losses = rounds.kl(torch.cat(rounds.logps(student)), torch.cat(rounds.logps(teacher)).detach())
    rounds.assert_agree(t, rounds.text(left=left, right=2), student, losses[rows].mean())
