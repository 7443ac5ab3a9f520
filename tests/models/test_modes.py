"""What a model is tried out on before and after training runs in the dtype that its attention has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmdistill.models import saving
from llmdistill.models.causality import check_causal
from llmdistill.models.generation import generate
from llmdistill.models.heads import plain_head, tried_transform
from llmdistill.models.modes import attends_in_16_bits, computes_in_16_bits
from llmdistill.models.saving import differs_from, logits_on_few_tokens, save_student
from llmdistill.texts import Prompt, Sampling
from tests import tiny

NAME = "flash_of_a_test"  # as transformers, the name is what says that it is flash attention
SEEN: list[torch.dtype] = []


def flash(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Casts as transformers does before it calls a kernel, and then takes no float32, as its kernels."""
    dtype = get_target_dtype(query, module) or query.dtype
    SEEN.append(dtype)
    if dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError("FlashAttention only supports fp16 and bf16")
    return sdpa_attention_forward(module, *(x.to(dtype) for x in (query, key, value)), *args, **kwargs)


@pytest.fixture
def flash_student() -> Iterator[Any]:
    ALL_ATTENTION_FUNCTIONS.register(NAME, flash)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    model = tiny.llama(0)
    model.config._attn_implementation = NAME
    SEEN.clear()
    yield model
    ALL_ATTENTION_FUNCTIONS._global_mapping.pop(NAME)
    ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(NAME)


def test_float32_weights_are_tried_out_in_16_bits_where_attention_has_no_others(
    flash_student: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert attends_in_16_bits(flash_student) and computes_in_16_bits(flash_student)
    check_causal(flash_student, flash_student)
    found = tried_transform(flash_student, plain_head(flash_student), flash_student.config)
    assert (found.logit_scale, found.softcap) == (1.0, None)
    save_student(flash_student, tmp_path, tiny.tokenizer())

    def loaded(folder: Path, model: Any) -> tuple[Any, list[str]]:
        again = LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
        again.config._attn_implementation = NAME  # which from_pretrained would look for among the kernels
        return again.eval(), []

    monkeypatch.setattr(saving, "load_saved", loaded)
    assert differs_from(logits_on_few_tokens(flash_student, flash_student), tmp_path, flash_student) is None
    rollout = generate(flash_student, [Prompt([5, 6, 7], "")], Sampling(4, seed=0), eos_ids=(1,), pad_id=0)
    assert rollout.num_rows > 0 and set(SEEN) == {torch.bfloat16}


def test_other_weights_are_tried_out_as_they_are() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        model = tiny.llama(0)
        assert not attends_in_16_bits(model) and logits_on_few_tokens(model, model).dtype == torch.float32
        inside = logits_on_few_tokens(model, model)
    assert torch.equal(inside, logits_on_few_tokens(model, model))  # autocast around it changes nothing
