"""Hidden states of a model's layers, as they are computed."""

from __future__ import annotations

import pytest
import torch

from llmdistill.errors import UserError
from llmdistill.models.layers import captured, check_layers, decoder_layers, hidden_size, no_rows
from tests import tiny

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.mark.parametrize("adapted", [False, True])
def test_states_are_those_that_transformers_puts_out(adapted: bool) -> None:
    """output_hidden_states[k + 1] is layer k's, but for the last, which is normed there and not here."""
    model = tiny.llama(1, layers=3)
    if adapted:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    with captured(model, (0, 1, -1)) as found:
        out = model(IDS, output_hidden_states=True)
    assert sorted(found) == [-1, 0, 1]
    for layer in (0, 1):
        torch.testing.assert_close(found[layer], out.hidden_states[layer + 1])
    inner = model.get_base_model() if adapted else model
    torch.testing.assert_close(inner.model.norm(found[-1]), out.hidden_states[-1])
    assert found[0].requires_grad and hidden_size(model) == 32


def test_nothing_is_left_behind() -> None:
    model = tiny.llama(1)
    with pytest.raises(RuntimeError, match="stop"), captured(model, (0, 0, 1)):
        assert [len(layer._forward_hooks) for layer in decoder_layers(model)] == [1, 1]
        raise RuntimeError("stop")
    assert not any(layer._forward_hooks for layer in decoder_layers(model))
    assert [x.shape for x in no_rows(model, (0, 1))] == [(0, 32), (0, 32)]


@pytest.mark.parametrize("layer", [2, -3])
def test_a_layer_that_is_not_there(layer: int) -> None:
    check_layers(tiny.llama(1), (0, 1, -1, -2), "it")
    with pytest.raises(UserError, match=f"it names layer {layer}, and LlamaForCausalLM has 2. Fix: numbers from"):
        check_layers(tiny.llama(1), (layer,), "it")
