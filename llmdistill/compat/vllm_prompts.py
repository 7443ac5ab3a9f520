"""Prompts scored by vLLM's workers in bounded memory, from the first position that is asked for.

vLLM's first model runner holds the logits of all scheduled tokens at one time, which its memory profiling does not see:
27.8 GiB at 32k tokens and 152k columns. Here they exist a chunk of rows at a time, only of rows that are asked for, and
a request may have the final hidden states instead. The second runner works in chunks of its own; its rows are cut.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from llmdistill.compat.vllm_arrays import FIRST, HIDDEN, is_asked

CHUNK_BYTES = 1 << 29  # of logits, in the model's dtype and in float32 twice
CELL_BYTES = 10
LEAST_TOKENS = 256  # of a step, however little is free
ROW_BYTES = 12  # of one listed token of a scored row until a step ends: an int64 id and a float32 log-prob


def chunk_rows(vocab_size: int) -> int:
    """Rows whose logits exist at one time."""
    return max(1, CHUNK_BYTES // (CELL_BYTES * vocab_size))


def step_tokens(budget: int, free_bytes: int, top_k: int, vocab_size: int) -> int:
    """Tokens of one step, at most ``budget``: what it lists, and a chunk of logits, fit into ``free_bytes``.

    Only lists of very many tokens make it less: the whole vocabulary at every position takes 1.8 MB a token at 152k.
    """
    rest = free_bytes - CELL_BYTES * vocab_size * chunk_rows(vocab_size)
    return max(min(budget, rest // (ROW_BYTES * (min(top_k, vocab_size) + 1))), min(budget, LEAST_TOKENS))


def free_bytes(gpu_memory_utilization: float) -> int:
    """Of memory that vLLM does not plan with: what its share leaves of a GPU, half of what is free on a CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[1] * (1 - gpu_memory_utilization))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def bound_prompt_scores(worker: Any) -> None:
    """Fits a worker, whichever model runner it has."""
    runner = worker.model_runner
    if hasattr(runner, "_get_prompt_logprobs_dict"):
        _FirstRunner(runner).fit()
    elif getattr(runner, "prompt_logprobs_worker", None) is not None:
        _cut_second(runner.prompt_logprobs_worker)


def gives_hidden(worker: Any) -> bool:
    """Whether requests to this worker may have hidden states: where one process runs the whole model."""
    runner, parallel = worker.model_runner, worker.vllm_config.parallel_config
    return hasattr(runner, "_get_prompt_logprobs_dict") and parallel.pipeline_parallel_size == 1


class _FirstRunner:
    """What ``_get_prompt_logprobs_dict`` does, a chunk of rows at a time."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.rows = chunk_rows(runner.model_config.get_vocab_size())

    def fit(self) -> None:
        self.runner._get_prompt_logprobs_dict = self.scored

    def scored(self, hidden: Tensor, scheduled: dict[str, int]) -> dict[str, Any]:
        """Of each request whose prompt ends with this step, ``LogprobsTensors`` of its rows."""
        runner, done = self.runner, dict[str, Any]()
        for name, listed in list(runner.num_prompt_logprobs.items()):
            request = runner.requests[name]
            if name not in scheduled or request.prompt_token_ids is None:
                continue
            length, start = len(request.prompt_token_ids), request.num_computed_tokens
            asked = request.sampling_params.extra_args if is_asked(request.sampling_params) else {FIRST: 0}
            first = min(asked[FIRST], length - 1)
            into = request.in_progress_prompt_logprobs_cpu
            if into is None:
                into = _empty(length - 1 - first, listed, hidden if asked.get(HIDDEN) else None)
                request.in_progress_prompt_logprobs_cpu = into
            low, high = max(start, first), min(start + scheduled[name], length - 1)
            offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[name]]) - start
            if asked.get(HIDDEN) and low < high:
                into.logprobs[low - first : high - first] = hidden[offset + low : offset + high].to("cpu")
            elif low < high:
                ids = torch.tensor(request.prompt_token_ids[low + 1 : high + 1], device=hidden.device)
                self._score(hidden[offset + low : offset + high], ids, listed, into, low - first)
            if start + scheduled[name] >= length:
                done[name] = into
                del runner.num_prompt_logprobs[name]
                request.in_progress_prompt_logprobs_cpu = None
        if done:
            runner._sync_device()
        return done

    def _score(self, hidden: Tensor, tokens: Tensor, listed: int, into: Any, at: int) -> None:
        runner, logits_mode = self.runner, self.runner.model_config.logprobs_mode.endswith("logits")
        for a in range(0, len(hidden), self.rows):
            logits = runner.model.compute_logits(hidden[a : a + self.rows])
            values = logits.float() if logits_mode else runner.sampler.compute_logprobs(logits)
            found = runner.sampler.gather_logprobs(values, listed, tokens[a : a + self.rows])
            rows = slice(at + a, at + a + len(values))
            into.logprob_token_ids[rows].copy_(found.logprob_token_ids, non_blocking=True)
            into.logprobs[rows].copy_(found.logprobs, non_blocking=True)
            into.selected_token_ranks[rows].copy_(found.selected_token_ranks, non_blocking=True)


def _empty(rows: int, listed: int, hidden: Tensor | None) -> Any:
    """Where log-probs of that many listed tokens go, or rows of the hidden states."""
    from vllm.v1.outputs import LogprobsTensors

    if hidden is None:
        return LogprobsTensors.empty_cpu(rows, listed + 1)
    ids = torch.empty(rows, 0, dtype=torch.int32)
    values = torch.empty(rows, hidden.shape[1], dtype=hidden.dtype)
    return LogprobsTensors(ids, values, torch.zeros(rows, dtype=torch.int32))


def _cut_second(prompts: Any) -> None:
    """Rows before the first that is asked for do not leave the GPU."""
    add, compute, remove, firsts = prompts.add_request, prompts.compute_prompt_logprobs, prompts.remove_request, {}

    def added(req_id: str, req_idx: int, sampling_params: Any) -> None:
        if is_asked(sampling_params):
            firsts[req_id] = sampling_params.extra_args[FIRST]
        add(req_id, req_idx, sampling_params)

    def computed(*args: Any, **kwargs: Any) -> dict[str, Any]:
        found: dict[str, Any] = compute(*args, **kwargs)
        for name, tensors in found.items():
            if first := firsts.get(name):
                rows = (t[first:] for t in tensors[:3])
                found[name] = type(tensors)(*rows)
        return found

    def removed(req_id: str) -> None:
        firsts.pop(req_id, None)
        remove(req_id)

    prompts.add_request, prompts.compute_prompt_logprobs, prompts.remove_request = added, computed, removed
