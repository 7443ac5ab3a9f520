"""Ranks that wait for one of them: for longer than a collective may take, and with its errors."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from llmdistill.errors import UserError
from llmdistill.ranks import from_first_rank, is_first, on_every_rank
from llmdistill.recipe.launches import check_outages


def test_alone_it_is_the_work_itself() -> None:
    seen: list[int] = []
    assert is_first() and from_first_rank(lambda: {"a": [1, None, "x"]}) == {"a": [1, None, "x"]}
    on_every_rank(lambda: seen.append(1))
    assert seen == [1]
    with pytest.raises(UserError, match="no"):
        from_first_rank(lambda: (_ for _ in ()).throw(UserError("no")))


@pytest.mark.slow
@pytest.mark.parametrize("store", ["file", "tcp"])
def test_the_others_wait_longer_than_a_collective_would_and_hear_of_every_error(store: str, tmp_path: Path) -> None:
    """The group's time-out is one second, the work takes two: in a broadcast the second rank would be thrown out."""
    program = tmp_path / "rank.py"
    program.write_text(
        textwrap.dedent(
            """
            import sys, time
            from datetime import timedelta
            import torch
            from llmdistill.errors import UserError
            from llmdistill.ranks import RankFailed, from_first_rank, on_every_rank

            rank, where = int(sys.argv[1]), sys.argv[2]
            torch.distributed.init_process_group(
                "gloo", init_method=where, rank=rank, world_size=2, timeout=timedelta(seconds=1)
            )

            def slow():
                assert rank == 0
                time.sleep(2)
                return ["digest", True]

            def fail(kind, whose=0):
                if rank == whose:
                    raise kind("gone")

            print(from_first_rank(slow))
            for work in (
                lambda: from_first_rank(lambda: fail(UserError)),
                lambda: from_first_rank(lambda: fail(OSError)),
                lambda: on_every_rank(lambda: fail(UserError, 1)),
            ):
                try:
                    work()
                except (UserError, OSError, RankFailed) as error:
                    print(type(error).__name__, error)
            on_every_rank(lambda: time.sleep(2 * rank))
            print("met")
            """
        )
    )
    port = 0
    if store == "tcp":
        import socket

        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
    where = f"file://{tmp_path / 'store'}" if store == "file" else f"tcp://127.0.0.1:{port}"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    ranks = [
        subprocess.Popen([sys.executable, str(program), str(r), where], stdout=subprocess.PIPE, text=True, env=env)
        for r in range(2)
    ]
    first, second = (process.communicate(timeout=180)[0].splitlines() for process in ranks)
    assert first == ["['digest', True]", "UserError gone", "OSError gone", "UserError gone", "met"]
    assert second == [
        "['digest', True]",
        "UserError gone",
        "RankFailed another rank failed: gone",
        "UserError gone",
        "met",
    ]


def test_patience_with_a_service_and_of_the_ranks_are_checked_together() -> None:
    outages = {"teacher.max_outage_s": 3600.0}
    check_outages(outages, 5400, 8)
    check_outages(outages, 1800, 1)
    with pytest.raises(
        UserError, match=r"teacher.max_outage_s is 3600 and train.ddp_timeout 1800: .*--ddp_timeout 4200"
    ):
        check_outages(outages, 1800, 8)


def test_our_own_patience_outlives_a_teachers() -> None:
    from llmdistill import OPDConfig
    from llmdistill.recipe.config import TeacherConfig

    assert OPDConfig(output_dir="x").ddp_timeout > TeacherConfig(model="m").max_outage_s
