"""A student that sees the token it is scored on is refused before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel

from llmdistill import OPDConfig, OPDTrainer, UserError
from llmdistill.models.causality import check_causal
from tests import tiny
from tests.students.architectures import small
from tests.students.multimodal import wrapped


def test_a_prefix_that_is_read_both_ways_is_refused() -> None:
    model = wrapped("paligemma")
    with pytest.raises(UserError, match="PaliGemmaForConditionalGeneration looks ahead: .* Fix: "):
        check_causal(model, model)


def test_an_encoder_is_refused_before_the_first_step(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "vocab_size": 264, "is_decoder": False}
    torch.manual_seed(0)
    student = BertLMHeadModel(BertConfig(**sizes))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    args = OPDConfig(output_dir=str(tmp_path), sequences="dataset", max_steps=1)
    rows, tokenizer = tiny.rows(4), tiny.tokenizer()
    trainer = OPDTrainer(student, args, tiny.llama(2), train_dataset=rows, processing_class=tokenizer)
    with pytest.raises(UserError, match="BertLMHeadModel looks ahead"):
        trainer.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())


def test_a_teacher_that_has_seen_what_it_scores_is_refused(tmp_path: Path) -> None:
    args = OPDConfig(output_dir=str(tmp_path), sequences="dataset", max_steps=1)
    rows, tokenizer = tiny.rows(4), tiny.tokenizer()
    trainer = OPDTrainer(tiny.llama(1), args, wrapped("paligemma"), train_dataset=rows, processing_class=tokenizer)
    with pytest.raises(UserError, match="PaliGemmaForConditionalGeneration looks ahead"):
        trainer.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_readers_from_left_to_right_pass(dtype: torch.dtype) -> None:
    for name in ("llama", "qwen3_moe", "mamba2", "gemma3_text"):
        model = small(name).to(dtype)
        check_causal(model, model)
