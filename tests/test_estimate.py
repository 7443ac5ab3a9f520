"""The estimate of a run's memory and bytes: against what was measured, for the GPU recipes, and before loading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from llmdistill import OPDConfig, RolloutConfig, cli
from llmdistill.errors import UserError
from llmdistill.objectives.streaming import rows_at_once
from llmdistill.preflight import estimate, foreseen
from llmdistill.recipe.command_line import Recipe, parse
from llmdistill.wire.blocks import BlockHeader, ScoreBlock, encode
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
# hidden, MLP, layers, heads, tied: as their config.json has them; all have 8 key heads of 128 and 151,936 columns.
QWEN3 = {"1.7B": (2048, 6144, 28, 16, True), "4B": (2560, 9728, 36, 32, True), "8B": (4096, 12288, 36, 32, False)}
PARAMETERS = {"1.7B": 1.72e9, "4B": 4.02e9, "8B": 8.19e9}  # of the model cards


def qwen3(size: str) -> Qwen3Config:
    hidden, mlp, layers, heads, tied = QWEN3[size]
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
    )


@pytest.mark.slow
def test_it_is_what_runs_take() -> None:
    """Runs ruled by weights, by activations and by logits: no more than a quarter above, or a twentieth below.

    Of a large block the allocator gives every byte back at once, as it does not by default: what it keeps for later
    was 60 to 190 MiB, another figure in every run.
    """
    program = str(Path(__file__).with_name("memory_shapes.py"))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run([sys.executable, program], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 3
    for shape in found:
        assert 0.95 < shape["estimated"] / shape["measured"] < 1.25, shape


@pytest.mark.parametrize("size", QWEN3)
def test_parameters_are_counted_without_weights(size: str) -> None:
    assert estimate.Shape.of_config(qwen3(size)).parameters == pytest.approx(PARAMETERS[size], rel=0.01)


@pytest.mark.parametrize(
    ("recipe", "student", "teacher", "processes", "zero"),
    [
        ("one_gpu", "1.7B", "8B", 1, 0),
        ("eight_gpus", "1.7B", "8B", 8, 2),
        ("served_teacher", "4B", "", 4, 2),
        ("two_nodes", "4B", "", 8, 2),
    ],
)
def test_gpu_recipes_fit_into_80_gib(
    recipe: str, student: str, teacher: str, processes: int, zero: int, tmp_path: Path, capsys: Any
) -> None:
    words = ["--config", str(ROOT / "recipes" / "gpu" / f"{recipe}.yaml"), "--bf16", "true"]
    for section, size in (("student", student), ("teacher", teacher)):
        if size:
            qwen3(size).save_pretrained(tmp_path / section)
            words += [f"--{section}.model", str(tmp_path / section)]
    machine = ["--estimate", "--gpus", str(processes), "--zero", str(zero), "--gpu_gib", "80"]
    assert cli.main(["doctor", *machine, *words, "--output_dir", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "activations" in shown and ("over the wire" in shown) == (not teacher)
    assert cli.main(["doctor", *machine[:-1], "24", *words, "--output_dir", str(tmp_path / "run")]) == 2
    assert "to lower it" in capsys.readouterr().out


def test_shares_of_zero_and_of_an_adapter() -> None:
    shape = estimate.Shape.of_config(qwen3("1.7B"))
    args = OPDConfig(output_dir="unused")
    alone, zero1, zero2, zero3 = (
        estimate.of_shapes(args, shape, [], processes=8, zero=stage).items for stage in (0, 1, 2, 3)
    )
    assert alone["optimizer"] == 8 * shape.parameters == 8 * zero1["optimizer"] and zero1["weights"] == alone["weights"]
    assert alone["gradients"] == zero1["gradients"] == 8 * zero2["gradients"]
    assert zero2["weights"] == alone["weights"] == pytest.approx(8 * zero3["weights"], abs=8)
    adapter = estimate.of_shapes(args, shape, [], wide=False, lora_r=16).items
    assert adapter["optimizer"] < alone["optimizer"] / 50 and adapter["weights"] < 0.52 * alone["weights"]


def test_passes_by_tokens_are_as_large_as_their_budget() -> None:
    shape = estimate.Shape.of_config(qwen3("1.7B"))

    def activations(**settings: Any) -> int:
        args = OPDConfig(output_dir="unused", rollouts=RolloutConfig(max_new_tokens=1000), **settings)
        return estimate.of_shapes(args, shape, []).items["activations"]

    four = activations(per_device_train_batch_size=4)
    assert activations(per_device_train_batch_size=8, batch_tokens=4000) == four
    assert activations(per_device_train_batch_size=2, gradient_accumulation_steps=8, batch_tokens=4000) == four / 2
    assert activations(per_device_train_batch_size=4, batch_tokens=100) == four / 4  # a sequence is never cut


def test_checkpointing_and_fused_kernels_take_less() -> None:
    shape, plain = estimate.Shape.of_config(qwen3("1.7B")), {"wide": True, "bf16": True}
    kept = shape.activations(4096, 4096, checkpointing=False, **plain)
    assert shape.activations(4096, 4096, checkpointing=True, **plain) < kept / 8
    args = OPDConfig(output_dir="unused", chunk_tokens=1024)
    of_adapter = {"wide": False, "lora_r": 8}  # whose head has no gradient
    on_cpu, on_gpu = (
        estimate.of_shapes(args, shape, [], gpu=gpu, **of_adapter).items["logits chunk"] for gpu in (False, True)
    )
    assert on_gpu < on_cpu / 2


@pytest.mark.parametrize("gib", [16, 80])
def test_a_chunk_is_as_large_as_the_engine_makes_it(gib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = type("Properties", (), {"total_memory": gib * GIB})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for columns in (32_000, 151_936):
        assert estimate._chunk(columns, gib * GIB, True) == rows_at_once(columns, torch.device("cuda"))
    assert estimate._chunk(32_000, 0, False) == rows_at_once(32_000, torch.device("cpu"))


@pytest.mark.parametrize(("listed", "columns"), [(64, 151_936), (1, 260), (20, 50_257), (264, 264)])
def test_bytes_of_a_block_are_those_that_are_written(listed: int, columns: int) -> None:
    rows, header = 40, BlockHeader("", "", listed, columns, support="teacher", dtype="float16")
    logprobs, ids = torch.randn(rows, columns).log_softmax(-1).topk(listed)
    block = ScoreBlock(slice(1, rows + 1), logprobs[:, 0].clone(), ids.int(), logprobs, header)
    beside = 80  # bytes of a block that are of no row
    assert len(encode(block)) == pytest.approx(rows * estimate.block_bytes(listed, columns) + beside, abs=40)


@pytest.mark.parametrize(("given", "looked_at"), [(None, "0"), ("2,3", "2"), ("", "")])
def test_the_doctor_looks_at_one_gpu_of_several(
    given: str | None, looked_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run it would be refused on a machine with several."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given or "")
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    tiny.llama(1).config.save_pretrained(tmp_path / "student")
    words = ["--student.model", str(tmp_path / "student"), "--data.train", "x", "--output_dir", str(tmp_path / "run")]
    assert cli.main(["doctor", "--estimate", *words]) == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == looked_at


def recipe_of(folder: Path, *words: str) -> Recipe:
    tiny.llama(1).config.save_pretrained(folder / "student")
    models = ["--student.model", str(folder / "student"), "--teacher.model", str(folder / "student")]
    return parse(OPDConfig, [*models, "--data.train", "x.jsonl", "--output_dir", str(folder / "run"), *words])


def test_too_much_is_said_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder holds a config and no weights."""
    recipe = recipe_of(tmp_path, "--max_new_tokens", "4096", "--per_device_train_batch_size", "64")
    assert foreseen.too_large(recipe_of(tmp_path)) is None
    found = foreseen.foreseen(recipe)
    assert found is not None
    monkeypatch.setattr(foreseen, "device_memory", lambda device: found[0].peak - 1)
    assert "this run takes about" in str(foreseen.too_large(recipe))
    assert "--gradient_checkpointing true" in str(foreseen.too_large(recipe))
    monkeypatch.setattr(foreseen, "device_memory", lambda device: found[0].fixed - 1)
    with pytest.raises(UserError, match="weights and optimizer alone take about"):
        foreseen.too_large(recipe)
    recipe.flags.skip_checks = ("memory",)
    assert "this run takes about" in str(foreseen.too_large(recipe))


def test_a_config_that_cannot_be_had_is_loadings_to_say(tmp_path: Path) -> None:
    assert foreseen.too_large(parse(OPDConfig, ["--student.model", str(tmp_path), "--data.train", "x"])) is None
