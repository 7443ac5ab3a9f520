"""Sequences and the position convention.

A mask or a score at index t speaks of the token *at* t, predicted from the tokens before t. A model's logits (and the
hidden states they come from) at index t-1 are that prediction. :func:`predicting` is the only place where the one is
turned into the other; everything downstream works on rows, in which there is no position left to get wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from llmdistill.texts.noise import Noise

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Reading:
    """A prompt as a judge of another tokenizer reads it: in its tokens and by its template."""

    text: str
    ids: tuple[int, ...]
    chat: bool  # the template wrote it


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt: its ids (template applied, generation prompt included), its text and where it came from."""

    ids: list[int]
    text: str
    domain: str | None = None
    row: int = 0  # index in the dataset it was read from, for messages and logs
    completion: tuple[int, ...] = ()  # the dataset's own, for methods that train on it
    answer: str = ""  # the right one, for rewards that verify
    weight: float | tuple[float, ...] = 1.0  # of the row in the loss, or of each token of its completion
    contexts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # other prompts of the same completions
    counts: tuple[bool, ...] = ()  # which tokens of the completion the loss trains on; empty: all
    record: Mapping[str, Any] | None = None  # the row as it was read, where a context is built from it later
    readings: Mapping[str, Reading] = field(default_factory=dict)  # by the names of judges of other tokenizers


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. ``temperature`` 0 is greedy; it has nothing to do with the loss temperature.

    ``seed`` makes every request reproducible on its own: row i, sample j of a call uses a seed derived from
    (seed, i, j), so a resumed run draws what the undisturbed run would have drawn.

    The order is vLLM's in every engine: ``repetition_penalty`` on the logits of what stands in prompt or completion
    (above 0 divided by it, below 0 multiplied), then temperature, ``min_p``, ``top_k``, ``top_p``.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: the whole vocabulary
    samples_per_prompt: int = 1
    seed: int = 0
    min_p: float = 0.0  # only tokens with this share of the likeliest one's probability
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()  # strings that end it: llmdistill.texts.stops
    ignore_eos: bool = False  # no token ends it: it goes on to max_new_tokens, or to a stop string
    first_sample: int = 0  # number of the first sample of each prompt: a call may be a part of another one

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(self.stop))

    @property
    def plain(self) -> bool:
        """Tokens are drawn from softmax(logits) itself, or the likeliest is taken."""
        cut = self.top_p < 1 or self.top_k > 0 or self.min_p > 0
        return self.repetition_penalty == 1 and (self.temperature == 0 or (self.temperature == 1 and not cut))

    @property
    def numbers(self) -> range:
        """Of the samples of each prompt."""
        return range(self.first_sample, self.first_sample + self.samples_per_prompt)


@dataclass(frozen=True)
class Rollout:
    """A batch of prompt + completion sequences, right-padded. B sequences, T tokens."""

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] bool
    completion_mask: Tensor  # [B, T] bool, True on tokens the loss may train on
    behavior_logprobs: Tensor | None = None  # [B, T] float32, log-prob at the sampling temperature; 0 off completion
    policy_version: int = 0  # optimizer step of the weights that sampled it
    finish: tuple[Finish, ...] = ()  # one per sequence
    domain: tuple[str | None, ...] | None = None  # routes multi-teacher scoring
    step_map: Tensor | None = None  # [B, T] int64: the step of a denoiser's writing that revealed it; -1 where none did
    noise: Noise | None = None  # of a text that its student reads noised
    packed: bool = False  # it is read with its sequences one behind another, and not padded

    def __post_init__(self) -> None:
        shape = self.input_ids.shape
        for name in ("attention_mask", "completion_mask", "behavior_logprobs", "step_map"):
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(f"Rollout.{name} has shape {tuple(value.shape)}, input_ids {tuple(shape)}")
        if self.finish and len(self.finish) != shape[0]:
            raise ValueError(f"Rollout.finish has {len(self.finish)} entries for {shape[0]} sequences")

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_rows(self) -> int:
        """Counted tokens: completion tokens that have a token before them to be predicted from."""
        return int(self.completion_mask[:, 1:].sum())

    @property
    def num_countable(self) -> int:
        """Tokens that losses are means over: the counted ones, and in a noised text those that happen to be read."""
        return self.num_rows if self.noise is None else int(self.noise.countable[:, 1:].sum())

    @property
    def row_counts(self) -> list[int]:
        """Counted tokens of each sequence, [B]."""
        return self.completion_mask[:, 1:].sum(1).tolist()

    def token_rows(self) -> Tensor:
        """Ids of the counted tokens in row order, [N] int64."""
        return self.input_ids[:, 1:][self.completion_mask[:, 1:]]

    def sequences(self, index: Sequence[int]) -> Rollout:
        """The sub-batch of the given sequences, in that order, without columns that are padding in all of them."""
        index = list(index)
        columns = self.attention_mask[index].any(0).nonzero()
        keep = slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(0, 1)
        return replace(
            self,
            input_ids=self.input_ids[index, keep],
            attention_mask=self.attention_mask[index, keep],
            completion_mask=self.completion_mask[index, keep],
            behavior_logprobs=None if self.behavior_logprobs is None else self.behavior_logprobs[index, keep],
            finish=tuple(self.finish[i] for i in index) if self.finish else (),
            domain=None if self.domain is None else tuple(self.domain[i] for i in index),
            step_map=None if self.step_map is None else self.step_map[index, keep],
            noise=None if self.noise is None else self.noise.sequences(index, keep),
        )

    def without_truncated(self) -> Rollout:
        """The same sequences with completions cut off by the length limit taken out of the loss.

        Where it is not known how they ended (the dataset's own), all stay.
        """
        if not self.finish:
            return self
        keep = torch.tensor([f != "length" for f in self.finish], dtype=torch.bool, device=self.completion_mask.device)
        noise = None if self.noise is None else self.noise.counting(keep)
        return replace(self, completion_mask=self.completion_mask & keep[:, None], noise=noise)

    def within(self, width: int, pad_id: int) -> tuple[Rollout, int]:
        """The same with every sequence ended before its first id >= ``width``; and how many were."""
        return self.ended_before(self.input_ids >= width, pad_id)

    def ended_before(self, marked_BT: Tensor, pad_id: int) -> tuple[Rollout, int]:
        """The same with every sequence ended before its first marked token; and how many were."""
        outside = marked_BT & self.attention_mask
        cut = outside.any(1)
        if not bool(cut.any()):
            return self, 0
        gone = outside.cumsum(1) > 0
        lp = self.behavior_logprobs
        shorter = replace(
            self,
            input_ids=self.input_ids.masked_fill(gone, pad_id),
            attention_mask=self.attention_mask & ~gone,
            completion_mask=self.completion_mask & ~gone,
            behavior_logprobs=None if lp is None else lp.masked_fill(gone, 0.0),
            finish=tuple("length" if c else f for f, c in zip(self.finish, cut.tolist(), strict=True))
            if self.finish
            else (),
            step_map=None if self.step_map is None else self.step_map.masked_fill(gone, -1),
            noise=None if self.noise is None else self.noise.ended(gone),
        )
        return shorter, int(cut.sum())

    def to(self, device: torch.device | str) -> Rollout:
        move = {n: getattr(self, n).to(device) for n in ("input_ids", "attention_mask", "completion_mask")}
        for name in ("behavior_logprobs", "step_map", "noise"):
            if (value := getattr(self, name)) is not None:
                move[name] = value.to(device)
        return replace(self, **move)


def predicting(mask_BT: Tensor) -> Tensor:
    """Where the states are that predict the marked tokens, [B, T] bool. The one shift.

    A mark on index 0 has no prediction and is dropped.
    """
    at_BT = torch.zeros_like(mask_BT)
    at_BT[:, :-1] = mask_BT[:, 1:]
    return at_BT


def predicting_rows(states_BTX: Tensor, mask_BT: Tensor) -> Tensor:
    """The rows that predict the tokens marked by ``mask_BT``: [B, T, X] and [B, T] -> [N, X].

    Row order is sequence by sequence, position by position, as in ``Rollout.token_rows``.
    """
    return states_BTX[predicting(mask_BT)]


def span(mask_T: Tensor) -> slice:
    """First to last counted position of one sequence; index 0 cannot be counted (nothing predicts it)."""
    at = mask_T[1:].nonzero().flatten() + 1
    return slice(int(at[0]), int(at[-1]) + 1) if len(at) else slice(0, 0)


def position_ids(attention_mask_BT: Tensor) -> Tensor:
    """Positions that count real tokens only, so that left padding changes nothing, [B, T] int64."""
    return (attention_mask_BT.long().cumsum(1) - 1).clamp(min=0)


def collate(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    pad_id: int,
    behavior_logprobs: Sequence[Sequence[float]] | None = None,
    counts: Sequence[Sequence[bool]] = (),
    finish: Sequence[Finish] = (),
    domain: Sequence[str | None] | None = None,
    policy_version: int = 0,
) -> Rollout:
    """Pads prompt + completion id lists on the right into a :class:`Rollout`.

    Every completion token counts, but for sequences that have ``counts``.
    """
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    shape = (len(lengths), max(lengths, default=1))
    ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention = torch.zeros(shape, dtype=torch.bool)
    counted = torch.zeros(shape, dtype=torch.bool)
    logprobs = torch.zeros(shape) if behavior_logprobs is not None else None
    for b, (p, c) in enumerate(zip(prompts, completions, strict=True)):
        ids[b, : lengths[b]] = torch.tensor([*p, *c], dtype=torch.int64)
        attention[b, : lengths[b]] = True
        counted[b, len(p) : lengths[b]] = torch.tensor(counts[b]) if counts and counts[b] else True
        if logprobs is not None and behavior_logprobs is not None:
            logprobs[b, len(p) : lengths[b]] = torch.tensor(list(behavior_logprobs[b]))
    domains = tuple(domain) if domain is not None else None
    return Rollout(ids, attention, counted, logprobs, policy_version, tuple(finish), domains)


def request_seed(seed: int, row: int, sample: int) -> int:
    """A 63-bit seed for one request, independent of which others it is batched with."""
    digest = hashlib.blake2b(f"{seed}:{row}:{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
