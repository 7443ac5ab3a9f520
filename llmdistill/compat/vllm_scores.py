"""What vLLM's first model runner, the only one on a CPU, lacks: scores of chosen ids, and seeds under long prompts."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from llmdistill.compat.patching import patched


class _AsSecondRunner:
    """An engine's configuration that lets ``prompt_logprob_token_ids`` through to the first model runner."""

    use_v2_model_runner = True

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def admit_chosen_ids(engine: Any) -> bool:
    """Lets requests of an ``LLM``'s engine or ``AsyncLLM`` name the ids to score, one way or the other.

    vLLM's second model runner scores them; the first, the only one on a CPU, is taught to in the workers (see
    :func:`mend_first_runner`), and this opens the engine's front to such requests.

    Returns:
        Whether the workers have to be taught.
    """
    front = engine.input_processor
    if front.vllm_config.use_v2_model_runner:
        return False
    front.vllm_config = _AsSecondRunner(front.vllm_config)
    return True


class _NoAdapter:
    """Stands in for an output head's adapter."""

    def add_lora_logits(self, logits: Tensor, *args: Any) -> Tensor:
        return logits


def mend_first_runner(worker: Any) -> None:
    """What a worker with vLLM's first model runner lacks: chosen ids, and on a CPU seeds that survive long prompts."""
    _teach_chosen_ids(worker)
    if worker.model_runner.device.type == "cpu":
        _keep_seeds(worker.model_runner)


def _keep_seeds(runner: Any) -> None:
    """A step that computes only a part of a prompt samples all the same and takes the draw back by the generator's
    offset, which a CPU generator has not got: the engine dies. Here the generator's state is put back instead."""
    sample, book = runner._sample, runner._bookkeeping_sync

    def taken_back() -> dict[int, torch.Generator]:
        batch = runner.input_batch
        discarded = runner.discard_request_mask.np[: batch.num_reqs]
        return {i: generator for i, generator in batch.generators.items() if i < len(discarded) and discarded[i]}

    def sampled(*args: Any, **kwargs: Any) -> Any:
        states = [(generator, generator.get_state()) for generator in taken_back().values()]
        output = sample(*args, **kwargs)
        for generator, state in states:
            generator.set_state(state)
        return output

    def booked(*args: Any, **kwargs: Any) -> Any:
        hidden = taken_back()
        for i in hidden:
            del runner.input_batch.generators[i]
        try:
            return book(*args, **kwargs)
        finally:
            runner.input_batch.generators.update(hidden)

    runner._sample, runner._bookkeeping_sync = sampled, booked


def _teach_chosen_ids(worker: Any) -> None:
    """Makes a worker with vLLM's first model runner fill ``prompt_token_id_logprobs`` as its second one does.

    Prompts are scored with the plain output head: that runner would add the adapters of the step's *sampled* rows to
    them, of which there are not as many, and die of it. What is scored is the base model anyway.
    """
    runner = worker.model_runner
    score_prompts, sample, done = runner._get_prompt_logprobs_dict, runner.sample_tokens, dict[str, Tensor]()

    def scored(hidden: Tensor, scheduled: dict[str, int]) -> Any:
        head = getattr(runner.model, "logits_processor", None)
        plain = patched(head, "punica_wrapper", _NoAdapter()) if hasattr(head, "punica_wrapper") else nullcontext()
        with plain:
            chosen(hidden, scheduled)
            return score_prompts(hidden, scheduled)

    def chosen(hidden: Tensor, scheduled: dict[str, int]) -> None:
        for name, count in scheduled.items():
            request = runner.requests[name]
            params = request.sampling_params
            if params is None or params.prompt_logprob_token_ids is None:
                continue
            length, first = len(request.prompt_token_ids), request.num_computed_tokens
            start = params.prompt_logprob_start or 0
            if first >= length:
                continue  # it is generating
            if first == 0:
                shape = params.prompt_logprob_token_ids.shape
                request.llmdistill_scores = torch.full(shape, -torch.inf)
            low, high = max(start, first), min(first + count, length - 1)
            offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[name]]) - first
            for a in range(low, high, 256):
                b = min(a + 256, high)
                rows = runner.sampler.compute_logprobs(runner.model.compute_logits(hidden[offset + a : offset + b]))
                ids = torch.tensor(params.prompt_logprob_token_ids[a - start : b - start], dtype=torch.int64)
                ids = ids.to(rows.device)
                found = rows.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
                request.llmdistill_scores[a - start : b - start] = found.cpu()
            if first + count >= length:
                done[name] = request.llmdistill_scores

    def with_scores(*args: Any, **kwargs: Any) -> Any:
        output = sample(*args, **kwargs)
        result = getattr(output, "_model_runner_output", output)
        if done and result is not None:
            result.prompt_token_id_logprobs_dict = {**result.prompt_token_id_logprobs_dict, **done}
            done.clear()
        return output

    runner._get_prompt_logprobs_dict, runner.sample_tokens = scored, with_scores
