"""The REDI front door in two processes computes what it computes in one, in both stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import worker
from tests.distributed.launching import launch

STEPS = 3


def run(folder: Path, config: str, processes: int, method: str) -> dict[str, Any]:
    """What a launch leaves in its run folder. A global batch of 8 in two micro-batches, however many share it."""
    output = folder / f"{config}-{method}"
    share = str(8 // 2 // processes)
    settings = {
        **{"student.model": folder / "student", "data.train": folder / "pairs.jsonl", "output_dir": output},
        **{"data.heldout": folder / "heldout.jsonl", "per_device_eval_batch_size": 2, "method": method},
        **{"stage1_steps": STEPS, "stage1_learning_rate": 1e-3, "stage1_batch_size": share, "stage1_accumulation": 2},
        **{"max_steps": STEPS, "learning_rate": 1e-3, "per_device_train_batch_size": share},
        **{"gradient_accumulation_steps": 2, "logging_steps": 1, "save_steps": STEPS},
        **({} if method == "dpo" else {"guard_window": 1}),
    }
    words = [str(x) for key, value in settings.items() for x in (f"--{key}", value)]
    launch(config, "-m", "llmdistill.redi", *words)
    stages = {}
    for name in ("stage1", "."):
        read = {f: json.loads((output / name / f"{f}.json").read_text()) for f in ("before", "after", "summary")}
        lines = [json.loads(line) for line in (output / name / "metrics.jsonl").read_text().splitlines()]
        stages[name] = {**read, "lines": [line for line in lines if "loss" in line]}
    return stages


@pytest.mark.slow
@pytest.mark.parametrize(
    "config,method",
    [("two_processes", "redi"), ("two_processes", "dpo"), ("two_processes", "simpo"), ("zero3", "redi")],
)
def test_two_processes_compute_what_one_does(tmp_path: Path, config: str, method: str) -> None:
    worker.make_model(0, hidden=32, tied=True).save_pretrained(tmp_path / "student")
    worker.make_tokenizer().save_pretrained(tmp_path / "student")
    chosen, rejected = worker.make_rows(29, 1), worker.make_rows(29, 2)
    rows = [
        {"prompt": a["prompt"], "chosen": a["completion"], "rejected": f"{b['completion']} t23"}
        for a, b in zip(chosen, rejected, strict=True)
    ]
    # 5 held out for two: one of them repeats a pair that must not count
    for name, part in (("pairs", rows[:24]), ("heldout", rows[24:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    alone, found = run(tmp_path, "one_process", 1, method), run(tmp_path, config, 2, method)
    for stage in ("stage1", "."):
        names = ["loss", "grad_norm"]
        if stage == "." and method != "dpo":
            names += [
                "redi/chosen_logp",
                "redi/rejected_logp",
                "redi/accuracy",
                "redi/chosen_length",
                "redi/chosen_fall",
                "redi/rejected_fall",
            ]
        for name in names:
            expected = [line[name] for line in alone[stage]["lines"]]
            assert len(expected) == STEPS
            assert [line[name] for line in found[stage]["lines"]] == pytest.approx(expected, rel=1e-4, abs=1e-5), name
        for when in ("before", "after"):
            assert found[stage][when]["pairs"] == pytest.approx(alone[stage][when]["pairs"], rel=1e-4, abs=1e-5)
            assert len(found[stage][when]["sequences"]["pairs"]["chosen_logp"]) == 5
        assert found[stage]["summary"]["steps"] == STEPS
    if method != "dpo":
        guards = [stages["."]["summary"]["guard"] for stages in (alone, found)]
        for name in ("fired_at", "fired_on"):
            assert guards[1].pop(name) == guards[0].pop(name)
        assert guards[1] == pytest.approx(guards[0], rel=1e-4, abs=1e-5)
