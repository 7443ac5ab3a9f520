"""From a checkpoint's folder through the commands: reinforced or trained, saved, and scored by its own engine.

LLaDA's, Dream's and SDAR's classes come as code with the checkpoint; BERT is a masked language model of transformers,
and a mixture of experts has a router whose balance loss must read masks of blocks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from llmdistill import cli
from llmdistill.diffusion.__main__ import main
from llmdistill.diffusion.attention import additive, full
from llmdistill.diffusion.backbone import MaskedDiffusionLM
from llmdistill.diffusion.stages import SFTConfig
from llmdistill.models.router import counting_tokens
from tests import tiny
from tests.composition.test_ground_truth import moe
from tests.evals import made

from . import runs
from .remote_models import write
from .test_remote_models import modules  # noqa: F401  (a fixture)


def is_even(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 2 == 0) for text in completions]


def files(folder: Path) -> list[str]:
    rows = [row | {"answer": "8"} for row in tiny.rows(12)]
    for name, part in (("train", rows[:8]), ("heldout", rows[8:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    words = ["--data.train", str(folder / "train.jsonl"), "--data.heldout", str(folder / "heldout.jsonl")]
    return [*words, "--max_steps", "2", "--per_device_train_batch_size", "2", "--save_strategy", "no"]


def bert(folder: Path) -> Path:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=264, num_attention_heads=2, **sizes)).float().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llada", "dream", "sdar", "bert"])
def test_it_is_trained_reinforced_and_scored_by_command(family: str, tmp_path: Path, modules: str) -> None:  # noqa: F811
    """SFT, RL on what that saved, and a suite on what RL saved: two steps each."""
    start = bert(tmp_path / family) if family == "bert" else write(family, tmp_path / family)
    trusted = [] if family == "bert" else ["--student.trust_remote_code", "true"]
    words = [*files(tmp_path), *trusted, "--max_new_tokens", "8"]
    words += ["--block_size", "4"] if family == "sdar" else []
    sft, rl = tmp_path / "sft", tmp_path / "rl"
    assert main([*words, "--stage", "sft", "--student.model", str(start), "--output_dir", str(sft)]) == 0
    rewarded = ["--reward", "tests.diffusion.test_doors:is_even", "--samples_per_prompt", "4", "--keep_low", "0"]
    words += ["--stage", "rl", "--keep_high", "1", "--reference_beta", "0.04", *rewarded]
    assert main([*words, "--student.model", str(sft / "student"), "--output_dir", str(rl)]) == 0
    denoiser, _ = MaskedDiffusionLM.from_pretrained(rl / "student", trust_remote_code=bool(trusted))
    assert (denoiser.shift, denoiser.block_size) == (family == "dream", 4 if family == "sdar" else None)
    (tmp_path / "suite").mkdir()
    scored = ["eval", str(made.suite(tmp_path / "suite")), "--model", str(rl / "student"), "--engine", "diffusion"]
    scored += ["--diffusion", '{"select": "threshold"}', "--output_dir", str(tmp_path / "scores")]
    assert cli.main([*scored, *(["--trust_remote_code"] if trusted else [])]) == 0
    results = json.loads(next((tmp_path / "scores").rglob("results.json")).read_text())
    assert results["problems"] == 6


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_routers_balance_is_over_tokens_under_masks_of_pairs_too(kind: str, tmp_path: Path) -> None:
    """With attention in blocks transformers reads the mask of [B, 1, T, T] as one of [B, T], and ends in an error; what
    is said of the tokens that are there is what a mask of [B, T] says."""
    model = moe(kind, 0.7).train()
    ids = torch.randint(4, 260, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    model.config.is_causal = False
    given = {"input_ids": ids, "output_router_logits": True, "position_ids": torch.arange(6).expand(2, 6)}
    expected = model(**given, attention_mask=mask).aux_loss
    bias = additive(full(mask) & mask.bool().unsqueeze(-1))
    with counting_tokens(model, bias):
        found = model(**given, attention_mask=bias).aux_loss
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    t = runs.trainer(tmp_path, SFTConfig, model=moe(kind, 0.7), block_size=4, max_steps=2, eval_dataset=None)
    t.train()
    balances = [line["distill/router_balance"] for line in t.state.log_history if "loss" in line]
    assert len(balances) == 2 and all(0.5 < b / 0.7 < 4 for b in balances)
