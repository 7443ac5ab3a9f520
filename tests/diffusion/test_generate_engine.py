"""A denoiser writes traces: ``llmdistill generate --engine diffusion``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill import UserError
from llmdistill.datagen import generate
from llmdistill.datagen.roles import RoleConfig
from llmdistill.datagen.schema import Trace
from llmdistill.datagen.tables import read_rows
from llmdistill.diffusion import MaskedDiffusionLM
from tests import tiny


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny block-diffusion model."""
    folder, tokenizer = tmp_path_factory.mktemp("denoiser"), tiny.tokenizer()
    MaskedDiffusionLM.of(tiny.llama(1), tokenizer, block_size=4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def written(out: Path, model: str, **more: Any) -> list[Trace]:
    role = {"model": model, "engine": "diffusion", "dtype": "float32", **more}
    rows = [{"prompt": f"{n} + {n}?"} for n in range(6)]
    generate(rows, "plain", {"teacher": role}, out, n=2, sampling={"max_new_tokens": 8, "temperature": 1.0})
    return [Trace.of(row) for row in read_rows(out)]


def test_it_writes_and_company_changes_nothing(denoiser: str, tmp_path: Path) -> None:
    """By a threshold, with the cache of blocks; log-probs are of what each token was drawn from."""
    settings = {"diffusion": {"select": "threshold", "threshold": 0.9, "cache": "block"}}
    found = written(tmp_path / "t.jsonl", denoiser, **settings)
    assert len(found) == 12 and len({trace.completion for trace in found}) > 6
    mask = MaskedDiffusionLM.from_pretrained(denoiser, dtype=torch.float32)[0].mask_token_id
    for trace in found:
        assert 0 < len(trace.token_ids or ()) <= 8 and mask not in (trace.token_ids or ())
        assert all(logp <= 0 for logp in trace.logprobs or (1.0,))
    alone = written(tmp_path / "alone.jsonl", denoiser, batch_size=1, **settings)
    assert [trace.completion for trace in alone] == [trace.completion for trace in found]


def test_its_settings_are_refused_elsewhere(denoiser: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="diffusion is .*select"):
        RoleConfig(model=denoiser, engine="hf", diffusion={"select": "threshold"})
    with pytest.raises(UserError, match="diffusion has 'tau'"):
        written(tmp_path / "t.jsonl", denoiser, diffusion={"tau": 0.9})
