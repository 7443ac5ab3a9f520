"""A student of letters, a teacher of another tokenizer: two steps, the same by whatever road the teacher is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmdistill.recipe.config import RolloutConfig
from llmdistill.teachers.base import Teacher
from tests import tiny
from tests.methods.test_chunks import make

Trained = dict[str, tuple[list[float], torch.Tensor]]  # method -> the losses, and all weights after the steps


def letters() -> Any:
    """A tokenizer of ASCII's printable characters: what a student without training writes in it, any teacher can read.

    SmolLM2's own has no token for some control characters, and no byte fallback: bytes at random are not aligned.
    """
    vocabulary = {token: i for i, token in enumerate([*tiny.SPECIAL, *map(chr, range(33, 127)), "Ġ"])}
    tok = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tok.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=tiny.SPECIAL[2:]
    )
    fast.chat_template = tiny.TEMPLATE
    return fast


def trained(teacher: Teacher, folder: Path, *methods: str) -> Trained:
    """Two steps by each method: ``alm`` on given text, ``chunk_opd`` on the student's own."""
    found = {}
    for method in methods:
        tok = letters()
        student = tiny.llama(1, vocab=len(tok))
        settings: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.05, "rollouts": RolloutConfig(max_new_tokens=12)}
        settings |= {"debias": False} if method == "alm" else {}
        t = make(folder / method, method, student=student, teacher=teacher, processing_class=tok, **settings)
        before = torch.cat([p.detach().flatten() for p in student.parameters()])
        t.train()
        lines = [line for line in t.state.log_history if "loss" in line]
        assert len(lines) == 2 and all(line["teacher/aligned_bytes"] == 1.0 for line in lines)
        weights = torch.cat([p.detach().flatten() for p in student.parameters()])
        assert float((weights - before).abs().max()) > 1e-4
        found[method] = [line["loss"] for line in lines], weights
    return found


def assert_same(found: Trained, expected: Trained, tolerance: float = 1e-4) -> None:
    for method, (losses, weights) in found.items():
        assert losses == pytest.approx(expected[method][0], rel=5 * tolerance, abs=1e-6), method
        torch.testing.assert_close(weights, expected[method][1], atol=tolerance, rtol=0)
