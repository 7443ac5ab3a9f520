"""Tiny checkpoints with code of their own, whose classes are called as LLaDA's, Dream's and SDAR's are.

Written from what these models' pages say of them: names of classes and of auto_map's entries, arguments of forward,
which masks it takes, where the logits of a token stand, and the id of the mask token in the config. The mathematics
inside is one small bidirectional transformer for all.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests import tiny

MASK = 262
BODY = """
import math, torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput
from .configuration_{name} import {config}

def rotated(x, positions):
    half = x.shape[-1] // 2
    rate = 100.0 ** (-torch.arange(half, device=x.device) / half)
    angle = positions[:, None, :, None] * rate
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 2 * d, bias=False), nn.Linear(2 * d, d, bias=False)

    def forward(self, x, positions, bias):
        B, L, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, L, 3, 2, D // 2).permute(2, 0, 3, 1, 4)
        q, k = rotated(q, positions), rotated(k, positions)
        scores = q @ k.transpose(-1, -2) / math.sqrt(D // 2)
        if bias is not None:
            scores = scores + bias
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, L, D))
        return x + self.down(nn.functional.silu(self.up(self.norm2(x))))

class Trunk(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config.hidden_size) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size)

    def states(self, ids, positions, bias):
        x = self.wte(ids)
        for layer in self.layers:
            x = layer(x, positions, bias)
        return self.norm(x)

class Base(PreTrainedModel):
    config_class = {config}
    base_model_prefix = "model"

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.3)

    def get_input_embeddings(self):
        return self.model.wte

    def get_output_embeddings(self):
        return self.{head}

    def set_input_embeddings(self, value):
        self.model.wte = value

    def set_output_embeddings(self, value):
        self.{head} = value
"""
# LLaDA: a mask of [B, L] only, no position_ids; a bias of attention by another name.
LLADA = (
    BODY
    + """
class LLaDAModelLM(Base):
    def __init__(self, config):
        super().__init__(config)
        self.model = Trunk(config)
        self.ff_out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, attention_bias=None,
                past_key_values=None, labels=None, use_cache=None, return_dict=None):
        bias = attention_bias
        if attention_mask is not None:
            assert attention_mask.dim() == 2, "LLaDA takes a mask of sequences"
            bias = (1.0 - attention_mask.float())[:, None, None, :] * torch.finfo(torch.float32).min
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape).float()
        return CausalLMOutputWithPast(logits=self.ff_out(self.model.states(input_ids, positions, bias)))
"""
)
# Dream: a mask of [B, 1, L, L] or "full"; logits at t - 1 are those of the token at t.
DREAM = (
    BODY
    + """
class DreamModel(Base):
    def __init__(self, config):
        super().__init__(config)
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=None, return_dict=None, cache_position=None, num_logits_to_keep=0):
        bias = None
        if isinstance(attention_mask, torch.Tensor):
            assert attention_mask.dim() == 4 and attention_mask.is_floating_point(), "as attention adds it"
            bias = attention_mask
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
        return MaskedLMOutput(logits=self.lm_head(self.model.states(input_ids, position_ids.float(), bias)))
"""
)
# SDAR: block diffusion; a mask of [B, L] or [B, 1, L, L] that is added, position_ids.
SDAR = (
    BODY
    + """
class SDARForCausalLM(Base):
    def __init__(self, config):
        super().__init__(config)
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=None, store_kv=None, logits_to_keep=0):
        bias = attention_mask
        if attention_mask is not None and attention_mask.dim() == 2:
            bias = (1.0 - attention_mask.float())[:, None, None, :] * torch.finfo(torch.float32).min
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
        return CausalLMOutputWithPast(logits=self.lm_head(self.model.states(input_ids, position_ids.float(), bias)))
"""
)
CONFIG = """
from transformers import PretrainedConfig

class {config}(PretrainedConfig):
    model_type = "{kind}"

    def __init__(self, vocab_size=264, hidden_size=32, num_hidden_layers=2, mask_token_id=262, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.mask_token_id = mask_token_id
"""
# name -> (class, class of the config, model_type, code, name of the head, entries of auto_map)
FAMILIES = {
    "llada": ("LLaDAModelLM", "LLaDAConfig", "llada", LLADA, "ff_out", ("AutoModel", "AutoModelForCausalLM")),
    "dream": ("DreamModel", "DreamConfig", "Dream", DREAM, "lm_head", ("AutoModel",)),
    "sdar": ("SDARForCausalLM", "SDARConfig", "sdar", SDAR, "lm_head", ("AutoModel", "AutoModelForCausalLM")),
}


def write(name: str, folder: Path) -> Path:
    """A checkpoint of the family, with its code, weights and tokenizer."""
    made, config, kind, code, head, entries = FAMILIES[name]
    folder.mkdir(parents=True)
    fields = {"{name}": name, "{config}": config, "{head}": head, "{kind}": kind}
    for file, text in ((f"modeling_{name}.py", code), (f"configuration_{name}.py", CONFIG)):
        for field, value in fields.items():
            text = text.replace(field, value)
        (folder / file).write_text(text)
    auto = {"AutoConfig": f"configuration_{name}.{config}", **{e: f"modeling_{name}.{made}" for e in entries}}
    settings = {"model_type": kind, "architectures": [made], "auto_map": auto, "mask_token_id": MASK}
    (folder / "config.json").write_text(json.dumps({**settings, "eos_token_id": 1, "pad_token_id": 0}))
    import torch

    torch.manual_seed(0)
    loader = AutoModelForCausalLM if "AutoModelForCausalLM" in auto else AutoModel
    model = loader.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True)
    written = (folder / "config.json").read_text()
    model.float().save_pretrained(folder)
    (folder / "config.json").write_text(written)
    tiny.tokenizer().save_pretrained(folder)
    return folder
