"""The embedded teacher: a transformers model in this process. Exact, and the whole distribution is at hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmdistill.errors import UserError
from llmdistill.models.few_tokens import few_tokens
from llmdistill.models.generation import generate
from llmdistill.models.heads import head_of
from llmdistill.models.layers import captured, no_rows
from llmdistill.models.loading import load_configured
from llmdistill.models.passes import at_head
from llmdistill.objectives.rows import HiddenRows
from llmdistill.ranks import on_every_rank
from llmdistill.recipe.config import TeacherConfig
from llmdistill.recipe.launches import whole_models
from llmdistill.teachers.base import TeacherInfo
from llmdistill.teachers.fingerprint import template_hash, tokenizer_fingerprint, weights_fingerprint
from llmdistill.teachers.host_rows import HostRows
from llmdistill.teachers.listing import blocks_of, refuse_wider
from llmdistill.teachers.placement import Whole, placed
from llmdistill.texts import Prompt, Rollout, Sampling
from llmdistill.texts.batches import by_length
from llmdistill.texts.views import View
from llmdistill.tokenization.special import context_length, eos_ids, pad_id
from llmdistill.wire.blocks import ScoreBlock


class LocalTeacher:
    """Implements :class:`~llmdistill.teachers.base.Teacher` and its dense form over a transformers model.

    Args:
        model: the teacher; put into evaluation mode and frozen.
        tokenizer: its tokenizer.
        batch_tokens: tokens, padding included, of one forward pass.
        chunk_tokens: rows whose logits exist at one time in :meth:`score`.
        placement: where its weights are; None: where they were.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int = 16384,
        chunk_tokens: int = 256,
        placement: Whole | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.placement = tokenizer, placement
        self.writes = placement is None or placement.writes
        self.batch_tokens = batch_tokens
        self.chunk_tokens = chunk_tokens
        with self.present():
            self.head = head_of(model)
        self.packs = False  # told by the trainer, where sequences are packed and this model can read them so
        self._info: TeacherInfo | None = None
        if placement is not None:
            self.info()  # while all processes are here: weights in parts are put together for it

    @classmethod
    def load(cls, config: TeacherConfig, device: torch.device | str = "cpu") -> LocalTeacher:
        """Loads the model and tokenizer a recipe names, on every rank or on none.

        Raises:
            UserError: it cannot be loaded, on one of them, or not be placed as ``teacher.placement`` says.
        """
        with whole_models():
            model, tokenizer = on_every_rank(lambda: load_configured(config, "teacher"))
        placement = placed(model.eval().requires_grad_(False), torch.device(device), config.placement)
        return cls(model, tokenizer, batch_tokens=config.batch_tokens, placement=placement)

    @torch.no_grad()
    def dense(self, rollout: Rollout) -> HiddenRows:
        """Hidden rows of the counted tokens, [N, H] on the host, with the head: logits are formed only in chunks,
        later."""
        rows = HostRows(rollout.row_counts)
        index, batches = self._batches(rollout)
        with self.present():
            at_head(self.model, self.head, batches, lambda rows_NH, view, _: rows.put(next(index), rows_NH))
        empty = self.head.linear.weight.new_zeros(0, self.head.linear.in_features)
        return HiddenRows(rows.tensor(empty), self.head.linear, self.head.logit_scale, self.head.softcap)

    @torch.no_grad()
    def hidden_layers(self, rollout: Rollout, layers: Sequence[int]) -> list[Tensor]:
        """Hidden states [N, H] of the given decoder layers at the rows of the counted tokens, on the host."""
        rows = [HostRows(rollout.row_counts) for _ in layers]
        index, batches = self._batches(rollout)
        with self.present(), captured(self.model, layers) as states:

            def read(rows_NH: Tensor, view: View, _: None) -> None:  # the layers come before the head
                group = next(index)
                for of_layer, layer in zip(rows, layers, strict=True):
                    of_layer.put(group, view.rows(states[layer]))

            at_head(self.model, self.head, batches, read)
        empty = no_rows(self.model, layers)
        return [of_layer.tensor(none) for of_layer, none in zip(rows, empty, strict=True)]

    def _batches(self, rollout: Rollout) -> tuple[Iterator[list[int]], Iterator[tuple[Rollout, None]]]:
        """Which sequences are read together, and these, clean."""
        clean = replace(rollout, noise=None, packed=self.packs)
        index = by_length(rollout.attention_mask.sum(1).tolist(), self.batch_tokens, packed=self.packs)
        if self.placement is not None:
            index = self.placement.passes(index)
        nothing = few_tokens(self.model, 4)  # is read in an empty pass, for other processes' sake
        nothing = replace(nothing, completion_mask=torch.zeros_like(nothing.completion_mask))
        parts = (clean.sequences(group) if group else nothing for group in index)
        device = self.head.linear.weight.device  # where it runs
        return iter(index), ((part.to(device), None) for part in parts)

    def present(self) -> AbstractContextManager[None]:
        return nullcontext() if self.placement is None else self.placement.present()

    def score(self, rollout: Rollout, top_k: int, chosen: Tensor | None = None) -> list[ScoreBlock]:
        """One block per sequence. ``top_k`` up to the vocabulary size; any ids can be ``chosen``.

        Raises:
            UserError: ``top_k`` above the number of logit columns.
        """
        refuse_wider(top_k, self.head.vocab_size)
        return blocks_of(self.dense(rollout), rollout, top_k, chosen, self.info(), self.chunk_tokens)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        """Completions of its own.

        Raises:
            UserError: its weights are in parts over processes, which end their texts at different lengths.
        """
        if not self.writes:
            raise UserError(
                "teacher.placement is sharded: the teacher reads texts, and writes none. Fix: --sequences student or "
                "dataset, or a teacher that is whole or served."
            )
        with self.present():
            return generate(
                self.model,
                prompts,
                sampling,
                eos_ids=self.info().eos_ids,
                pad_id=pad_id(self.tokenizer),
                tokenizer=self.tokenizer,
                batch_tokens=self.batch_tokens,
            )

    def info(self) -> TeacherInfo:
        if self._info is None:
            config = self.model.config
            self._info = TeacherInfo(
                name=config.name_or_path or type(self.model).__name__,
                fingerprint=weights_fingerprint(self.model),
                tokenizer=tokenizer_fingerprint(self.tokenizer),
                vocab_size=self.head.vocab_size,
                eos_ids=eos_ids(self.model, self.tokenizer),
                context_length=context_length(config),
                template=template_hash(self.tokenizer),
            )
        return self._info

    def forget_info(self) -> None:
        """The weights have changed: their fingerprint is taken anew."""
        self._info = None

    def close(self) -> None:
        """Nothing to free: the model goes with its last reference."""


def embedded(judge: Any) -> list[LocalTeacher]:
    """The models of this process that a judge asks: itself, or those behind a cache, an alignment or a mixture."""
    if isinstance(judge, LocalTeacher):
        return [judge]
    asked = [getattr(judge, "teacher", None), *getattr(judge, "members", {}).values()]
    return [teacher for each in asked if each is not None for teacher in embedded(each)]


class UnadaptedTeacher(LocalTeacher):
    """A PEFT model as it is without its adapter: the student's start, while the student is trained.

    Unlike a teacher's, its weights stay trainable and in training mode; they are only read here.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **options: Any) -> None:
        frozen = [p for p in model.parameters() if not p.requires_grad]
        super().__init__(model, tokenizer, **options)
        wanted = {id(p) for p in frozen}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) not in wanted)

    def dense(self, rollout: Rollout) -> HiddenRows:
        with self._unadapted():
            return super().dense(rollout)

    def hidden_layers(self, rollout: Rollout, layers: Sequence[int]) -> list[Tensor]:
        with self._unadapted():
            return super().hidden_layers(rollout, layers)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        with self._unadapted():
            return super().generate(prompts, sampling)

    @contextmanager
    def _unadapted(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            with self.model.disable_adapter():  # type: ignore[operator]
                yield
        finally:
            self.model.train(was_training)
