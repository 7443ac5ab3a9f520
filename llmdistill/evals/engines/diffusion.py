"""Masked diffusion models in this process, by :func:`llmdistill.diffusion.sampling.generate`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llmdistill.diffusion.backbone import MaskedDiffusionLM
from llmdistill.diffusion.diversity import DeterminantalRepulsion, OrthogonalRepulsion
from llmdistill.diffusion.generation_config import generation_config
from llmdistill.diffusion.sampling import generate
from llmdistill.errors import UserError
from llmdistill.evals.engines.base import Asked, batches
from llmdistill.evals.engines.local import decoded
from llmdistill.evals.records import Sample
from llmdistill.texts.rollout import Sampling
from llmdistill.tokenization.special import eos_ids, pad_id

REPULSIONS: Mapping[str, Any] = {"odd": OrthogonalRepulsion, "dpp": DeterminantalRepulsion}
_REPULSION_OPTIONS = ("alpha", "pool", "quality_scale", "anneal")


class DiffusionEngine:
    """Batch by batch; every sample draws with a generator of its own, so that its company changes nothing.

    With ``repulsion`` among the settings the samples of a problem are a batch, and are pushed apart: each then depends
    on those that are drawn with it, which after an evaluation that was killed are the ones that were left.
    """

    def __init__(
        self,
        model: MaskedDiffusionLM,
        tokenizer: PreTrainedTokenizerBase,
        settings: Mapping[str, Any],
        *,
        batch_size: int = 16,
    ) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.settings, self.repulsion = without_repulsion(settings)
        self.eos_ids, self.pad_id = eos_ids(model.model, tokenizer), pad_id(tokenizer)

    def draw(self, asked: Sequence[Asked], sampling: Sampling, stop: Sequence[str]) -> Iterator[Sample]:
        by_problem = groupby(sorted(asked, key=lambda one: one.problem), key=lambda one: one.problem)
        together = ([*of] for _, of in by_problem) if self.repulsion else batches(asked, self.batch_size)
        for batch in together:
            yield from self._batch(batch, sampling, stop)

    def _batch(self, batch: Sequence[Asked], sampling: Sampling, stop: Sequence[str]) -> Iterator[Sample]:
        width, device = max(len(one.ids) for one in batch), self.model.device
        ids = torch.full((len(batch), width), self.pad_id, device=device)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(batch):
            begin = width - len(one.ids)
            ids[row, begin:], mask[row, begin:] = torch.tensor(one.ids, device=device), 1
        out = generate(
            self.model,
            ids,
            mask,
            generation_config(self.settings, sampling, batch[0].room),
            eos_ids=self.eos_ids,
            logits_processor=self._pushed_apart(batch[0].seed),
            generator=[torch.Generator().manual_seed(one.seed % (1 << 63)) for one in batch],
        )
        for one, sequence, counts, finish in zip(batch, out.sequences, out.completion_mask, out.finish, strict=True):
            completion = sequence[counts].tolist()
            yield one.sample(decoded(self.tokenizer, completion), len(completion), finish, stop)

    def _pushed_apart(self, seed: int) -> list[Any]:
        if not self.repulsion:
            return []
        name, options = self.repulsion
        ends: Collection[int] = {*self.eos_ids, self.pad_id}
        own = {"generator": torch.Generator().manual_seed(seed % (1 << 63))} if name == "odd" else {}
        return [REPULSIONS[name](protected_ids=ends, **own, **options)]

    def close(self) -> None:
        pass


def without_repulsion(settings: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, dict[str, Any]] | None]:
    """The settings of ``generate``, and how the samples of a problem are pushed apart: ``repulsion`` ``odd`` or
    ``dpp``, with ``repulsion_alpha``, ``_pool``, ``_quality_scale`` and ``_anneal`` as in ``diffusion/diversity.py``.

    Raises:
        UserError: another name, an option without one, or a value out of its range.
    """
    rest = dict(settings)
    name = rest.pop("repulsion", "none")
    options = {key: rest.pop(f"repulsion_{key}") for key in _REPULSION_OPTIONS if f"repulsion_{key}" in rest}
    if name != "none" and name not in REPULSIONS:
        raise UserError(f"diffusion.repulsion is {name!r}; there are none, {', '.join(REPULSIONS)}. Fix: one of them.")
    if name == "none":
        if options:
            raise UserError(f"diffusion has repulsion_{next(iter(options))} and no repulsion. Fix: repulsion odd.")
        return rest, None
    if options.get("pool", "max") not in ("max", "mean"):
        raise UserError(f"diffusion.repulsion_pool is {options['pool']!r}; there are max and mean. Fix: max.")
    REPULSIONS[name](**options)  # which looks at alpha
    return rest, (name, options)
