"""A teacher behind a plain vLLM OpenAI server, for those who already run one.

Evidence comes from the prompt log-probs of ``/v1/completions``, as JSON: about 70 bytes a listed token where our own
service needs 4 to 6. What such a server cannot give: ids of the caller's choice, more listed tokens than its
``--max-logprobs``, weights that change, and word of its weights. A server that was started again with another
checkpoint under the same name is therefore not noticed, and a request that is sent again is computed again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from llmdistill.errors import UserError
from llmdistill.models.missing import why_not_loaded
from llmdistill.rollouts.asking import LOGPROB_ROUNDING, pack
from llmdistill.teachers.base import TeacherInfo
from llmdistill.teachers.fingerprint import template_hash, tokenizer_fingerprint
from llmdistill.teachers.vllm import describe
from llmdistill.texts import Prompt, Rollout, Sampling, collate, request_seed
from llmdistill.tokenization import special
from llmdistill.wire.blocks import BlockHeader, ScoreBlock
from llmdistill.wire.transport import Get, Refused, Request, Transport, json_object

COMPLETIONS, MODELS, HEALTH = "/v1/completions", "/v1/models", "/health"
LISTED_BYTES = 72  # of JSON, for one listed token
MOST_LISTED_BYTES, REST_BYTES = 512, 1 << 16  # that are read of an answer: for one, and for what is about all
ANSWER_BYTES = 32 << 20  # of one answer
MAX_PROMPTS = 512  # of one request; vLLM's own bound is 1024


class PlainVLLMTeacher:
    """Implements :class:`~llmdistill.teachers.base.Teacher` over ``vllm serve``.

    Args:
        url: of the server, with or without ``/v1``; several replicas as a list or with commas.
        model: as the server calls it; None: the one it serves.
        tokenizer: the teacher's, or the folder or hub name to load it from. None: the server's ``root``, where that is
            a folder here or in the local hub cache. The weights' fingerprint is taken from that folder too; without
            one, the model's name stands for its weights.
        options: of :class:`~llmdistill.wire.transport.Transport`.

    Raises:
        UserError: no server there within ``max_outage_s``, no such model, or no tokenizer.
    """

    live = True
    scores_chosen = False

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        model: str | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        token: str | None = None,
        timeout_s: float = 120.0,
        max_outage_s: float = 3600.0,
        in_flight: int = 8,
        **options: Any,
    ) -> None:
        self.model = model
        self._card: dict[str, Any] = {}
        self._max_top_k: int | None = None
        self.transport = Transport(
            url,
            token=token,
            admit=self._admit,
            timeout_s=timeout_s,
            max_outage_s=max_outage_s,
            in_flight=in_flight,
            keeps_answers=False,
            **options,
        )
        try:
            self.transport.wait_ready()
            self._info, self.tokenizer = _described(self._card, tokenizer)
        except BaseException:
            self.close()
            raise

    @property
    def bytes_received(self) -> int:
        """Of evidence and completions so far."""
        return self.transport.counters.bytes_received

    @property
    def max_top_k(self) -> int:
        """The server's ``--max-logprobs``, which it tells nobody: asked for everything, it names it in its refusal.

        A prompt of one token has no log-probs, so a server without a limit answers with none.
        """
        if self._max_top_k is None:
            vocab = self._info.vocab_size
            try:
                self.transport.send(self._scoring([[0]], vocab))
                self._max_top_k = vocab
            except Refused as refusal:
                limit = re.search(r"(?:max allowed|at most)\D*(\d+)", str(refusal))
                if "logprobs" not in str(refusal) or limit is None:
                    raise
                self._max_top_k = min(int(limit[1]), vocab)
        return self._max_top_k

    def info(self) -> TeacherInfo:
        return self._info

    def score(self, rollout: Rollout, top_k: int, chosen: Tensor | None = None) -> list[ScoreBlock]:
        """One block per sequence, log-probs as exact as the server computes them.

        Raises:
            UserError: ``chosen`` is given, ``top_k`` is above the server's ``--max-logprobs``, or a sequence is longer
                than it holds.
        """
        info = self._info
        if chosen is not None:
            raise UserError(
                "objective.support asks for ids of the student's choice; a plain vLLM server cannot score them. "
                "Fix: serve the teacher with llmdistill serve, or use the teacher's own top-k."
            )
        if top_k > info.vocab_size:
            raise UserError(
                f"objective.top_k is {top_k}; the teacher has {info.vocab_size} logit columns. "
                f"Fix: at most {info.vocab_size}."
            )
        counted_BT = rollout.completion_mask.clone()
        counted_BT[:, :1] = False
        ids = [row[real].tolist() for row, real in zip(rollout.input_ids, rollout.attention_mask, strict=True)]
        asked = [b for b in sorted(range(len(ids)), key=lambda b: -len(ids[b])) if counted_BT[b].any()]
        if asked and len(ids[asked[0]]) > info.context_length:
            raise UserError(
                f"a sequence has {len(ids[asked[0]])} tokens; the server at {self.transport.urls[0]} scores "
                f"{info.context_length} (its --max-model-len, less one). "
                f"Fix: lower data.max_prompt_tokens or rollouts.max_new_tokens, or raise it."
            )
        share = -(-sum(len(ids[b]) for b in asked) // (2 * len(self.transport.replicas())))
        room = (MAX_PROMPTS, min(share, ANSWER_BYTES // (LISTED_BYTES * (top_k + 1))))
        groups = [[asked[i] for i in group] for group in pack([(1, len(ids[b])) for b in asked], room)]
        listed = -1 if top_k == info.vocab_size else top_k  # -1: of the server's vocabulary, should that be another
        answers = self._send([self._scoring([ids[b] for b in g], listed) for g in groups], top_k)
        found = {b: rows for g, answer in zip(groups, answers, strict=True) for b, rows in zip(g, answer, strict=True)}
        header = BlockHeader(info.fingerprint, info.tokenizer, top_k, info.vocab_size)
        return [
            _block(found.get(b), ids[b], counted_BT[b], real, top_k, header)
            for b, real in enumerate(rollout.attention_mask)
        ]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        """Completions, every sample a request with a seed of its own.

        ``behavior_logprobs`` is None where the tokens are not drawn from softmax(logits): the server reports no others.

        Raises:
            UserError: a prompt leaves no room for ``max_new_tokens``.
        """
        longest = max((len(p.ids) for p in prompts), default=0) + sampling.max_new_tokens
        if longest > self._info.context_length + 1:
            raise UserError(
                f"rollouts.max_new_tokens is {sampling.max_new_tokens}; the longest prompt makes that {longest} "
                f"tokens, the server at {self.transport.urls[0]} holds {self._info.context_length + 1}. "
                f"Fix: lower it or data.max_prompt_tokens, or raise the server's --max-model-len."
            )
        asked = [(i, j) for i in range(len(prompts)) for j in sampling.numbers]
        drawn = self._send([self._sampling(prompts[i], sampling, i, j) for i, j in asked], 0)
        return collate(
            [prompts[i].ids for i, _ in asked],
            [d["token_ids"] for d in drawn],
            pad_id=special.pad_id(self.tokenizer),
            behavior_logprobs=[d["logprobs"]["token_logprobs"] for d in drawn] if sampling.plain else None,
            finish=["stop" if d["finish_reason"] == "stop" else "length" for d in drawn],
            domain=[prompts[i].domain for i, _ in asked],
        )

    def close(self) -> None:
        self.transport.close()

    def _admit(self, get: Get) -> None:
        get(HEALTH)
        cards = json_object(get(MODELS))["data"]
        names = [card["id"] for card in cards]
        if self.model is not None and self.model not in names:
            raise UserError(f"model is {self.model!r}; the server serves {', '.join(names)}. Fix: use one of them.")
        card = cards[0] if self.model is None else cards[names.index(self.model)]
        for name in ("id", "root", "max_model_len"):
            if self._card and card.get(name) != self._card.get(name):
                raise UserError(
                    f"teacher {', '.join(self.transport.urls)}: {name} was {self._card.get(name)!r} and is now "
                    f"{card.get(name)!r}. Fix: serve one model everywhere, then --resume."
                )
        self.model, self._card = card["id"], card

    def _send(self, requests: Sequence[Request[Any]], top_k: int) -> list[Any]:
        try:
            return self.transport.send_all(requests)
        except Refused as refusal:
            if "logprobs" not in str(refusal):
                raise
            raise UserError(
                f"objective.top_k is {top_k}; {refusal}. "
                f"Fix: lower it, or start the server with --max-logprobs {top_k}."
            ) from refusal

    def _scoring(self, sequences: list[list[int]], listed: int) -> Request[list[list[dict[str, Any]]]]:
        body = {
            "model": self.model,
            "prompt": sequences,
            "max_tokens": 1,  # vLLM insists on one
            "temperature": 0.0,
            "prompt_logprobs": listed,
            "return_token_ids": True,
        }
        width = self._info.vocab_size if listed < 0 else listed
        most = REST_BYTES + sum(map(len, sequences)) * (width + 2) * MOST_LISTED_BYTES
        parse = _scored_of(sequences, width, self._info.vocab_size)
        return Request(COMPLETIONS, parse, body=json.dumps(body).encode(), max_bytes=most)

    def _sampling(self, prompt: Prompt, sampling: Sampling, row: int, sample: int) -> Request[dict[str, Any]]:
        body = {
            "model": self.model,
            "prompt": list(prompt.ids),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": request_seed(sampling.seed, row, sample),
            "stop_token_ids": [] if sampling.ignore_eos else list(self._info.eos_ids),
            "ignore_eos": sampling.ignore_eos,
            # a checkpoint's generation config would else decide
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            **({"stop": list(sampling.stop), "skip_special_tokens": False} if sampling.stop else {}),
            "logprobs": 0,  # the sampled token's only
            "return_token_ids": True,
        }
        most = REST_BYTES + (len(prompt.ids) + sampling.max_new_tokens) * MOST_LISTED_BYTES
        parse = _drawn_of(sampling.max_new_tokens, self._info.vocab_size)
        return Request(COMPLETIONS, parse, body=json.dumps(body).encode(), max_bytes=most)


def _drawn_of(max_new_tokens: int, vocab_size: int) -> Callable[[httpx.Response], dict[str, Any]]:
    """Reads one completion, as long as was asked for, of ids that there are."""

    def parse(response: httpx.Response) -> dict[str, Any]:
        (choice,) = json_object(response)["choices"]
        ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        if len(ids) != len(logprobs) or len(ids) > max_new_tokens:
            raise ValueError(f"{len(ids)} ids and {len(logprobs)} log-probs of a completion of {max_new_tokens} tokens")
        for token, logprob in zip(ids, logprobs, strict=True):
            _check_cell(token, logprob, vocab_size)
        if choice["finish_reason"] not in ("stop", "length"):
            raise ValueError(f"the completion ended with {choice['finish_reason']!r}")
        return choice  # type: ignore[no-any-return]

    return parse


def _scored_of(
    sequences: list[list[int]], width: int, vocab_size: int
) -> Callable[[httpx.Response], list[list[dict[str, Any]]]]:
    """Reads, for every token of every sequence, what is listed there: {id: {logprob, rank}}; None at the first."""

    def parse(response: httpx.Response) -> list[list[dict[str, Any]]]:
        choices = sorted(json_object(response)["choices"], key=lambda choice: choice["index"])
        for choice, ids in zip(choices, sequences, strict=True):
            listed = choice["prompt_logprobs"]
            if choice["prompt_token_ids"] != ids or len(listed) != len(ids):
                raise ValueError("the server scored other tokens than it was sent")
            for token, cells in zip(ids[1:], listed[1:], strict=True):
                if str(token) not in cells or not width <= len(cells) <= width + 1:
                    raise ValueError(f"{len(cells)} tokens are listed, or not token {token}; asked for {width} and it")
                for name, cell in cells.items():
                    _check_cell(int(name), cell["logprob"], vocab_size)
        return [choice["prompt_logprobs"] for choice in choices]

    return parse


def _check_cell(token: Any, logprob: Any, vocab_size: int) -> None:
    if type(token) is not int or not 0 <= token < vocab_size:
        raise ValueError(f"token {token!r} is none of the {vocab_size} of the vocabulary")
    if not isinstance(logprob, int | float) or not logprob <= LOGPROB_ROUNDING:  # a NaN is not
        raise ValueError(f"a log-prob is {logprob!r}")


def _block(
    listed: list[dict[str, Any]] | None, ids: list[int], counted_T: Tensor, real_T: Tensor, k: int, header: BlockHeader
) -> ScoreBlock:
    """From vLLM's dictionaries, the top ranks and the token itself, to a block."""
    if listed is None:
        return ScoreBlock(slice(0, 0), torch.zeros(0), torch.zeros(0, k, dtype=torch.int32), torch.zeros(0, k), header)
    token, top_ids, top_lp = [], [], []
    for t in counted_T[real_T].nonzero().flatten().tolist():
        own = listed[t][str(ids[t])]
        # the token itself is there beside the k likeliest, or is one of them
        top = [(c["logprob"], int(i)) for i, c in listed[t].items() if len(listed[t]) <= k or i != str(ids[t])]
        top.sort(key=lambda pair: (-pair[0], pair[1]))
        token.append(own["logprob"])
        top_ids.append([i for _, i in top[:k]])
        top_lp.append([lp for lp, _ in top[:k]])
    at = counted_T.nonzero().flatten().tolist()
    return ScoreBlock(
        slice(at[0], at[-1] + 1),
        torch.tensor(token),
        torch.tensor(top_ids, dtype=torch.int32).reshape(len(at), k),
        torch.tensor(top_lp).reshape(len(at), k),
        header,
    )


def _described(
    card: dict[str, Any], tokenizer: str | PreTrainedTokenizerBase | None
) -> tuple[TeacherInfo, PreTrainedTokenizerBase]:
    """What is known of the model a server's card names, and its tokenizer."""
    root = str(card.get("root") or card["id"])
    folder = _local(root)
    given: Any = tokenizer
    if isinstance(tokenizer, str):
        given = tokenizer_named(tokenizer)
    if folder is not None:
        info, found = describe(folder)
        info = replace(info, name=card["id"])
    elif given is None:
        raise UserError(
            f"teacher.url names a server of {root!r}, which is no folder or cached model here; its tokenizer is "
            f"needed. "
            f"Fix: give one (PlainVLLMTeacher(tokenizer=FOLDER_OR_HUB_NAME)), or have {root!r} where the server has it."
        )
    else:
        found = given
        info = _stand_in(card, given, tokenizer if isinstance(tokenizer, str) else None)
    if given is not None:
        info = replace(info, tokenizer=tokenizer_fingerprint(given), template=template_hash(given))
    longest = int(card.get("max_model_len") or info.context_length + 1) - 1  # one token is always generated
    return replace(info, context_length=min(info.context_length, longest)), given if given is not None else found


def _stand_in(card: dict[str, Any], tokenizer: PreTrainedTokenizerBase, path: str | None) -> TeacherInfo:
    """Where the weights cannot be seen: the model's name for its fingerprint, the tokenizer's ids for its columns
    unless a configuration lies beside it."""
    try:
        columns = AutoConfig.from_pretrained(path).get_text_config().vocab_size if path else len(tokenizer)
    except (OSError, ValueError):
        columns = len(tokenizer)
    try:
        generation = GenerationConfig.from_pretrained(path) if path else None
    except OSError:
        generation = None
    name = f"{card['id']} {card.get('root')}"
    return TeacherInfo(
        name=card["id"],
        fingerprint=hashlib.blake2b(name.encode(), digest_size=8).hexdigest(),
        tokenizer=tokenizer_fingerprint(tokenizer),
        vocab_size=columns,
        eos_ids=special.eos_ids(SimpleNamespace(generation_config=generation), tokenizer),
        context_length=int(card.get("max_model_len") or 1 << 30),
        template=template_hash(tokenizer),
    )


def _local(root: str) -> str | None:
    """The folder of a path or cached hub name."""
    if Path(root).is_dir():
        return root
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(root, local_files_only=True)
    except (OSError, ValueError):
        return None


def tokenizer_named(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name.

    Raises:
        UserError: none there.
    """
    return _loaded(AutoTokenizer, path, f"tokenizer {path!r}")  # type: ignore[no-any-return]


def _loaded(kind: Any, path: str, what: str) -> Any:
    try:
        return kind.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{what} cannot be loaded: {why_not_loaded(path, error)}") from error
