"""How this project asks a vLLM engine, in this process or behind the service: parameters in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmdistill.compat.vllm_arrays import asked_for
from llmdistill.texts.rollout import Finish, Sampling
from llmdistill.texts.stops import StopStrings
from llmdistill.wire.listing import merged


@dataclass(frozen=True)
class Drawn:
    """A completion: its ids with what ended it, the log-prob of each, and how it ended."""

    ids: list[int]
    logprobs: list[float]
    finish: Finish


def drawn(output: Any, stops: StopStrings | None = None) -> Drawn:
    """What vLLM's ``CompletionOutput`` says, ended at the first stop string: the engine may be some tokens past it."""
    ids, logprobs = list(output.token_ids), list(output.logprobs.logprobs)
    end = None if stops is None else stops.end(ids)
    by_itself = end is not None or output.finish_reason == "stop"
    return Drawn(ids[:end], logprobs[:end], "stop" if by_itself else "length")


def generation_params(sampling: Sampling, seed: int, eos_ids: Sequence[int], streamed: bool = False) -> Any:
    """``SamplingParams`` of one sample: its own seed, the sampled tokens' log-probs, no text. With ``streamed`` there
    is an output after every token, of all so far.

    Stop strings are looked for by us (:mod:`llmdistill.texts.stops`), in what the engine has written so far: it has no
    tokenizer.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        max_tokens=sampling.max_new_tokens,
        seed=seed,
        stop_token_ids=[] if sampling.ignore_eos else list(eos_ids),
        ignore_eos=True,  # of the model's configuration: the ids above are all that end a completion
        logprobs=0,  # the sampled token's only
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.CUMULATIVE if sampling.stop or streamed else RequestOutputKind.FINAL_ONLY,
    )


def scoring_params(
    length: int,
    positions: np.ndarray,
    top_k: int,
    vocab_size: int,
    chosen_nC: Tensor | None,
    *,
    hidden: bool = False,
) -> Any:
    """``SamplingParams`` that score the tokens at ``positions`` of a prompt of ``length`` tokens, or with ``hidden``
    ask for the hidden states that they are predicted from.

    Log-probs of a prompt are vLLM's only way to score; they ignore temperature, so they are at 1, and do not use the
    prefix cache. One token is generated because at least one must be.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    ids, start = None, None
    if chosen_nC is not None and len(positions):
        start = int(positions[0]) - 1  # row i speaks of token start + i + 1
        ids = np.full((length - 1 - start, chosen_nC.shape[1]), -1, dtype=np.int32)
        ids[positions - 1 - start] = chosen_nC.cpu().numpy()
    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        prompt_logprobs=-1 if top_k == vocab_size else top_k,
        extra_args=asked_for(int(positions[0]) - 1 if len(positions) else 0, hidden),
        prompt_logprob_token_ids=ids,
        prompt_logprob_start=start,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def hidden_rows(output: Any, positions: np.ndarray) -> Tensor:
    """Hidden states [n, H] in the model's dtype that the tokens at ``positions`` were predicted from."""
    found: Tensor = output.prompt_logprobs.values(len(output.prompt_token_ids), positions)
    return found


def scored_rows(
    output: Any, positions: np.ndarray, top_k: int, vocab_size: int, chosen_nC: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Token log-probs [n], ids [n, K] and log-probs [n, K] of a scored prompt."""
    length = len(output.prompt_token_ids)
    values_nK = output.prompt_logprobs.values(length, positions)[:, : top_k + 1]  # the token itself comes first
    ids_nK = output.prompt_logprobs.token_ids(length, positions)[:, 1 : top_k + 1]
    token_n, values_nK = values_nK[:, 0], values_nK[:, 1:]
    if chosen_nC is not None:
        scores = output.prompt_token_id_logprobs
        first = int(positions[0]) if len(positions) else 0
        found = (
            torch.from_numpy(np.asarray(scores)[positions - first]) if len(positions) else torch.zeros(chosen_nC.shape)
        )
        ids_nK, values_nK = merged(ids_nK, values_nK, chosen_nC, found, vocab_size)
    return token_n, ids_nK, values_nK
