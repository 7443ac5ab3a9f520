"""How well a denoiser knows held-out completions: its bound, and the cross-entropy of masked tokens at three times.

The masks are drawn anew for every measurement from the same seeds, so before and after are about the same masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llmdistill.diffusion.noised_view import Denoiser
from llmdistill.diffusion.noising import blocks_of, with_noise
from llmdistill.diffusion.terms import masked_ce
from llmdistill.errors import UserError
from llmdistill.models.heads import head_of
from llmdistill.models.passes import metrics_at_head
from llmdistill.models.weights import gathered
from llmdistill.objectives.rows import TensorRows
from llmdistill.teachers.base import writes
from llmdistill.texts import Prompt, Rollout, Sampling, request_seed
from llmdistill.texts.batches import Passes
from llmdistill.texts.prompts import completed
from llmdistill.training.measure import Measurement

TIMES = {"t15": 0.15, "t50": 0.5, "t90": 0.9}  # share of masked tokens


def measure(trainer: Any, prompts: Sequence[Prompt]) -> dict[str, Measurement]:
    """``bound``: nats per token of the bound on -log p(completion | prompt), by the count estimator in every block.
    ``t15``, ``t50``, ``t90``: cross-entropy of masked tokens where that share is masked, each token by itself.

    Every rank must call it; all make as many forward passes, for ZeRO-3 gathers parameters in them.

    Raises:
        UserError: a held-out row without a completion, and no teacher that could write one.
    """
    t = trainer
    world, rank = t.accelerator.num_processes, t.accelerator.process_index
    per_rank = -(-len(prompts) // world)
    index = range(rank * per_rank, (rank + 1) * per_rank)
    local = [prompts[min(i, len(prompts) - 1)] for i in index]
    keep = [k for k, i in enumerate(index) if i < len(prompts)]
    clean = given(t, local)
    numbers = [min(i, len(prompts) - 1) for i in index]
    draws = t.args.heldout_masks
    found = {}
    nats, tokens = [0.0] * len(local), clean.row_counts
    for j in range(draws):
        t.heldout.tell(f"the denoiser on {len(prompts)} texts, mask {j + 1} of {draws}")
        noised = by_count(clean, local, t.denoiser, numbers, j, draws)
        nats = [a + b / draws for a, b in zip(nats, _sums(t, noised, weighted=True), strict=True)]
    found["bound"] = _kept({"nats": nats}, tokens, keep)
    for name, share in TIMES.items():
        t.heldout.tell(f"the denoiser on the same texts with {share:.0%} of the tokens masked")
        noised = by_share(clean, local, t.denoiser, numbers, share)
        found[name] = _kept({"masked_ce": _sums(t, noised, weighted=False)}, noised.row_counts, keep)
    return {name: measured.gathered(t.accelerator) for name, measured in found.items()}


def given(t: Any, prompts: Sequence[Prompt]) -> Rollout:
    """The rows' own completions, or the teacher's, which is asked once.

    Raises:
        UserError: there are neither.
    """
    bare = [p.row for p in prompts if not p.completion]
    if not bare:
        return completed(prompts, t.pad_id)
    if not (t.judges and writes(t.teacher)):
        raise UserError(
            f"{len(bare)} held-out rows have no completion to measure the denoiser on (first: row {bare[0]}). "
            "Fix: --data.completion_column NAME."
        )
    asked = [p.ids for p in prompts]
    if t.written_for_heldout is None or t.written_for_heldout[0] != asked:
        t.heldout.tell(f"the teacher writes {len(prompts)} texts")
        seed = request_seed(t.args.seed, -1, t.accelerator.process_index)
        rollout = t.teacher.generate(prompts, Sampling(t.args.rollouts.max_new_tokens, seed=seed))
        t.written_for_heldout = (asked, t.readable(rollout, prompts))
    return t.written_for_heldout[1]  # type: ignore[no-any-return]


def _kept(sums: dict[str, list[float]], tokens: list[int], keep: list[int]) -> Measurement:
    return Measurement({name: [v[i] for i in keep] for name, v in sums.items()}, [tokens[i] for i in keep])


def by_count(
    clean: Rollout, prompts: Sequence[Prompt], denoiser: Denoiser, numbers: Sequence[int], j: int, draws: int
) -> Rollout:
    """The j-th of ``draws`` masks of each sequence: in every block of L completion tokens l of them, l stratified over
    1..L, each weighing L / l (LLaDA, arXiv 2502.09992, appendix A)."""
    blocks, masked = blocks_of(clean, prompts, denoiser), torch.zeros_like(clean.completion_mask)
    weight = torch.zeros(masked.shape)
    countable = clean.completion_mask.clone()
    countable[:, 0] = False
    for b, number in enumerate(numbers):
        generator = torch.Generator().manual_seed(request_seed(0, number, 0))
        for block in range(int(blocks[b].max()) + 1):
            where = (countable[b] & (blocks[b] == block)).nonzero().flatten()
            turn, u = _uniform(generator, 1), _uniform(generator, draws * len(where)).view(draws, -1)[j]
            if len(where):
                count = int((float(turn) + j / draws) % 1 * len(where)) + 1
                chosen = where[u.argsort()[:count]]
                masked[b, chosen], weight[b, chosen] = True, len(where) / count
    return with_noise(clean, denoiser, masked, rows=masked, countable=countable, weight=weight, blocks=blocks)


def by_share(
    clean: Rollout, prompts: Sequence[Prompt], denoiser: Denoiser, numbers: Sequence[int], share: float
) -> Rollout:
    """Every completion token masked with probability ``share``; the masks of a larger share include those of a smaller
    one."""
    countable = clean.completion_mask.clone()
    countable[:, 0] = False
    u = torch.ones(countable.shape, dtype=torch.float64)
    for b, number in enumerate(numbers):
        length = int(clean.attention_mask[b].sum())
        u[b, :length] = _uniform(torch.Generator().manual_seed(request_seed(0, number, 1)), length)
    masked = (u < share) & countable
    blocks = blocks_of(clean, prompts, denoiser)
    return with_noise(clean, denoiser, masked, rows=masked, countable=countable, blocks=blocks)


def _uniform(generator: torch.Generator, count: int) -> Tensor:
    return torch.rand(count, dtype=torch.float64, generator=generator)


def _sums(t: Any, noised: Rollout, *, weighted: bool) -> list[float]:
    """Of every sequence: the sum over its masked tokens of their cross-entropy, weighted or not."""
    head, ce = head_of(t.model), masked_ce(t.denoiser.mask_token_id)

    def batches() -> Iterator[tuple[Rollout, TensorRows]]:
        for part in Passes(t.args.per_device_eval_batch_size).of(noised, t.args.device):
            assert part.noise is not None
            weights_N = part.noise.weight[:, 1:][part.completion_mask[:, 1:]]
            yield part, TensorRows((part.token_rows(), weights_N), part.num_rows)

    sharded = list(t.model.parameters()) if t.model_wrapped is t.model else []
    with t.accelerator.autocast(), gathered(sharded):
        values = metrics_at_head(
            t.forward_model(),
            head,
            batches(),
            lambda logits, tokens, weight: {"ce": ce(logits, tokens) * (weight if weighted else 1.0)},
            chunk_tokens=t.args.chunk_tokens,
            vocab_size=t.vocab_size,
        )
    return [float(x.double().sum()) for x in values["ce"].split(noised.row_counts)]
