"""The terminal sees the text denoise, without a character broken in two."""

from __future__ import annotations

import io

import torch
from rich.console import Console

from llmdistill.diffusion.backbone import MaskedDiffusionLM
from llmdistill.diffusion.generation_config import DiffusionGenerationConfig
from llmdistill.diffusion.sampling import generate
from llmdistill.diffusion.streamer import TerminalStreamer

from .. import tiny


def test_known_words_stand_and_masked_ones_are_blocks() -> None:
    tokenizer = tiny.tokenizer()
    ids = tokenizer("né da", add_special_tokens=False).input_ids
    streamer = TerminalStreamer(tokenizer)
    assert streamer.text(ids, [False] * len(ids)) == "né da"
    assert streamer.text(ids, [True, False, False, True, False, True]) == "░é░d░"


def test_every_step_is_shown_to_the_end() -> None:
    model, out = MaskedDiffusionLM(tiny.llama(0), 263), io.StringIO()
    streamer = TerminalStreamer(tiny.tokenizer(), Console(file=out, force_terminal=True, width=60))
    generate(model, torch.tensor([[5, 6, 7]]), config=DiffusionGenerationConfig(max_new_tokens=4), streamer=streamer)
    assert out.getvalue().count("░") >= 3 + 2 + 1, "the masks that are left after each step"
    assert not streamer.live.is_started
