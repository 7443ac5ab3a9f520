"""Causal models of transformers, made bidirectional or block-causal, tiny and real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RecurrentGemmaConfig,
)

from llmdistill.diffusion.attention import additive, block_ids, noisy_and_clean
from llmdistill.diffusion.backbone import MaskedDiffusionLM, check_layers
from llmdistill.diffusion.losses import token_ce
from llmdistill.errors import UserError

from .. import tiny

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
KV = {**SIZES, "num_key_value_heads": 2}
MASK = 63
MODELS: dict[str, Any] = {
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(**KV)),
    "qwen2": (Qwen2ForCausalLM, lambda: Qwen2Config(**KV)),
    "qwen3": (Qwen3ForCausalLM, lambda: Qwen3Config(**KV, head_dim=16)),
    "gpt2": (GPT2LMHeadModel, lambda: GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64)),
    "neox": (GPTNeoXForCausalLM, lambda: GPTNeoXConfig(**SIZES)),
    "bert": (BertForMaskedLM, lambda: BertConfig(**SIZES)),
}


def made(name: str, implementation: str = "sdpa") -> Any:
    model, config = MODELS[name]
    torch.manual_seed(0)
    return model._from_config(config(), attn_implementation=implementation).eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_the_last_token_is_seen_by_all_or_by_its_block(name: str, implementation: str) -> None:
    """Row 15, through the class: also that padding on the left changes nothing but positions that are not there."""
    ids = torch.randint(60, (2, 12), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % 60
    for block, sees in ((None, 0), (4, 8)):
        model = MaskedDiffusionLM(made(name, implementation), MASK, block_size=block)
        with torch.no_grad():
            difference = (model(ids) - model(changed)).nan_to_num().abs().amax((0, 2))
            padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
            mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)], 1)
            left_padded = model(padded, attention_mask=mask)[:, 3:]
        assert bool((difference[sees:] > 0).all()) and float(difference[:sees].sum()) == 0
        if name != "bert":  # its positions are learned from the left, padding included, by its own forward
            torch.testing.assert_close(left_padded, model(ids), rtol=1e-4, atol=1e-5)


def test_a_model_that_stays_causal_is_found_out() -> None:
    """A forward that makes its own causal mask, whatever the config says."""

    class StaysCausal(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, **_: Any) -> Any:
            causal = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()
            return super().forward(input_ids=input_ids, attention_mask=additive(causal))

    torch.manual_seed(0)
    with pytest.raises(UserError, match="StaysCausal .* is not bidirectional: token 0 does not see token 15"):
        MaskedDiffusionLM(StaysCausal(LlamaConfig(**KV)).eval(), MASK)
    with pytest.raises(UserError, match="does not follow a 4-D attention mask"):
        MaskedDiffusionLM(StaysCausal(LlamaConfig(**KV)).eval(), MASK, block_size=4)


def test_tokens_with_the_same_embedding_do_not_look_like_a_model_that_is_causal() -> None:
    """Found on SmolLM2, whose first ids are special tokens that were never trained, with one embedding for all."""
    model = made("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[:20] = 0.5
    MaskedDiffusionLM(model, MASK)


def test_layers_that_cannot_look_ahead_are_refused_by_name() -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2))
    with pytest.raises(UserError, match="layer 0 of mamba is linear_attention"):
        MaskedDiffusionLM(mamba, MASK)
    hybrid = Lfm2ForCausalLM(Lfm2Config(**KV, layer_types=["full_attention", "conv"]))
    with pytest.raises(UserError, match="layer 1 of lfm2 is conv"):
        MaskedDiffusionLM(hybrid, MASK)
    windowed = Gemma3TextConfig(
        **KV, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    )
    MaskedDiffusionLM(Gemma3ForCausalLM(windowed).eval(), MASK)  # both ways inside a window is fine
    with pytest.raises(UserError, match="layer 0 of gemma3_text is sliding_attention"):
        MaskedDiffusionLM(Gemma3ForCausalLM(windowed).eval(), MASK, block_size=4)
    in_all = MistralConfig(**KV, head_dim=16, sliding_window=8)  # says so without a list of layers
    MaskedDiffusionLM(MistralForCausalLM(in_all).eval(), MASK)
    with pytest.raises(UserError, match="layer 0 of mistral is sliding_attention"):
        MaskedDiffusionLM(MistralForCausalLM(in_all).eval(), MASK, block_size=4)
    with pytest.raises(UserError, match="layer 0 of recurrent_gemma is recurrent"):
        check_layers(RecurrentGemmaConfig(num_hidden_layers=3), None)


def test_the_mask_token_is_never_predicted_and_boolean_biases_are_refused() -> None:
    model = MaskedDiffusionLM(made("llama"), MASK)
    ids = torch.arange(6).unsqueeze(0)
    assert bool((model(ids)[..., MASK] == -torch.inf).all())
    with pytest.raises(UserError, match="eager attention would add it"):
        model(ids, bias=torch.ones(1, 1, 6, 6, dtype=torch.bool))
    for wrong in (64, -1):
        with pytest.raises(UserError, match="mask_token_id"):
            MaskedDiffusionLM(made("llama"), wrong)


def test_shifted_logits_speak_of_the_token_at_their_index() -> None:
    plain, shifted = (MaskedDiffusionLM(made("llama"), MASK, shift=shift) for shift in (False, True))
    ids = torch.arange(6).unsqueeze(0)
    torch.testing.assert_close(shifted(ids)[:, 1:], plain(ids)[:, :-1])


def test_one_pass_over_noisy_and_clean_is_block_by_block_and_blocks_of_one_are_autoregressive() -> None:
    """Row 14: [clean | noisy] gives what each noised block behind its clean prefix does, and with blocks of one token,
    all masked, the next-token loss of a causal model that reads MASK where the token stands."""
    model, n, block = MaskedDiffusionLM(made("llama"), MASK, block_size=2), 6, 2
    clean = torch.arange(10, 16).unsqueeze(0)
    noisy = clean.masked_fill(torch.tensor([[True, False, True, True, False, True]]), MASK)
    positions = torch.arange(n).repeat(2).unsqueeze(0)
    bias = additive(noisy_and_clean(block_ids(torch.ones(1, n), block)))
    together = model(torch.cat([clean, noisy], 1), position_ids=positions, bias=bias)[:, n:]
    for start in range(0, n, block):
        row = torch.cat([clean[:, :start], noisy[:, start : start + block]], 1)
        torch.testing.assert_close(together[:, start : start + block], model(row)[:, start:], rtol=1e-4, atol=1e-5)
    ones = MaskedDiffusionLM(made("llama"), MASK, block_size=1)
    masks = torch.full_like(clean, MASK)
    bias = additive(noisy_and_clean(block_ids(torch.ones(1, n), 1)))
    nll = token_ce(ones(torch.cat([clean, masks], 1), position_ids=positions, bias=bias)[:, n:], clean)
    causal = made("llama")
    for t in range(n):
        row = torch.cat([clean[:, :t], masks[:, :1]], 1)
        logits = causal(row).logits[:, -1].index_fill(-1, torch.tensor([MASK]), -torch.inf)
        torch.testing.assert_close(nll[:, t], -logits.log_softmax(-1)[:, clean[0, t]], rtol=1e-4, atol=1e-5)


def test_a_checkpoint_is_plain_and_comes_back_as_it_was(tmp_path: Path) -> None:
    tiny.llama(0).save_pretrained(tmp_path / "causal")
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(tmp_path / "causal")
    model, tokenizer = MaskedDiffusionLM.from_pretrained(tmp_path / "causal", block_size=4)
    assert tokenizer.mask_token == "<|mask|>" and model.mask_token_id == 260 and model.shift
    weight = model.model.get_input_embeddings().weight
    torch.testing.assert_close(weight[260], weight[:260].mean(0))
    model.save_pretrained(tmp_path / "diffusion")
    tokenizer.save_pretrained(tmp_path / "diffusion")
    again, _ = MaskedDiffusionLM.from_pretrained(tmp_path / "diffusion")
    assert (again.mask_token_id, again.shift, again.block_size) == (260, True, 4)
    ids = torch.arange(5, 13).unsqueeze(0)
    torch.testing.assert_close(again(ids), model(ids))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "diffusion")
    assert plain.config.is_causal is False and type(plain) is LlamaForCausalLM


def test_a_tokenizer_that_another_model_was_given_a_mask_token_with_serves_this_one_too() -> None:
    tokenizer = tiny.tokenizer()
    for _ in range(2):
        model = MaskedDiffusionLM.of(tiny.llama(0, vocab=260), tokenizer)
        assert model.mask_token_id == 260 and model.model.get_input_embeddings().weight.shape[0] == 261


def test_a_mask_token_that_is_a_word_is_refused(tmp_path: Path) -> None:
    tiny.llama(0).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="mask_token 'a' is id .* an ordinary word"):
        MaskedDiffusionLM.from_pretrained(tmp_path, mask_token="a")
    with pytest.raises(UserError, match="cannot be loaded"):
        MaskedDiffusionLM.from_pretrained(tmp_path / "nothing")
