"""Output heads that go with hidden states: out of a checkpoint, kept beside a store, and put to work as rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from llmdistill.errors import UserError
from llmdistill.files import atomic_write
from llmdistill.models.heads import named_transform
from llmdistill.objectives.rows import HiddenRows
from llmdistill.teachers.fingerprint import local_folder, stored_tensors
from llmdistill.teachers.host_rows import joined
from llmdistill.wire.blocks import BlockError
from llmdistill.wire.hidden import HeadWeights, HiddenBlock, pack_head, unpack_head

FILE = "head.safetensors"  # in a store


def stored_head(model_path: str, trust_remote_code: bool = False) -> HeadWeights | None:
    """The output head in a checkpoint's safetensors files, by the usual names; None where there is none."""
    files = sorted(local_folder(model_path).glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in stored_tensors(file)}
    own = [name for name in found if name.split(".")[-2:] == ["lm_head", "weight"]]
    config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code).get_text_config()
    if not own and getattr(config, "tie_word_embeddings", False):
        own = [name for name in found if name.split(".")[-2:] == ["embed_tokens", "weight"]]
    if len(own) != 1 or found[own[0]].ndim != 2:
        return None
    transform = named_transform(config)
    bias = found.get(own[0].removesuffix("weight") + "bias")
    return HeadWeights(found[own[0]][: config.vocab_size], bias, transform.logit_scale, transform.softcap)


class HeadInUse:
    """A teacher's head as the student's side computes with it: in float32, once, on one device.

    In bfloat16 the head's own arithmetic would lose 40 times what the states do.
    """

    def __init__(self, weights: HeadWeights, device: torch.device | str = "cpu") -> None:
        self.fingerprint, self.vocab_size, self.device = weights.fingerprint, weights.weight.shape[0], device
        self.logit_scale, self.softcap = weights.logit_scale, weights.softcap
        self.linear: nn.Linear = weights.linear(device)

    def rows(self, hidden: Sequence[Tensor]) -> HiddenRows:
        """Rows of the whole distribution, on the host, which become logits a chunk at a time."""
        empty = torch.zeros(0, self.linear.in_features)
        hidden_NH = joined([empty, *hidden], self.device, torch.float32)
        return HiddenRows(hidden_NH, self.linear, self.logit_scale, self.softcap)

    def check(self, block: HiddenBlock, where: str) -> None:
        """Raises UserError for states of another head."""
        header = block.header
        if (header.head, header.width) != (self.fingerprint, self.linear.in_features):
            raise UserError(
                f"{where}: hidden states of {header.width} columns that belong to output head {header.head}; here is "
                f"head {self.fingerprint} of {self.linear.in_features} columns. Fix: states and head of one teacher, "
                "as one service or one folder gives them."
            )


def kept_head(folder: Path) -> HeadWeights:
    """The head beside a store of hidden states.

    Raises:
        UserError: it is gone or damaged.
    """
    file = folder / FILE
    try:
        return unpack_head(file.read_bytes())
    except (OSError, BlockError) as error:
        why = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise UserError(
            f"{file} {why}; the hidden states of this store are of no use without their head. "
            "Fix: put the file back, or open the store once with its teacher behind it."
        ) from error


def keep_head(folder: Path, head: HeadWeights) -> None:
    """Puts it beside a store, unless the store has one.

    Raises:
        UserError: the store has another one.
    """
    if not (folder / FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / FILE, pack_head(head))
    if (own := kept_head(folder).fingerprint) != head.fingerprint:
        raise UserError(
            f"{folder} has output head {own} beside its hidden states; this teacher's is {head.fingerprint}. "
            "Fix: another folder for this teacher."
        )
