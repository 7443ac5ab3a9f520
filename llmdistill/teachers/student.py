"""The student as its own judge: as it is now, as it began, or as an average over its steps. Never with gradient.

It is worth asking where it reads another context than the student does (OPSD, SDPO, context distillation), or where it
is not the student of now (a trust region around its start).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmdistill.compat import fsdp, zero3
from llmdistill.compat.placing import local_part
from llmdistill.errors import UserError
from llmdistill.models.heads import head_of
from llmdistill.models.helpers import NAME as HELPERS
from llmdistill.models.layers import captured, no_rows
from llmdistill.models.modes import evaluating
from llmdistill.models.passes import at_head
from llmdistill.models.weights import gathered
from llmdistill.objectives.rows import HiddenRows
from llmdistill.objectives.streaming import rows_at_once
from llmdistill.teachers.base import TeacherInfo
from llmdistill.teachers.fingerprint import template_hash, tokenizer_fingerprint
from llmdistill.teachers.host_rows import HostRows
from llmdistill.teachers.listing import blocks_of, refuse_wider
from llmdistill.texts import Prompt, Rollout, Sampling
from llmdistill.texts.batches import Passes
from llmdistill.texts.views import View
from llmdistill.tokenization.special import context_length, eos_ids
from llmdistill.wire.blocks import ScoreBlock

Which = Literal["live", "initial", "ema"]


class StudentTeacher:
    """Implements :class:`~llmdistill.teachers.base.Teacher` over the student of a trainer, which binds it.

    Args:
        which: ``live``: the weights of now. ``initial``: those before training; for a student with an adapter the model
            below it, else a copy. ``ema``: the average theta' <- decay theta' + (1 - decay) theta, once per step.
        decay: of ``ema``.
    """

    live = True  # it answers for any text
    writes = False  # what the student writes comes from the rollout engine

    def __init__(self, which: Which, decay: float = 0.999) -> None:
        self.which, self.decay = which, decay
        self.model: PreTrainedModel | None = None

    def bind(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        forward_model: Callable[[], nn.Module],
        *,
        passes: Passes,
        chunk_tokens: int,
    ) -> None:
        """Told by the trainer whose student it is.

        Args:
            forward_model: the student as it is called in training, so that sharded weights are gathered.
            passes: how large they are.
            chunk_tokens: rows whose logits exist at one time; 0: as many as the loss takes.
        """
        self.model, self.tokenizer, self.forward_model = model, tokenizer, forward_model
        device = next(model.parameters()).device
        self.passes = passes
        self.chunk_tokens = chunk_tokens or rows_at_once(head_of(model).vocab_size, device)
        self.average: dict[str, Tensor] = {}  # of this rank's part of every trained weight, float32
        adapted = hasattr(model, "disable_adapter")
        if self.which == "ema" or (self.which == "initial" and not adapted):
            self.average = {name: _own(p).detach().float().clone() for name, p in self._trained()}
        self._adapter_off = self.which == "initial" and adapted

    # ---------------------------------------------------------------- Teacher

    @torch.no_grad()
    def dense(self, rollout: Rollout) -> HiddenRows:
        """Hidden rows of the counted tokens, [N, H] on the host, with the head they belong to."""
        head, rows = head_of(self._bound), HostRows(rollout.row_counts)
        with self._as_judge():
            at_head(self.forward_model(), head, self._batches(rollout), lambda rows_NH, view, _: rows.append(rows_NH))
            linear = self._head_now(head.linear)
        empty = head.linear.weight.new_zeros(0, head.linear.in_features)
        return HiddenRows(rows.tensor(empty), linear, head.logit_scale, head.softcap)

    @torch.no_grad()
    def hidden_layers(self, rollout: Rollout, layers: Sequence[int]) -> list[Tensor]:
        """Hidden states [N, H] of the given decoder layers at the rows of the counted tokens, on the host."""
        head, rows = head_of(self._bound), [HostRows(rollout.row_counts) for _ in layers]
        with self._as_judge(), captured(self._bound, layers) as states:

            def read(rows_NH: Tensor, view: View, _: None) -> None:  # the layers come before the head
                for of_layer, layer in zip(rows, layers, strict=True):
                    of_layer.append(view.rows(states[layer]))

            at_head(self.forward_model(), head, self._batches(rollout), read)
        empty = no_rows(self._bound, layers)
        return [of_layer.tensor(none) for of_layer, none in zip(rows, empty, strict=True)]

    def _batches(self, rollout: Rollout) -> Iterator[tuple[Rollout, None]]:
        device = head_of(self._bound).linear.weight.device
        return ((part, None) for part in self.passes.of(rollout, device))

    def score(self, rollout: Rollout, top_k: int, chosen: Tensor | None = None) -> list[ScoreBlock]:
        """As :meth:`~llmdistill.teachers.local.LocalTeacher.score`."""
        refuse_wider(top_k, self.head.vocab_size)
        rows = self.dense(rollout)
        # Not before: a forward pass lets go of what it has gathered.
        with gathered(list(rows.lm_head.parameters())), fsdp.whole_inside(rows.lm_head):
            return blocks_of(rows, rollout, top_k, chosen, self.info(), self.chunk_tokens)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        """Refused: what the student writes comes from the rollout engine.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"teacher.student is {self.which}: the student judges texts, and its own come from rollouts.engine. "
            "Fix: --sequences student or dataset."
        )

    def info(self) -> TeacherInfo:
        model = self._bound
        return TeacherInfo(
            name=f"student ({self.which})",
            fingerprint=f"student-{self.which}",
            tokenizer=tokenizer_fingerprint(self.tokenizer),
            vocab_size=head_of(model).vocab_size,
            eos_ids=eos_ids(model, self.tokenizer),
            context_length=context_length(model.config),
            template=template_hash(self.tokenizer),
        )

    def close(self) -> None:
        """The model is the trainer's."""

    # ---------------------------------------------------------------- its weights

    @property
    def head(self) -> Any:
        """Of the student, for scoring."""
        return head_of(self._bound)

    @torch.no_grad()
    def step(self) -> None:
        """Moves the average after an optimizer step."""
        if self.which == "ema":
            self._fit()
            for name, parameter in self._trained():
                self.average[name].lerp_(_own(parameter).float(), 1.0 - self.decay)

    @property
    def sharded(self) -> bool:
        """Whether this rank has only its part of the weights."""
        return any(hasattr(p, "ds_id") or hasattr(p, "to_local") for _, p in self._trained())

    def state_dict(self) -> dict[str, Any]:
        """The average: of this rank's part where weights are sharded, else of all."""
        self._fit()
        return {"which": self.which, "average": self.average, "sizes": self._sizes()} if self.average else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a whole average wherever, and shards also where the weights will only be sharded when training begins.

        Raises:
            ValueError: it is an average of other weights, or of other shards.
        """
        self._fit()
        given = state.get("average", {})
        if state.get("sizes", {}) != self._sizes() or given.keys() != self.average.keys():
            raise ValueError("its average of the student is of other weights")
        self.average = {name: value.to(self.average[name], copy=True) for name, value in given.items()}
        self._fit()

    def _sizes(self) -> dict[str, int]:
        """Elements of every whole weight that the average has."""
        return {name: getattr(p, "ds_numel", p.numel()) for name, p in self._trained() if name in self.average}

    def _fit(self) -> None:
        """Cuts a whole average to this rank's part of weights that have been sharded since it was made or read.

        Raises:
            UserError: it is of other shards.
        """
        sharded = self.sharded
        for name, parameter in self._trained() if self.average else ():
            value, whole = self.average[name], getattr(parameter, "ds_numel", parameter.numel())
            if value.shape == _own(parameter).shape:
                continue
            if value.numel() == whole:
                self.average[name] = local_part(value, parameter).clone()
            elif sharded:
                raise UserError(
                    "the checkpoint's average of the student cannot be read: it is made of other shards than these "
                    "weights. Fix: resume with as many processes, and the launch file, that wrote it."
                )

    @property
    def _bound(self) -> PreTrainedModel:
        assert self.model is not None, "bind() comes first"
        return self.model

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        fsdp.shard_again(self._bound)
        named = self._bound.named_parameters()
        return [(name, p) for name, p in named if p.requires_grad and f"{HELPERS}." not in name]

    @contextmanager
    def _as_judge(self) -> Iterator[None]:
        """The student in evaluation mode with the weights it judges with; put back as it was, bit for bit."""
        model = self._bound
        off = model.disable_adapter() if self._adapter_off else nullcontext()  # type: ignore[operator]
        # Before training there is no engine yet to gather what ZeRO-3 sharded while loading.
        sharded = list(model.parameters()) if self.forward_model() is model else []
        with evaluating(model), off, gathered(sharded):
            if not self.average:
                yield
                return
            self._fit()
            kept = {name: _own(p).detach().clone() for name, p in self._trained()}
            try:
                self._put(self.average)
                yield
            finally:
                self._put(kept)

    def _put(self, values: Mapping[str, Tensor]) -> None:
        """Makes these the trained weights: this rank's parts, and what is whole at the moment and is made of parts."""
        for name, parameter in self._trained():
            _own(parameter).data.copy_(values[name])
        zero3.gather_again([parameter for _, parameter in self._trained()])

    def _head_now(self, linear: nn.Linear) -> nn.Linear:
        """The head of the judge: the student's, or a copy where other weights are only there for a while."""
        if not self.average or not linear.weight.requires_grad:
            return linear
        with gathered(list(linear.parameters())):
            copy = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
            copy.weight = nn.Parameter(_whole(linear.weight), requires_grad=False)
            if linear.bias is not None:
                copy.bias = nn.Parameter(_whole(linear.bias), requires_grad=False)
        return copy


def whole_average(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of all ranks' :meth:`StudentTeacher.state_dict`, with the average put together of the ranks' parts."""
    first = states[0]
    average, sizes = first.get("average", {}), first.get("sizes", {})
    if all(value.numel() >= sizes[name] for name, value in average.items()):
        return dict(first)
    parts = {name: [state["average"][name].flatten() for state in states] for name in average}
    return {**first, "average": {name: torch.cat(each)[: sizes[name]] for name, each in parts.items()}}


def _own(parameter: Tensor) -> Tensor:
    """This rank's part of a weight: ZeRO-3's shard, FSDP2's, else all of it. Shares its storage."""
    part = getattr(parameter, "ds_tensor", parameter)
    return part.to_local() if hasattr(part, "to_local") else part  # type: ignore[no-any-return]


def _whole(parameter: Tensor) -> Tensor:
    value = parameter.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value.clone()  # type: ignore[no-any-return]
