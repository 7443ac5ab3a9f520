"""Asking a service for completions: split into requests that stay within its limits, put together in order."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import httpx
import numpy as np

from llmdistill.errors import UserError
from llmdistill.rollouts.engine import Hear
from llmdistill.texts.rollout import Finish, Prompt, Rollout, Sampling, collate
from llmdistill.wire.bodies import Completions, pack_prompts, unpack_completions
from llmdistill.wire.protocol import COMPLETIONS_TYPE, GENERATE, IDS_TYPE
from llmdistill.wire.transport import Request, Transport

SAMPLE_BYTES, TOKEN_BYTES = 64, 8  # of an answer: for a sample, and for each of its tokens
ANSWER_BYTES = 1 << 16  # and for the rest of it
PROMPT_BYTES, FRAME_BYTES = 12, 64  # of a request, beside ids and settings: for a prompt, and for the rest of it
LOGPROB_ROUNDING = 1e-3  # an engine in 16 bits may report so much above 0

Parse = Callable[[httpx.Response], Completions]
Drawn = tuple[list[int], list[float], Finish]  # ids of a completion, their log-probs, how it ended


def sample(
    transport: Transport,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    limits: Mapping[str, int],
    vocab_size: int,
    pad_id: int,
    eos_ids: Sequence[int] | None = None,
    teacher: str | None = None,
    batch_tokens: int = 0,
    hear: Hear | None = None,
) -> Rollout:
    """Completions of every prompt from a service, split into requests that stay within its limits.

    Args:
        batch_tokens: of this caller, prompts and room for completions that are generated at one time by each replica;
            0: as the service likes. Samples of a prompt that are more go in parts.
        hear: called with what each request brought, as soon as it is there, by the thread that asked.

    Raises:
        UserError: ``max_new_tokens``, or a prompt with it, is above the service's limits.
    """
    n, where = sampling.samples_per_prompt, f"the service at {transport.urls[0]}"
    longest = max((len(p.ids) for p in prompts), default=0) + sampling.max_new_tokens

    def rollout(of: Sequence[Prompt], drawn: Sequence[Drawn], policy_version: int) -> Rollout:
        return collate(
            [p.ids for p in of],
            [ids for ids, _, _ in drawn],
            pad_id=pad_id,
            behavior_logprobs=[logprobs for _, logprobs, _ in drawn],
            finish=[finish for _, _, finish in drawn],
            domain=[p.domain for p in of],
            policy_version=policy_version,
        )

    def told(of: Sequence[Prompt], parse: Parse) -> Parse:
        """``parse`` that also tells ``hear`` what it read, the completions of the prompts ``of``."""
        if hear is None:
            return parse

        def parsed(response: httpx.Response) -> Completions:
            given = parse(response)
            hear(rollout(of, _drawn(given), given.settings["policy_version"]), of)
            return given

        return parsed

    for found, limit, what in (
        (sampling.max_new_tokens, limits["new_tokens"], "generates at most {} tokens"),
        (longest, limits["sequence_tokens"], f"the longest prompt makes that {longest} tokens, it holds {{}}"),
    ):
        if found > limit:
            raise UserError(
                f"rollouts.max_new_tokens is {sampling.max_new_tokens}; {where} {what.format(limit)}. "
                f"Fix: lower it or data.max_prompt_tokens, or raise the service's limit."
            )
    settings: dict[str, Any] = {
        "sampling": dataclasses.asdict(sampling),
        "eos_ids": None if eos_ids is None else list(eos_ids),
        "adapter": None,
        "teacher": teacher,
    }
    # every replica gets some; one engine likes one large batch
    share = -(-len(prompts) * n // len(transport.replicas()))
    room = (limits["sequences"], limits["body_bytes"] - len(json.dumps(settings)) - FRAME_BYTES, share)
    requests, asked = [], list[tuple[int, int]]()  # and the prompt and number of every sample in the answers
    for part in _parts(sampling, batch_tokens // longest if batch_tokens else n):
        k = part.samples_per_prompt
        costs = [(k, 4 * len(p.ids) + PROMPT_BYTES, k, k * longest) for p in prompts]
        for rows in pack(costs, (*room, batch_tokens or sum(cost[-1] for cost in costs))):
            ids = [np.asarray(prompts[i].ids, np.int32) for i in rows]
            parse = told([prompts[i] for i in rows for _ in range(k)], _completions_of(len(rows), part, vocab_size))
            most = ANSWER_BYTES + len(rows) * k * (SAMPLE_BYTES + TOKEN_BYTES * sampling.max_new_tokens)
            body = pack_prompts({**settings, "sampling": dataclasses.asdict(part)}, ids, rows)
            requests.append(
                Request(GENERATE, parse, body=body, body_type=IDS_TYPE, answer_type=COMPLETIONS_TYPE, max_bytes=most)
            )
            asked += [(i, j) for i in rows for j in part.numbers]
    # with a bound every replica works at one request
    answers = transport.send_all(requests, len(transport.replicas()) if batch_tokens else None)
    drawn = [each for given in answers for each in _drawn(given)]
    order = sorted(range(len(asked)), key=asked.__getitem__)
    version = min((given.settings["policy_version"] for given in answers), default=0)
    return rollout([p for p in prompts for _ in range(n)], [drawn[i] for i in order], version)


def _drawn(given: Completions) -> list[Drawn]:
    return [
        (ids.tolist(), logprobs.tolist(), finish)
        for ids, logprobs, finish in zip(given.ids, given.logprobs, given.finish, strict=True)
    ]


def _parts(sampling: Sampling, most: int) -> list[Sampling]:
    """The samples of every prompt, at most so many of each in one call."""
    n, each = sampling.samples_per_prompt, max(most, 1)
    return [
        replace(sampling, first_sample=sampling.first_sample + start, samples_per_prompt=min(each, n - start))
        for start in range(0, n, each)
    ]


def pack(costs: Sequence[Sequence[int]], room: Sequence[int]) -> list[list[int]]:
    """Indices in order, in groups whose summed costs stay within ``room``; one that is above it is alone."""
    groups: list[list[int]] = []
    used: list[int] = []
    for i, cost in enumerate(costs):
        summed = [u + c for u, c in zip(used, cost, strict=True)] if groups else []
        if groups and all(s <= r for s, r in zip(summed, room, strict=True)):
            groups[-1].append(i)
            used = summed
        else:
            groups.append([i])
            used = list(cost)
    return groups


def _completions_of(count: int, sampling: Sampling, vocab_size: int) -> Parse:
    """Reads the samples of ``count`` prompts and makes sure that nothing is missing, and nothing is there that no
    engine draws: an id outside the vocabulary would be looked up in the student's embeddings."""

    def parse(response: httpx.Response) -> Completions:
        given = unpack_completions(response.content)
        if len(given.ids) != count * sampling.samples_per_prompt:
            raise ValueError(f"{len(given.ids)} samples of {count} x {sampling.samples_per_prompt}")
        for ids, logprobs in zip(given.ids, given.logprobs, strict=True):
            if len(ids) > sampling.max_new_tokens:
                raise ValueError(f"a completion of {len(ids)} tokens; at most {sampling.max_new_tokens} were asked for")
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
                raise ValueError(f"a completion has ids {ids.min()} to {ids.max()}; the vocabulary has {vocab_size}")
            if not bool((logprobs <= LOGPROB_ROUNDING).all()):  # a NaN is not
                raise ValueError("a log-prob of a completion is positive or not a number")
        if type(given.settings.get("policy_version")) is not int:
            raise ValueError("an answer without the version of the policy")
        return given

    return parse
