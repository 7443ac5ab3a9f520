"""A checkpoint is resumed by a launch that can read its optimizer, or not at all."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmdistill.errors import UserError
from llmdistill.training.layout import check_layout
from tests.trainer.pair_cases import trainer


def launch(stage: int | None, processes: int = 1) -> Any:
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    return SimpleNamespace(deepspeed_plugin=plugin, world_size=processes, save_only_model=False)


def checkpoint(folder: Path, stage: int, processes: int) -> Path:
    """As DeepSpeed names its files."""
    parts = folder / "global_step3"
    parts.mkdir(parents=True)
    (folder / "latest").write_text("global_step3")
    for rank in range(processes):
        (parts / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
        model = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        (parts / model).touch()
    return folder


def test_only_the_launch_that_wrote_it(tmp_path: Path) -> None:
    written = {(s, n): checkpoint(tmp_path / f"{s}-{n}", s, n) for s in (2, 3) for n in (1, 2)}
    written[None, 1] = tmp_path / "plain"  # type: ignore[index]
    for wrote, folder in written.items():
        for reads in written:
            if wrote == reads:
                check_layout(folder, launch(*reads))
            else:
                with pytest.raises(UserError, match="the optimizer cannot be read. Fix: resume with as many processes"):
                    check_layout(folder, launch(*reads))
    check_layout(tmp_path / "plain", launch(None, 8))  # whole on every rank: for any number of them


def test_a_trainer_made_in_python_refuses_it_too(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    with pytest.raises(UserError, match="was written with DeepSpeed ZeRO-3 over 2 processes"):
        t.train(str(checkpoint(tmp_path / "checkpoint-3", 3, 2)))
    assert t.state.global_step == 0
