"""Models that are given packed sequences: each is predicted as it is alone, or the model is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmdistill.errors import UserError
from llmdistill.models.heads import forward_to_head, head_of
from llmdistill.models.packing import can_be_packed, layout_of, view_of
from llmdistill.models.passes import at_head
from llmdistill.texts import Rollout, collate
from llmdistill.texts.packing import Layout
from tests import tiny
from tests.students.architectures import small

# Longer and shorter than the windows of 32 tokens that the small models have.
LENGTHS = (45, 5, 70, 12, 33)


def text(change: int | None = None, lengths: tuple[int, ...] = LENGTHS) -> Rollout:
    """Sequences of arbitrary tokens; with ``change``, that one is another."""
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(20, 250, (n,), generator=g) for n in lengths]
    if change is not None:
        ids[change] = ids[change].flip(0) + 1
    return collate([x[:2].tolist() for x in ids], [x[2:].tolist() for x in ids], pad_id=0)


def rows(model: Any, rollout: Rollout) -> list[Tensor]:
    """Hidden states of every sequence's rows."""
    (found,) = at_head(model, head_of(model), [(rollout, None)], lambda rows_NH, view, _: rows_NH.clone())
    return list(found.split(rollout.row_counts))


KEPT_APART = {
    "llama": ("sdpa", "row"),
    "qwen3": ("sdpa", "row"),
    "gemma3_text": ("sdpa", "row"),  # windows in some layers
    "mistral": ("sdpa", "row"),  # a window in all
    "gpt2": ("sdpa", "row"),  # learnt positions
    "qwen3_moe": ("sdpa", "row"),
    "llama ": ("eager", "rows"),
    "gemma2": ("eager", "rows"),  # capped attention, which sdpa has not
}


@pytest.mark.parametrize("name", KEPT_APART)
def test_a_sequence_in_company_is_read_as_alone_and_another_one_beside_it_changes_nothing(name: str) -> None:
    implementation, layout = KEPT_APART[name]
    model = small(name.strip(), attn_implementation=implementation)
    model.config._attn_implementation = implementation
    assert layout_of(model) == layout
    together, padded = rows(model, replace(text(), packed=True)), rows(model, text())
    for b, (packed, expected) in enumerate(zip(together, padded, strict=True)):
        alone = rows(model, text().sequences([b]))[0]
        scale = float(alone.abs().max())
        assert float((packed - alone).abs().max()) <= 1e-5 * scale and float((packed - expected).abs().max()) <= (
            1e-5 * scale
        )
    for b in range(len(LENGTHS)):
        changed = rows(model, replace(text(change=b), packed=True))
        for c, (now, before) in enumerate(zip(changed, together, strict=True)):
            moved = float((now - before).abs().max())
            assert (moved > 1e-3) if c == b else (moved <= 1e-5 * float(before.abs().max())), (b, c)


# Of Bloom (slopes in place of positions) and GPT-OSS transformers makes the masks without looking at positions.
@pytest.mark.parametrize("name", ["mamba2", "recurrent_gemma", "rwkv", "qwen3_next", "lfm2_moe", "bloom", "gpt_oss"])
def test_states_that_run_into_the_next_sequence_are_refused_by_name(name: str) -> None:
    model = small(name)
    with pytest.raises(UserError, match=f"{type(model).__name__} does not keep packed sequences apart: .* Fix: "):
        layout_of(model)
    assert not can_be_packed(model)
    with pytest.raises(UserError, match="does not keep packed"):
        view_of(model, replace(text(), packed=True))


def test_blocks_that_are_counted_from_the_beginning_of_a_row_are_refused_by_name() -> None:
    model = small("llama4_text", layer_types=["chunked_attention", "full_attention"])
    with pytest.raises(UserError, match="layer 0 of Llama4ForCausalLM is chunked_attention, whose blocks would begin"):
        layout_of(model)


def test_no_mask_of_the_whole_row_is_made_and_none_where_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention runs once for each sequence, on it alone and without a mask."""
    model, seen = tiny.llama(1), list[tuple[int, int | None]]()
    own = torch.nn.functional.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
        seen.append((query.shape[2], None if attn_mask is None else attn_mask.numel()))
        assert (attn_mask is None) == options["is_causal"]
        return own(query, key, value, attn_mask=attn_mask, **options)

    head_of(model), layout_of(model)  # which try the model out
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    rows(model, replace(text(), packed=True))
    assert seen == [(n, None) for n in LENGTHS] * 2  # two layers
    seen.clear()
    rows(model, text())
    assert seen == [(70, 5 * 70 * 70)] * 2  # padded: transformers' own way, a mask of the batch


@pytest.mark.parametrize("layout", ["row", "rows"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_computed_again_for_the_gradient_keeps_sequences_apart_too(layout: Layout, reentrant: bool) -> None:
    def gradients(packs: bool, checkpointing: bool) -> dict[str, Tensor]:
        model = tiny.llama(1).train()
        if layout == "rows":
            model.config._attn_implementation = "eager"
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        rollout = replace(text(), packed=packs)
        view = view_of(model, rollout)
        found: list[Tensor] = []

        def loss(hidden_BTH: Tensor) -> Tensor:
            found.append(view.rows(hidden_BTH).square().mean())
            return found[0]

        output = forward_to_head(model, model.lm_head, view, loss)
        (found[0] + 0 * output.logits.sum()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, again = gradients(False, False), gradients(True, True)
    assert expected.keys() == again.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        assert float((again[name] - gradient).abs().max()) <= 1e-5 * scale, name
