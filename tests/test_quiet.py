"""What libraries say beside our own lines: no bars of loading, and those of downloads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging

from llmdistill.quiet import quiet
from tests import tiny


@pytest.fixture
def as_found() -> object:
    was = logging.is_progress_bar_enabled(), are_progress_bars_disabled(), logging.get_verbosity()
    yield
    (logging.enable_progress_bar if was[0] else logging.disable_progress_bar)()
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        (disable_progress_bars if was[1] else enable_progress_bars)()
    logging.set_verbosity(was[2])


def test_downloads_keep_their_bars(as_found: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    quiet()
    assert not logging.is_progress_bar_enabled() and not are_progress_bars_disabled()


@pytest.mark.slow
def test_a_command_loads_a_model_without_a_bar(tmp_path: Path) -> None:
    tiny.llama(1).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "2+2="}\n')
    words = ["generate", "--prompts", str(tmp_path / "prompts.jsonl"), "--teacher", str(tmp_path / "model")]
    words += ["--teacher.engine", "hf", "--out", str(tmp_path / "out.jsonl"), "--max_new_tokens", "3"]
    done = subprocess.run([sys.executable, "-m", "llmdistill.cli", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Loading weights" not in done.stderr and "it/s" not in done.stderr
