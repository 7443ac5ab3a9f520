"""What models do to the output of their heads is found by trying, whatever their configs call it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmdistill.errors import UserError
from llmdistill.models.heads import head_of, hidden_states
from llmdistill.models.transforms import Transform, known_logits, transform_of
from llmdistill.objectives.projection import Projection
from tests.models.test_heads import rollout
from tests.students.architectures import small
from tests.tiny import llama

# What head(hidden) is multiplied by and capped at. All are set to what their config names it, none at its default.
SCALED: dict[str, tuple[dict[str, Any], float, float | None]] = {
    "cohere": ({"logit_scale": 0.3}, 0.3, None),
    "granite": ({"logits_scaling": 3.0}, 1 / 3, None),
    "gemma2": ({"final_logit_softcapping": 7.0}, 1.0, 7.0),
    "falcon_h1": ({"lm_head_multiplier": 0.2}, 0.2, None),
    "hyperclovax": ({"logits_scaling": 3.0}, 3.0, None),  # the name under which Granite divides
    "minicpm3": ({"dim_model_base": 16}, 1.0, None),  # divides before the head, and names it as Granite does
    "recurrent_gemma": ({"logits_soft_cap": 5.0}, 1.0, 5.0),
    "nanochat": ({"final_logit_softcapping": 4.0}, 1.0, 4.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", SCALED)
def test_logits_are_those_of_the_model(architecture: str, dtype: torch.dtype) -> None:
    settings, scale, cap = SCALED[architecture]
    model, batch = small(architecture, **settings).to(dtype), rollout()
    head = head_of(model)
    assert (head.logit_scale, head.softcap) == (scale, cap)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, use_cache=False).logits.float()
    projection = Projection.of(head.linear, dtype, None, head.logit_scale, head.softcap)
    ours = projection.rescale(projection.matmul(hidden_states(model, batch))).float()
    rounding = 1e-5 if dtype == torch.float32 else 4e-2  # 16 bits: scaled and capped in them by the model
    assert (ours - logits).abs().max() < rounding * logits.abs().max()


@pytest.mark.parametrize("change", [lambda x: x + 1, lambda x: x[..., :-1], lambda x: x.clamp(-5, 5), torch.square])
def test_what_is_no_scale_and_no_cap_is_refused(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(0)
    forward = type(model).forward

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = change(output.logits)
        return output

    monkeypatch.setattr(type(model), "forward", changed)
    with pytest.raises(UserError, match="LlamaForCausalLM does more to the logits of its head"):
        head_of(model)


def test_a_head_that_the_forward_does_not_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(0)
    beside = torch.nn.Linear(32, 264, bias=False)
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: beside)
    with pytest.raises(UserError, match="does not use its output head"):
        head_of(model)


@pytest.mark.parametrize("scale", [1.0, 0.0123, 17.0])
@pytest.mark.parametrize("cap", [None, 2.5, 50.0])
def test_a_transform_is_read_from_what_it_does(scale: float, cap: float | None) -> None:
    put_in = known_logits(torch.zeros(1, 4, 8), 300)
    true = Transform(scale, cap)
    found = transform_of(put_in, true(put_in), AutoModelForCausalLM.from_config(llama(0).config).config)
    assert found is not None
    torch.testing.assert_close(found(put_in), true(put_in), rtol=1e-4, atol=1e-5)


def test_trying_leaves_nothing_behind() -> None:
    model = llama(0).train()
    before = torch.random.get_rng_state()
    head_of(model)
    assert model.training and "forward" not in vars(model.lm_head)
    assert torch.equal(before, torch.random.get_rng_state())
