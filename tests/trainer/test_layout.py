"""A checkpoint is read as it is by the launch that wrote it, and laid out anew for another, or it is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerState

from llmdistill.errors import UserError
from llmdistill.training.layout import check_layout
from tests.trainer.pair_cases import trainer


def launch(stage: int | None, processes: int = 1, optim: str = "adamw_torch", restarts: bool = False) -> Any:
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    return SimpleNamespace(deepspeed_plugin=plugin, world_size=processes, optim=optim, restart_optimizer=restarts)


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


def written(folder: Path) -> dict[tuple[int | None, int], Path]:
    found = {(s, n): checkpoint(folder / f"{s}-{n}", s, n) for s in (2, 3) for n in (1, 2)}
    plain = folder / "plain"
    plain.mkdir()
    (plain / "optimizer.pt").touch()
    return {**found, (None, 1): plain}


def test_only_the_launch_that_wrote_it_reads_it_as_it_is(tmp_path: Path) -> None:
    every = written(tmp_path)
    for wrote, folder in every.items():
        for reads in every:
            assert check_layout(folder, launch(*reads)) == (wrote != reads)
    assert not check_layout(tmp_path / "plain", launch(None, 8))  # whole on every rank: for any number of them


def test_what_an_optimizer_remembers_of_more_than_elements_is_refused(tmp_path: Path) -> None:
    """Adafactor's rows and columns. By the launch that wrote it they are read."""
    folder = written(tmp_path)[3, 2]
    assert not check_layout(folder, launch(3, 2, "adafactor"))
    named = "with DeepSpeed ZeRO-3 over 2 processes, and this is a launch without DeepSpeed: what train.optim adafactor"
    with pytest.raises(UserError, match=f"{named} .* Fix: --restart_optimizer true"):
        check_layout(folder, launch(None, 1, "adafactor"))
    with pytest.warns(UserWarning, match=f"{named}.*begins anew"):
        assert check_layout(folder, launch(None, 1, "adafactor", restarts=True))


def test_deepspeed_goes_on_from_weights_alone_with_a_new_optimizer(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(UserError, match=r"no optimizer .*save_only_model.* Fix: --restart_optimizer true"):
        check_layout(tmp_path / "checkpoint-3", launch(2))
    with pytest.warns(UserWarning, match="begin anew"):
        assert check_layout(tmp_path / "checkpoint-3", launch(2, restarts=True))


def test_a_checkpoint_that_is_not_of_these_weights_is_named(tmp_path: Path) -> None:
    t, folder = trainer(tmp_path), checkpoint(tmp_path / "checkpoint-3", 3, 2)
    TrainerState(global_step=3, train_batch_size=4).save_to_json(str(folder / "trainer_state.json"))
    with pytest.raises(UserError, match=r"with DeepSpeed ZeRO-3 over 2 processes and cannot be laid out"):
        t.train(str(folder))
