"""Short hashes that tell whether two models, vocabularies or templates are the same."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

SAMPLED_VALUES = 64


def weights_fingerprint(model: nn.Module) -> str:
    """Hash of every parameter's name, shape and 64 evenly spaced values.

    Cheap, and different for any two trained models; not proof against somebody who edits single weights on purpose.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        picks = torch.linspace(0, max(flat.numel() - 1, 0), SAMPLED_VALUES, device=flat.device).long()
        values = flat[picks].float().cpu().numpy().tobytes() if flat.numel() else b""
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + values)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the (token, id) pairs and the special tokens."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    special = sorted((k, str(v)) for k, v in tokenizer.special_tokens_map.items())
    return hashlib.blake2b(json.dumps([vocabulary, special]).encode(), digest_size=8).hexdigest()


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Hash of the chat template; None without one."""
    template = tokenizer.chat_template
    return hashlib.blake2b(str(template).encode(), digest_size=8).hexdigest() if template else None
