"""Whether a model can read sequences that stand one behind another in a row, and how: tried out once for each model.

It must keep them apart: attention by positions that begin again, by the lengths it is given, or by a mask. States that
run through a row (Mamba, RWKV, convolutions) carry one sequence into the next, and positions of its own making would
count on. All of that shows where a sequence in company is not predicted as it is alone.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from llmdistill.compat.attention import sequence_by_sequence
from llmdistill.compat.patching import random_state_kept
from llmdistill.errors import UserError
from llmdistill.models.few_tokens import few_tokens
from llmdistill.models.modes import evaluating
from llmdistill.models.weights import base_model
from llmdistill.texts import Rollout
from llmdistill.texts.packing import Layout, packed
from llmdistill.texts.rollout import collate
from llmdistill.texts.views import View, plain, student_view

_LENGTHS = (5, 9, 3, 7)
# Over the spread of the logits: kernels sum other rows together with one's own, which rounds otherwise.
_ALLOWED, _ALLOWED_16 = 1e-4, 5e-2
# Layers that few tokens say nothing of: their blocks are counted from the beginning of a row, and are longer.
_BY_BLOCKS = ("chunked", "compressed", "sparse", "indexed")

# Of every model that was tried out: (reads both ways, implementation of its attention) -> layout, or why there is none.
_found: weakref.WeakKeyDictionary[nn.Module, dict[tuple[bool, str], Layout | UserError]] = weakref.WeakKeyDictionary()


def view_of(model: nn.Module, rollout: Rollout) -> View:
    """How ``model`` reads a text: as the student of it does, packed where the rollout is.

    Raises:
        UserError: as :func:`layout_of`.
    """
    view = student_view(rollout)
    if not rollout.packed:
        return view
    both_ways = rollout.noise is not None
    return packed(view, layout_of(model, both_ways=both_ways), both_ways=both_ways)


def layout_of(model: nn.Module, forward_model: nn.Module | None = None, *, both_ways: bool = False) -> Layout:
    """How sequences are packed for ``model``. The first time every process calls it.

    Args:
        forward_model: the model as it is run in training.
        both_ways: it is a denoiser, and is given masks.

    Raises:
        UserError: it cannot be given packed sequences.
    """
    base = base_model(model)
    implementation = str(getattr(base.config, "_attn_implementation", "") or "eager")
    of_model = _found.setdefault(base, {})
    if (key := (both_ways, implementation)) not in of_model:
        try:
            of_model[key] = _tried_out(model, forward_model or model, implementation, both_ways)
        except UserError as error:
            of_model[key] = error
    found = of_model[key]
    if isinstance(found, UserError):
        raise found
    return found


def can_be_packed(model: nn.Module) -> bool:
    """Whether :func:`layout_of` has an answer."""
    try:
        layout_of(model)
    except UserError:
        return False
    return True


@torch.no_grad()
def _tried_out(model: nn.Module, forward_model: nn.Module, implementation: str, both_ways: bool) -> Layout:
    base = base_model(model)
    name, fix = type(base).__name__, "Fix: --objective.packing false; objective.batch_tokens works without it"
    kinds = getattr(base.config.get_text_config(), "layer_types", None) or ()
    for number, kind in enumerate(kinds):
        if any(word in kind for word in _BY_BLOCKS):
            raise UserError(
                f"objective.packing is true, and layer {number} of {name} is {kind}, whose blocks would begin where a "
                f"row begins and not where a sequence does. {fix}."
            )
    text = few_tokens(model, sum(_LENGTHS))
    sequences = text.input_ids[0].split(_LENGTHS)
    rollout = collate([[] for _ in _LENGTHS], [ids.tolist() for ids in sequences], pad_id=0).to(text.input_ids.device)
    in_16_bits = "flash" in implementation  # its kernels have no others
    allowed = _ALLOWED_16 if in_16_bits or base.dtype not in (torch.float32, torch.float64) else _ALLOWED
    layouts: tuple[Layout, ...] = ("row", "rows") if implementation == "sdpa" else ("rows",)
    layouts = ("kernel",) if "flash" in implementation and not both_ways else layouts
    reasons, device = list[str](), rollout.input_ids.device.type
    with evaluating(model), random_state_kept(), torch.autocast(device, torch.bfloat16, enabled=in_16_bits):
        alone = [plain(rollout.sequences([b])) for b in range(len(rollout))]
        expected = torch.cat([_logits(forward_model, view) for view in alone])
        for layout in layouts:
            try:
                logits = _logits(forward_model, packed(plain(rollout), layout, both_ways=both_ways))
            except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
                reasons.append(next(iter(str(error).strip().splitlines()), type(error).__name__))
                continue
            away = float((logits - expected).abs().max()) / max(float(expected.std()), 1e-12)
            if away <= allowed:
                return layout
            reasons.append(f"one behind another they change each other's logits by {away:.2g} of their spread")
    raise UserError(
        f"objective.packing is true, and {name} does not keep packed sequences apart: {'; '.join(reasons)}. {fix}."
    )


def _logits(model: nn.Module, view: View) -> Tensor:
    """[N, V] float32 of the rows, sequence by sequence."""
    with sequence_by_sequence(view.lengths):
        return view.rows(model(**view.inputs(), use_cache=False).logits).float()
