"""The student writes by denoising: a rollout engine over :func:`llmdistill.diffusion.sampling.generate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmdistill.diffusion.backbone import MaskedDiffusionLM
from llmdistill.diffusion.generation_config import generation_config
from llmdistill.diffusion.noised_view import Denoiser
from llmdistill.diffusion.sampling import DiffusionOutput, generate
from llmdistill.models.modes import evaluating
from llmdistill.texts.batches import groups
from llmdistill.texts.rollout import Prompt, Rollout, Sampling, collate, request_seed

BATCH = 16  # sequences that are written together, where batch_tokens does not say


class DiffusionRollouts:
    """Implements :class:`~llmdistill.rollouts.engine.RolloutEngine`; rollouts have a ``step_map``.

    Args:
        settings: of :class:`~llmdistill.diffusion.generation_config.DiffusionGenerationConfig`, but for what a
            :class:`~llmdistill.texts.rollout.Sampling` says.
        ready: context manager around generation that yields the model to generate with.
        whole_blocks: what stands behind an end in its block stays in the text, uncounted: the states that the block was
            written in can then be made again.
        batch_tokens: tokens, padding and room for completions included, that are written at one time; 0: sixteen
            sequences.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        settings: Mapping[str, Any],
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        ready: Callable[[nn.Module], AbstractContextManager[nn.Module]] = nullcontext,
        whole_blocks: bool = False,
        batch_tokens: int = 0,
    ) -> None:
        self.batch_tokens = batch_tokens
        self.denoiser, self.settings, self.ready = denoiser, dict(settings), ready
        self.eos_ids, self.pad_id, self.whole_blocks = tuple(eos_ids), pad_id, whole_blocks
        self.model: nn.Module | None = None
        self.policy_version = 0
        self.forwards = [0, 0]  # of the last call: tokens revealed, and forwards of their sequences

    def sync(self, model: nn.Module, policy_version: int) -> None:
        self.model, self.policy_version = model, policy_version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        """``samples_per_prompt`` completions of every prompt, each drawn with a generator of its own.

        ``behavior_logprobs`` are those of the distribution that a token was drawn from in the step that revealed it.
        """
        every = [(i, j) for i in range(len(prompts)) for j in sampling.numbers]
        seeds = [request_seed(sampling.seed, i, j) for i, j in every]
        return self.write([prompts[i] for i, _ in every], sampling, seeds)

    @torch.no_grad()
    def write(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> Rollout:
        """One completion of each prompt, drawn with its own seed, so that its company changes nothing but rounding."""
        assert self.model is not None, "sync() comes before generate()"
        requests = list(zip(prompts, seeds, strict=True))
        self.forwards = [0, 0]
        parts = list[tuple[list[int], list[bool], list[float], list[int], str]]()
        with self.ready(self.model) as model, evaluating(model):
            student = self.denoiser.around(model)
            limit = self.batch_tokens
            lengths = [len(p.ids) + sampling.max_new_tokens for p in prompts]
            for batch in groups(lengths, limit, at_most=0 if limit else BATCH):
                parts += self._batch(student, [requests[i] for i in batch], sampling)
        made = collate(
            [p.ids for p, _ in requests],
            [ids for ids, *_ in parts],
            pad_id=self.pad_id,
            behavior_logprobs=[logps for _, _, logps, _, _ in parts],
            counts=[counts for _, counts, *_ in parts],
            finish=[finish for *_, finish in parts],  # type: ignore[misc]
            domain=[p.domain for p, _ in requests],
            policy_version=self.policy_version,
        )
        steps = torch.full_like(made.input_ids, -1)
        for b, ((p, _), (*_, revealed, _)) in enumerate(zip(requests, parts, strict=True)):
            steps[b, len(p.ids) : len(p.ids) + len(revealed)] = torch.tensor(revealed, dtype=torch.int64)
        return replace(made, step_map=steps)

    def _batch(
        self, student: MaskedDiffusionLM, requests: Sequence[tuple[Prompt, int]], sampling: Sampling
    ) -> list[tuple[list[int], list[bool], list[float], list[int], str]]:
        """(ids, which of them count, their log-probs, their steps, how it ended) of each completion."""
        width = max(len(p.ids) for p, _ in requests)
        ids = torch.full((len(requests), width), self.pad_id, device=student.device)
        mask = torch.zeros_like(ids)
        for row, (p, _) in enumerate(requests):
            ids[row, width - len(p.ids) :] = torch.tensor(p.ids, device=student.device)
            mask[row, width - len(p.ids) :] = 1
        out = generate(
            student,
            ids,
            mask,
            generation_config(self.settings, sampling, sampling.max_new_tokens),
            eos_ids=() if sampling.ignore_eos else self.eos_ids,
            generator=[torch.Generator().manual_seed(seed) for _, seed in requests],
        )
        self.forwards[0] += int((out.step_map[:, width:] >= 0).sum())
        self.forwards[1] += int(out.nfe.sum())
        return [self._completion(out, row, width) for row in range(len(requests))]

    def _completion(self, out: DiffusionOutput, row: int, start: int) -> Any:
        def of(values: Tensor) -> Tensor:
            return values[row, start:].cpu()

        counts, steps = of(out.completion_mask), of(out.step_map)
        keep = steps >= 0 if self.whole_blocks else counts
        kept = [of(out.sequences)[keep], counts[keep], of(out.logps)[keep], steps[keep]]
        return *(values.tolist() for values in kept), out.finish[row]

    def check(self, max_new_tokens: int) -> None:
        """Raises:
        UserError: settings that contradict each other or the student.
        """
        generation_config(self.settings, Sampling(max_new_tokens), max_new_tokens).check(self.denoiser.block_size)

    def close(self) -> None:
        self.model = None
