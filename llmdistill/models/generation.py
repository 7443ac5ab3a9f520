"""Sampling with transformers' ``generate``: the engine that runs wherever the model does."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmdistill.errors import UserError
from llmdistill.models.modes import computes_in_16_bits, own_precision
from llmdistill.models.weights import base_model
from llmdistill.texts import request_seed
from llmdistill.texts.batches import groups
from llmdistill.texts.rollout import Finish, Prompt, Rollout, Sampling, collate
from llmdistill.texts.stops import StopStrings, stop_strings

logger = logging.getLogger(__name__)
BATCH_TOKENS = 32768  # generated at one time where nobody says: 0.7 GiB of keys and values of a 0.1B student, 4 of a 7B


class HFRollouts:
    """The student samples from itself, in place.

    Args:
        eos_ids, pad_id: of the student's tokenizer.
        ready: context manager around generation that yields the model to generate with; it gathers parameters that
            are sharded (ZeRO-3).
        tokenizer: of the student, for stop strings.
        batch_tokens: of :func:`generate`; 0: no bound.
    """

    def __init__(
        self,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        ready: Callable[[nn.Module], AbstractContextManager[nn.Module]] = nullcontext,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        self.tokenizer, self.batch_tokens = tokenizer, batch_tokens
        self.eos_ids, self.pad_id, self.ready = tuple(eos_ids), pad_id, ready
        self.model: nn.Module | None = None
        self.policy_version = 0

    def sync(self, model: nn.Module, policy_version: int) -> None:
        self.model, self.policy_version = model, policy_version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        assert self.model is not None, "sync() comes before generate()"
        with self.ready(self.model) as model:
            return generate(
                model,  # type: ignore[arg-type]
                prompts,
                sampling,
                eos_ids=self.eos_ids,
                pad_id=self.pad_id,
                policy_version=self.policy_version,
                tokenizer=self.tokenizer,
                batch_tokens=self.batch_tokens,
            )

    def close(self) -> None:
        self.model = None


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    eos_ids: Sequence[int],
    pad_id: int,
    policy_version: int = 0,
    rows: Sequence[int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_tokens: int = 0,
    watch: Watch | None = None,
) -> Rollout:
    """Completions of every prompt (samples of one prompt adjacent), the ending eos included and counted.

    ``behavior_logprobs`` are those of the distribution drawn from: softmax(logits / temperature) after everything
    that :class:`~llmdistill.texts.rollout.Sampling` says; at temperature 1 and uncut when greedy. The global
    random state is left as it was found: a run draws the same samples whatever else uses it.

    Args:
        rows: number of each prompt in the call its seed speaks of, where this call is only a part of that.
        tokenizer: of the model, for stop strings.
        batch_tokens: sequences are generated in batches of so many tokens, prompts, padding and the room for
            completions included; a longer one is alone. What is drawn does not depend on it. 0: all in one batch.
        watch: told of every token as it is drawn: the numbers of the sequences that have one more, those tokens and
            their log-probs. False from it ends the batch.

    Raises:
        UserError: stop strings without a tokenizer, or a model that cannot be sampled from.
    """
    n, stops = sampling.samples_per_prompt, stop_strings(tokenizer, sampling.stop)
    numbers = list(range(len(prompts))) if rows is None else list(rows)
    requests = [(p.ids, (i, j)) for p, i in zip(prompts, numbers, strict=True) for j in sampling.numbers]
    ends = _Ends(() if sampling.ignore_eos else tuple(eos_ids), pad_id, stops)
    was_training = model.training
    model.eval()
    holders = [model, base_model(model)]  # adapters hand their wrapper's settings down to the model below
    own = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig()
        with own_precision(model):
            together = len(requests) == 1 or _may_be_batched(model, ends)
            lengths = [len(ids) + sampling.max_new_tokens for ids, _ in requests]
            batches = groups(lengths, batch_tokens, at_most=0 if together else 1)
            drawn = [
                s
                for batch in batches
                for s in _drawn(model, [requests[i] for i in batch], sampling, ends, _watch_of(watch, batch))
            ]
    finally:
        for holder, config in zip(holders, own, strict=True):
            holder.generation_config = config
    model.train(was_training)
    return collate(
        [ids for ids, _ in requests],
        [sequence.ids for sequence in drawn],
        pad_id=pad_id,
        behavior_logprobs=[sequence.logprobs for sequence in drawn],
        finish=[sequence.finish for sequence in drawn],
        domain=[p.domain for p in prompts for _ in range(n)],
        policy_version=policy_version,
    )


def _watch_of(watch: Watch | None, batch: Sequence[int]) -> Watch | None:
    """As ``watch``, for a batch of these sequences."""
    if watch is None:
        return None
    return lambda live, ids, logprobs: watch([batch[i] for i in live], ids, logprobs)


# Models that were found to write the same in a batch as alone, or not to.
_batched: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
_PROBE = [[11, 7, 5], [6, 9, 12, 8, 13, 10, 14, 15, 16]]  # prompts of different length
_PROBE_TOKENS = 3
# nats a token: the order of sums differs by 1e-5 in float32, 16 bits by 0.05 on average; a state that padding or a
# neighbour got into by some tenths, in small random models.
_SAME, _SAME_16 = 1e-2, 0.2

Watch = Callable[[Sequence[int], Sequence[int], Sequence[float]], bool]
Request = tuple[int, int]  # prompt, and sample of it: what its random stream is of


@dataclass(frozen=True)
class _Ends:
    """What ends a completion, and what fills a batch up."""

    eos_ids: tuple[int, ...]
    pad_id: int
    stops: StopStrings | None = None

    def of(self, ids: Sequence[int]) -> int | None:
        """The number of tokens of a completion up to its end; None: it has none."""
        eos = next((i + 1 for i, token in enumerate(ids) if token in self.eos_ids), None)
        stop = None if self.stops is None else self.stops.end(ids[:eos])
        return eos if stop is None else stop


@dataclass(frozen=True)
class _Sequence:
    """One completion, the ending eos included."""

    ids: list[int]
    logprobs: list[float]
    finish: Finish


def _may_be_batched(model: PreTrainedModel, ends: _Ends) -> bool:
    """Whether completions in a left-padded batch are those of the prompts alone: recurrent models have states that
    padding runs through (RecurrentGemma), or that transformers mixes up in a batch (RWKV). Tried out once for a model.

    Raises:
        UserError: alone they are not what its forward says either.
    """
    base = base_model(model)
    if base not in _batched:
        width = base.config.get_text_config().vocab_size
        requests = [([i % width for i in ids], (n, 0)) for n, ids in enumerate(_PROBE)]
        allowed = _SAME_16 if computes_in_16_bits(model) else _SAME
        together = _distance_from_forward(model, [requests], ends)
        _batched[base] = together <= allowed
        if not _batched[base] and not _distance_from_forward(model, [[r] for r in requests], ends) <= allowed:
            del _batched[base]
            raise UserError(
                f"{type(base).__name__} cannot be sampled from: generate() fails, or what it writes has log-probs that "
                f"are not those of its own forward pass ({together:.2g} nats a token off), in a batch and one by one. "
                "Fix: another student, or --sequences dataset or teacher."
            )
        if not _batched[base]:
            logger.warning("%s cannot be sampled from in batches: one sequence at a time", type(base).__name__)
    return _batched[base]


def _distance_from_forward(
    model: PreTrainedModel, groups: Sequence[Sequence[tuple[list[int], Request]]], ends: _Ends
) -> float:
    """Mean difference in nats of the log-probs that ``generate`` drew with from those of a forward pass without a
    cache and without padding."""
    gaps = list[Tensor]()
    for group in groups:
        try:
            drawn = _drawn(model, group, Sampling(_PROBE_TOKENS, temperature=0.0), ends)
        except UserError:
            raise
        except (ValueError, IndexError, TypeError) as error:  # states of another shape than the model's own cache makes
            logger.info("%s.generate() of %d sequences: %s", type(base_model(model)).__name__, len(group), error)
            return math.inf
        for (ids, _), sequence in zip(group, drawn, strict=True):
            whole = torch.tensor([[*ids, *sequence.ids]], device=model.device)
            logits_TV = model(input_ids=whole, use_cache=False).logits[0, len(ids) - 1 : -1].float()
            forward = logits_TV.log_softmax(-1).gather(-1, whole[0, len(ids) :, None]).squeeze(-1).cpu()
            gaps.append((forward - torch.tensor(sequence.logprobs)).abs())
    return float(torch.cat(gaps).mean())


def _drawn(
    model: PreTrainedModel,
    requests: Sequence[tuple[list[int], Request]],
    sampling: Sampling,
    ends: _Ends,
    watch: Watch | None = None,
) -> list[_Sequence]:
    """Completions of requests, each with its prompt, in one batch."""
    width = max(len(ids) for ids, _ in requests)
    pad = [width - len(ids) for ids, _ in requests]
    padded = [[ends.pad_id] * k + list(ids) for k, (ids, _) in zip(pad, requests, strict=True)]
    mask = [[0] * k + [1] * len(ids) for k, (ids, _) in zip(pad, requests, strict=True)]
    ids_BT, mask_BT = torch.tensor(padded, device=model.device), torch.tensor(mask, device=model.device)
    # Drawing is ours (one uniform number per request and token), so transformers only has to take the best score.
    draw = _Draw(sampling, [request for _, request in requests]).to(model.device)
    watched = [] if watch is None else [_Watched(watch, ends, draw, len(requests))]
    out = _generated(model, ids_BT, mask_BT, sampling, draw, ends, watched)
    found = []
    for row, row_logprobs in zip(out[:, width:].tolist(), draw.logprobs(), strict=True):
        end = ends.of(row)
        ids = row[:end]
        found.append(_Sequence(ids, row_logprobs[: len(ids)], "length" if end is None else "stop"))
    return found


def _generated(
    model: PreTrainedModel,
    ids_BT: Tensor,
    mask_BT: Tensor,
    sampling: Sampling,
    draw: _Draw,
    ends: _Ends,
    more: Sequence[StoppingCriteria] = (),
) -> Tensor:
    """Prompts and completions, [B, T + new]. Nothing of the checkpoint's own generation settings is in force: vLLM does
    not apply them either, and a repetition penalty would make what is drawn another distribution than the policy's."""
    stopping = [] if ends.stops is None else [_Stopped(ends.stops, ids_BT.shape[1])]
    return model.generate(  # type: ignore[operator,no-any-return]
        input_ids=ids_BT,
        attention_mask=mask_BT,
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        eos_token_id=list(ends.eos_ids) or None,
        pad_token_id=ends.pad_id,
        use_cache=True,
        logits_processor=LogitsProcessorList([_Finite(), *_warpers(sampling, mask_BT), draw]),
        stopping_criteria=StoppingCriteriaList([*stopping, *more]),
        synced_gpus=False,  # parameters are gathered: ranks need not take equally many steps
    )


def _warpers(sampling: Sampling, mask_BT: Tensor) -> list[LogitsProcessor]:
    """Repetition penalty, temperature, min-p, top-k, top-p, in vLLM's order."""
    found: list[LogitsProcessor] = []
    if sampling.repetition_penalty != 1:
        found.append(_RepetitionPenalty(sampling.repetition_penalty, mask_BT))
    if sampling.temperature not in (0, 1):
        found.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.temperature and sampling.min_p:
        found.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    return found


class _RepetitionPenalty(LogitsProcessor):
    """Logits of tokens that stand in prompt or completion, divided by the penalty above 0 and multiplied below
    (CTRL, arXiv 1909.05858). transformers' own takes padding for a part of the prompt."""

    def __init__(self, penalty: float, mask_BT: Tensor) -> None:
        self.penalty, self.mask_BT = penalty, mask_BT.bool()
        self.seen_BV: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        if self.seen_BV is None:
            counts_BV = torch.zeros(scores.shape, dtype=torch.int32, device=scores.device)
            counts_BV.scatter_add_(1, input_ids, self.mask_BT.to(torch.int32))
            self.seen_BV = counts_BV > 0
        else:
            self.seen_BV.scatter_(1, input_ids[:, -1:], True)
        scaled_BV = torch.where(scores > 0, scores / self.penalty, scores * self.penalty)
        return torch.where(self.seen_BV, scaled_BV, scores)


class _Stopped(StoppingCriteria):
    """Rows whose completion has a stop string."""

    def __init__(self, stops: StopStrings, start: int) -> None:
        self.stops, self.start = stops, start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        rows = input_ids[:, max(self.start, input_ids.shape[1] - self.stops.window) :].tolist()
        ended = [self.stops.ends(row) for row in rows]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


class _Watched(StoppingCriteria):
    """Tells of every token of the sequences that have not ended."""

    def __init__(self, watch: Watch, ends: _Ends, draw: _Draw, count: int) -> None:
        self.watch, self.ends, self.draw, self.live = watch, ends, draw, list(range(count))

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        tokens, logprobs = input_ids[:, -1].tolist(), self.draw.drawn_lp[-1].tolist()
        goes_on = self.watch(self.live, [tokens[i] for i in self.live], [logprobs[i] for i in self.live])
        self.live = [i for i in self.live if tokens[i] not in self.ends.eos_ids]
        return torch.full((len(input_ids),), not goes_on, dtype=torch.bool, device=input_ids.device)


class _Draw(LogitsProcessor):
    """Turns scores into the drawn token: inverse-CDF sampling with a random stream of its own for every request.

    What a request draws does not depend on its neighbours, on its place in the batch, or on the global random state,
    which is not touched.
    """

    def __init__(self, sampling: Sampling, requests: Sequence[Request]) -> None:
        streams = [torch.Generator().manual_seed(request_seed(sampling.seed, i, j)) for i, j in requests]
        shape = sampling.max_new_tokens
        self.uniform_BL = torch.stack([torch.rand(shape, generator=g, dtype=torch.float64) for g in streams])
        self.greedy, self.step = sampling.temperature == 0, 0
        self.drawn_lp: list[Tensor] = []  # [B] of every step

    def to(self, device: torch.device) -> _Draw:
        self.uniform_BL = self.uniform_BL.to(device)
        return self

    def logprobs(self) -> list[list[float]]:
        """Of every token drawn, [B, steps]."""
        return torch.stack(self.drawn_lp, 1).tolist()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        if self.greedy:
            best_B = scores.argmax(-1, keepdim=True)
            self.drawn_lp.append((scores.gather(-1, best_B) - scores.logsumexp(-1, keepdim=True)).squeeze(-1).float())
            return scores
        # float64: over 150k columns a float32 running sum loses the tail.
        probabilities_BV = scores.double().softmax(-1)
        cdf_BV = probabilities_BV.cumsum(-1)
        threshold_B1 = self.uniform_BL[:, self.step, None] * cdf_BV[:, -1:]
        self.step += 1
        drawn_B1 = torch.searchsorted(cdf_BV, threshold_B1, right=True).clamp(max=scores.shape[-1] - 1)
        self.drawn_lp.append(probabilities_BV.gather(-1, drawn_B1).log().squeeze(-1).float())
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn_B1, 0.0)


class _Finite(LogitsProcessor):
    """Refuses to sample from weights that have exploded, with a word on why, before torch's assertion does.

    A class and no function: transformers reads the signature of ``__call__`` at every token, and to read a function's
    takes 0.3 ms.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        if not bool(scores.amax(-1).isfinite().all()):
            raise UserError(
                "the model's logits are not finite; it cannot be sampled from. "
                "Fix: lower train.learning_rate, then --resume."
            )
        return scores
