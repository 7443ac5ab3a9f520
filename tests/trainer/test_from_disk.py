"""Training from a folder of score blocks: the live run's numbers, twice the same, and no teacher anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmdistill import DataConfig, OPDConfig, OPDTrainer, UserError
from llmdistill.opd import main
from llmdistill.record.page.page import write_report
from llmdistill.service.hf_engine import HFEngine
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.stored import StoredTeacher
from llmdistill.texts.prompts import PromptEncoder, completed
from tests import tiny
from tests.teachers.test_hidden import served

STEPS = 6
# Log-probs of the blocks are at most 2**-10 off (a row that spans 64 nats; these span less), and so is a KL over them,
# to first order. Six steps of training keep it there.
BLOCK_ERROR = 2e-3
HIDDEN_ERROR = 5e-3  # of hidden states in bfloat16: 2**-9 of each of 32 columns, not all one way


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Student, teacher, another teacher, and rows of two domains with completions."""
    made = tmp_path_factory.mktemp("from_disk")
    for name, seed in (("student", 1), ("teacher", 2), ("other", 3)):
        tiny.llama(seed).save_pretrained(made / name)
        tiny.tokenizer().save_pretrained(made / name)
    rows = [{**row, "domain": ("math", "code")[i % 2]} for i, row in enumerate(tiny.rows(20))]
    for name, part in (("train", rows[:16]), ("heldout", rows[16:])):
        (made / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    return made


def run(folder: Path, output: Path, teachers: Any, estimator: str = "top_k", **sections: Any) -> list[float]:
    """Losses of every step of a run over two epochs, from a recipe."""
    several = {"teachers": teachers} if isinstance(teachers, list) else {"teacher": teachers}
    listed = {"top_k": 16} if estimator == "top_k" else {}
    content: dict[str, Any] = {
        "student": {"model": str(folder / "student")},
        **several,
        "data": {"train": str(folder / "train.jsonl")},
        "rollouts": {"max_new_tokens": 5},
        "objective": {"sequences": "dataset", "estimator": estimator, **listed},
        "train": {
            "output_dir": str(output),
            "max_steps": STEPS,
            "per_device_train_batch_size": 5,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
        },
        **sections,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(content))
    assert main(["--config", str(file)]) == 0
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == STEPS
    return losses


def live(folder: Path, name: str = "teacher") -> dict[str, Any]:
    return {"model": str(folder / name), "dtype": "float32"}


@pytest.mark.parametrize("estimator", ["top_k", "full"])
def test_a_run_from_disk_has_the_losses_of_the_live_one(folder: Path, tmp_path: Path, estimator: str) -> None:
    """The cache answers as it will be read back, so the run that fills it and those from it are bitwise one run."""
    store = {"stored": str(tmp_path / "store")}
    straight = run(folder, tmp_path / "straight", live(folder), estimator)
    filling = run(folder, tmp_path / "filling", {**live(folder), **store}, estimator)
    first, second = (run(folder, tmp_path / name, store, estimator) for name in ("first", "second"))
    assert first == second == filling
    assert first == pytest.approx(straight, rel=BLOCK_ERROR)
    assert straight[0] > 0.5 > abs(straight[-1] - straight[0]) > 0.01  # there is a loss to compare, and it moves


@pytest.mark.parametrize("sequences", ["dataset", "student"])
def test_a_run_over_hidden_states_of_a_service_is_that_of_the_embedded_teacher(
    folder: Path, tmp_path: Path, sequences: str
) -> None:
    """The full estimator, whole runs: on the dataset's text and on what the student writes as it is trained."""
    objective = {"objective": {"sequences": sequences, "estimator": "full"}}
    straight = run(folder, tmp_path / "straight", live(folder), **objective)
    with served(HFEngine(LocalTeacher(tiny.llama(2), tiny.tokenizer()))) as url:
        losses = run(folder, tmp_path / "over", {"url": url, "hidden": "bfloat16"}, **objective)
    assert losses == pytest.approx(straight, rel=HIDDEN_ERROR) and losses != straight
    assert abs(straight[-1] - straight[0]) > 0.01


def test_a_lossless_store_changes_nothing(folder: Path, tmp_path: Path) -> None:
    store = {"stored": str(tmp_path / "store"), "lossless": True}
    straight = run(folder, tmp_path / "straight", live(folder))
    run(folder, tmp_path / "filling", {**live(folder), **store})
    assert run(folder, tmp_path / "disk", store) == pytest.approx(straight, rel=1e-6)


def test_two_stores_serve_two_domains(folder: Path, tmp_path: Path) -> None:
    """Routed from disk as routed live, each store with its own teacher's evidence."""
    entries = [
        {**live(folder, name), "stored": str(tmp_path / name), "domains": [domain]}
        for name, domain in (("teacher", "math"), ("other", "code"))
    ]
    filling = run(folder, tmp_path / "filling", entries)
    assert run(folder, tmp_path / "disk", [{k: e[k] for k in ("stored", "domains")} for e in entries]) == filling
    crossed = [{"stored": a["stored"], "domains": b["domains"]} for a, b in zip(entries, entries[::-1], strict=True)]
    with pytest.raises(UserError, match="16 of the first 16 training sequences are not stored"):
        run(folder, tmp_path / "crossed", crossed)


def test_every_epoch_reads_the_same(tmp_path: Path) -> None:
    """With a learning rate of 0 and one batch an epoch, three epochs have one loss, bitwise. No two rows are equally
    long, so that their order in the batch does not depend on the epoch's shuffle."""
    rows = [{"prompt": "a" * (i + 1), "completion": "b" * (i % 3 + 2 * i + 1)} for i in range(6)]
    teacher, tokenizer = LocalTeacher(tiny.llama(2), tiny.tokenizer()), tiny.tokenizer()
    prompts = PromptEncoder(tokenizer, DataConfig()).encode_all(rows, completions=True)
    assert len({len(p.ids) + len(p.completion) for p in prompts}) == 6
    StoredTeacher(tmp_path / "store", teacher).score(completed(prompts, 0), 16)
    args = OPDConfig(
        output_dir=str(tmp_path / "run"),
        estimator="top_k",
        top_k=16,
        sequences="dataset",
        num_train_epochs=3,
        per_device_train_batch_size=6,
        learning_rate=0.0,
        logging_steps=1,
        save_strategy="no",
    )
    t = OPDTrainer(
        tiny.llama(1), args, StoredTeacher(tmp_path / "store"), train_dataset=rows, processing_class=tokenizer
    )
    t.train()
    losses = [line["loss"] for line in t.state.log_history if "loss" in line]
    assert len(losses) == 3 and len(set(losses)) == 1 and losses[0] > 0.5


def test_held_out_rows_are_measured_on_their_own_text_if_it_is_stored(folder: Path, tmp_path: Path) -> None:
    """Nothing is generated by a teacher that is not there; without stored held-out rows the run says so, and runs."""
    store, data = {"stored": str(tmp_path / "store")}, {"train": "train.jsonl", "heldout": "heldout.jsonl"}
    sections = {"data": {k: str(folder / v) for k, v in data.items()}}
    run(folder, tmp_path / "filling", {**live(folder), **store})
    run(folder, tmp_path / "unmeasured", store, **sections)
    after = json.loads((tmp_path / "unmeasured" / "after.json").read_text())
    assert after["not_measured"] and "student" not in after and "dataset" not in after
    assert len(after["student_answers"]) == 3 and "teacher_answers" not in after

    rows = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]
    prompts = PromptEncoder(tiny.tokenizer(), DataConfig()).encode_all(rows, completions=True)
    teacher = LocalTeacher(tiny.llama(2), tiny.tokenizer())
    filler = StoredTeacher(tmp_path / "store", teacher)
    filler.score(completed(prompts, 0), 16)
    filler.close()
    evaluated = {"eval_strategy": "steps", "eval_steps": 3}
    train = yaml.safe_load((tmp_path / "unmeasured.yaml").read_text())["train"]
    run(
        folder, tmp_path / "disk", store, **sections, train={**train, "output_dir": str(tmp_path / "disk"), **evaluated}
    )
    before, after = (json.loads((tmp_path / "disk" / f"{name}.json").read_text()) for name in ("before", "after"))
    assert before["dataset"]["reverse_kl"] > after["dataset"]["reverse_kl"] > 0 and "not_measured" not in after
    lines = [json.loads(line) for line in (tmp_path / "disk" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_dataset/reverse_kl" in line] == [3, 6]
    assert "on the dataset’s text" in write_report(tmp_path / "disk").read_text()


def test_on_policy_from_disk_is_refused_before_the_first_step(folder: Path, tmp_path: Path) -> None:
    store = {"stored": str(tmp_path / "store")}
    StoredTeacher(tmp_path / "store", LocalTeacher(tiny.llama(2), tiny.tokenizer())).close()
    with pytest.raises(UserError, match="only replays what is stored.*objective.sequences dataset"):
        run(folder, tmp_path / "run", store, objective={"estimator": "top_k", "top_k": 16})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    with pytest.raises(UserError, match="16 of the first 16 training sequences are not stored"):
        run(folder, tmp_path / "run", store)


def test_a_read_through_cache_lets_the_student_sample(folder: Path, tmp_path: Path) -> None:
    """On-policy with a model behind the store: what is not stored is asked, and the checks pass through the cache."""
    both = {**live(folder), "stored": str(tmp_path / "store")}
    losses = run(folder, tmp_path / "run", both, objective={"estimator": "top_k", "top_k": 16})
    assert all(loss > 0.5 for loss in losses)
