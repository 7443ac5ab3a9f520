"""Rows without a length, splits and several evaluation sets, from every trainer and from Python and a recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from accelerate.data_loader import IterableDatasetShard
from datasets import Dataset, DatasetDict, IterableDataset
from safetensors.torch import load_file

from llmdistill import OPDConfig, OPDTrainer, RolloutConfig, UserError
from llmdistill.diffusion import MaskedDiffusionTrainer
from llmdistill.diffusion.stages import SFTConfig
from llmdistill.methods.redi_config import REDIConfig
from llmdistill.opd import main
from llmdistill.recipe.data_config import DataConfig
from llmdistill.redi import REDITrainer
from llmdistill.taid import TAIDConfig, TAIDTrainer
from llmdistill.teachers.local import LocalTeacher
from llmdistill.texts.streams import ExampleStream
from tests import tiny
from tests.trainer.test_gopd import bitwise, weights

ROWS = tiny.rows(11)
STEPS = 5


def generated() -> Iterator[dict[str, Any]]:
    yield from ROWS


class Endless:
    """An iterable of no end, that says how far it was read."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            self.read += 1
            yield ROWS[self.read % len(ROWS)]


def note(draw: Any, seen: list[list[int]], examples: Any) -> Any:
    seen.append([p.row for p in examples])
    return draw(examples)


def opd(folder: Path, rows: Any, config: Any = OPDConfig, trainer: Any = OPDTrainer, **more: Any) -> Any:
    settings = {"max_steps": STEPS, "learning_rate": 1e-2, "save_strategy": "no", "heldout_sequences": 3, **more}
    data = settings.pop("data", None)
    args = config(
        output_dir=str(folder),
        rollouts=RolloutConfig(max_new_tokens=4),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        **{k: v for k, v in settings.items() if k != "eval_dataset"},
    )
    return trainer(
        tiny.llama(1),
        args,
        LocalTeacher(tiny.llama(2), tiny.tokenizer()),
        train_dataset=rows,
        eval_dataset=settings.get("eval_dataset"),
        processing_class=tiny.tokenizer(),
        data=data,
    )


def test_what_is_streamed_is_trained_on_in_its_order_epoch_after_epoch(tmp_path: Path) -> None:
    """5 steps of 4 prompts are nearly two epochs of 11 rows; a function, a datasets stream and one's own are alike."""
    seen: list[list[int]] = []
    trained = []
    for name, rows in (("f", generated), ("d", IterableDataset.from_generator(generated)), ("g", generated())):
        t = opd(tmp_path / name, rows, **({"max_steps": 2} if name == "g" else {}))
        noted = partial(note, t.draw, seen)
        t.draw = noted
        t.train()
        trained.append(weights(t.model))
    order = [i % 11 for i in range(4 * STEPS)]
    whole = [order[4 * i : 4 * i + 4] for i in range(STEPS)]
    assert seen == [*whole, *whole, *whole[:2]]
    bitwise(trained[0], trained[1])


@pytest.mark.parametrize("config", [OPDConfig, TAIDConfig])
def test_a_resumed_stream_goes_on_where_it_was(tmp_path: Path, config: Any) -> None:
    """In its second epoch, to the bit, and shuffled too."""
    trainer = OPDTrainer if config is OPDConfig else TAIDTrainer
    stream = IterableDataset.from_generator(generated).shuffle(seed=3, buffer_size=4)
    saves = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "lr_scheduler_type": "constant"}
    whole = opd(tmp_path / "whole", stream, config, trainer, **saves)
    whole.train()
    torn = opd(tmp_path / "torn", stream, config, trainer, **saves)
    torn.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torn.state.global_step == 6
    bitwise(weights(whole.model), weights(torn.model))


def test_processes_share_a_stream_out_as_they_share_a_list_out() -> None:
    """Batches of two go to the two processes in turn, in both of which the stream is read whole."""
    shares = [
        IterableDatasetShard(ExampleStream(Endless(), one_example), batch_size=2, num_processes=2, process_index=rank)
        for rank in (0, 1)
    ]
    first = [list(islice(iter(share), 4)) for share in shares]
    assert first == [[0, 1, 4, 5], [2, 3, 6, 7]]


def one_example(row: Any, index: int) -> list[int]:
    return [index]


def test_no_more_is_read_than_is_needed(tmp_path: Path) -> None:
    rows = Endless()
    opd(tmp_path, rows).train()
    assert 4 * STEPS <= rows.read <= 64 + 4  # the head that the checks look at, and a batch that is fetched ahead


def test_the_other_trainers(tmp_path: Path) -> None:
    """Pairs, and a denoiser: a stream of rows is refused by none."""
    pairs = [{**row, "chosen": row["completion"], "rejected": row["completion"] + "!"} for row in ROWS]
    heldout = [{"prompt": f"held out {i}", "chosen": "yes", "rejected": "no"} for i in range(5)]
    args: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no"}
    t: Any = REDITrainer(
        tiny.llama(1),
        REDIConfig(output_dir=str(tmp_path / "pairs"), **args),
        train_dataset=lambda: iter(pairs),
        eval_dataset={"a": heldout[:2], "b": heldout[2:]},
        processing_class=tiny.tokenizer(),
    )
    t.train()
    found = t.evaluate()
    parts = [found[f"eval_{name}_redi/margin"] for name in ("a", "b")]
    assert found["eval_redi/margin"] == pytest.approx((2 * parts[0] + 3 * parts[1]) / 5, rel=1e-5)
    d: Any = MaskedDiffusionTrainer(
        tiny.llama(1), SFTConfig(output_dir=str(tmp_path / "sft"), **args), train_dataset=generated,
        processing_class=tiny.tokenizer(),
    )  # fmt: skip
    d.train()
    assert t.state.global_step == d.state.global_step == 2
    assert isinstance(t.train_dataset, ExampleStream) and isinstance(d.train_dataset, ExampleStream)


def test_what_a_stream_needs_is_said_before_anything_is_made(tmp_path: Path) -> None:
    for settings, line in (
        ({"max_steps": -1}, "the training rows have no length, and train.max_steps is -1.*Fix: --max_steps N"),
        ({"dataloader_num_workers": 2}, "train.dataloader_num_workers is 2"),
    ):
        with pytest.raises(UserError, match=line):
            opd(tmp_path, generated, **settings)
    with pytest.raises(UserError, match="no rows, or none that can be used"):
        opd(tmp_path, lambda: iter(()))
    with pytest.raises(UserError, match="train_dataset is 'rows.jsonl', a str"):
        opd(tmp_path, "rows.jsonl")


def test_rows_that_cannot_be_read_are_left_out_of_a_stream_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": ""}, *ROWS, {"prompt": 5}]
    t = opd(tmp_path / "a", lambda: iter(rows), data=DataConfig(bad_rows="skip"))
    t.train()
    assert sorted(t.encode.bad) == [0, 12]
    with pytest.raises(UserError, match="row 0: prompt is empty"):
        opd(tmp_path / "b", lambda: iter(rows))


def test_splits_and_several_evaluation_sets(tmp_path: Path) -> None:
    """What all sets come to is what their sequences come to, and each is beside it."""
    splits = DatasetDict(train=Dataset.from_list(ROWS[:6]), test=Dataset.from_list(ROWS[6:]))
    t = opd(tmp_path, splits, eval_dataset={"a": ROWS[6:8], "b": generated()})
    assert [p.row for p in t.train_dataset] == list(range(6))
    found = t.evaluate()
    tokens = [found[f"eval_{name}_student/tokens"] for name in ("a", "b")]
    assert found["eval_student/tokens"] == sum(tokens) and t.eval_dataset.sizes == {"a": 2, "b": 3}
    mean = sum(n * found[f"eval_{name}_student/reverse_kl"] for n, name in zip(tokens, ("a", "b"), strict=True))
    assert found["eval_student/reverse_kl"] == pytest.approx(mean / sum(tokens), rel=1e-5)
    assert "eval_loss" in found and "eval_a_teacher/forward_kl" in found
    with pytest.raises(UserError, match="train_dataset has the splits train, test, not 'validation'"):
        opd(tmp_path, splits, data=DataConfig(split="validation"))


@pytest.mark.slow
def test_a_recipe_that_streams_with_two_held_out_sets(tmp_path: Path) -> None:
    """Resumed it is the undisturbed run; --max_steps is asked for before a model is loaded."""
    tokenizer = tiny.tokenizer()
    for name, seed in (("student", 1), ("teacher", 2)):
        tiny.llama(seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "{no row\n")
    for i, name in enumerate(("a", "b")):
        row = {"prompt": f"held out {i}"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    sets = f"{{a: {tmp_path / 'a.jsonl'}, b: {tmp_path / 'b.jsonl'}}}"
    words = [
        *("--student.model", str(tmp_path / "student"), "--teacher.model", str(tmp_path / "teacher")),
        *("--teacher.dtype", "float32", "--data.train", str(tmp_path / "train.jsonl"), "--data.heldout", sets),
        *("--data.streaming", "true", "--rollouts.max_new_tokens", "4", "--per_device_train_batch_size", "2"),
        *("--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2", "--learning_rate", "1e-3"),
        *("--lr_scheduler_type", "constant", "--data.bad_rows", "skip"),
    ]
    with pytest.raises(UserError, match="max_steps"):
        main([*words, "--student.model", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "none")])
    for name, steps in (("whole", "8"), ("torn", "4")):
        assert main([*words, "--max_steps", steps, "--output_dir", str(tmp_path / name)]) == 0
    assert main([*words, "--max_steps", "8", "--output_dir", str(tmp_path / "torn"), "--resume"]) == 0
    saved = [load_file(tmp_path / name / "student" / "model.safetensors") for name in ("whole", "torn")]
    bitwise(*saved)
    assert json.loads((tmp_path / "whole" / "summary.json").read_text())["rows"] == {"unreadable": 1}
    assert "1 unreadable" in (tmp_path / "whole" / "report.html").read_text()
    logged = [
        json.loads(line)
        for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
        if "eval_a_student/reverse_kl" in line
    ]
    assert len(logged) == 4 and all("eval_b_student/reverse_kl" in line for line in logged)
