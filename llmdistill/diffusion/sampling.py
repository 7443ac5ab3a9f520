"""generate: from prompts to completions, by revealing masked tokens block after block.

In each step the model is asked about the whole block, a token is drawn at every masked position, and some of them are
revealed: :mod:`~llmdistill.diffusion.orders` says which are first, :mod:`~llmdistill.diffusion.selections` how many.
The default, one token a step in the order of entropy, is unbiased at every temperature; more tokens a step, and
guidance, caches, processors and filters change the distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llmdistill.diffusion import orders, selections
from llmdistill.diffusion.caches import CACHES, Canvas
from llmdistill.diffusion.generation_config import DiffusionGenerationConfig
from llmdistill.diffusion.names import named
from llmdistill.diffusion.schedules import schedule
from llmdistill.errors import UserError

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class StepState:
    """What a logits processor is told of a step."""

    ids: Tensor  # [B, n] the block
    masked: Tensor  # [B, n] bool
    progress: float  # of the block's steps, in [0, 1)


Processor = Callable[[Tensor, StepState], Tensor]  # logits [B, n, V] -> logits


class Streamer(Protocol):
    """Is shown the completion after every step."""

    def put(self, ids: Tensor, masked: Tensor) -> None: ...
    def end(self) -> None: ...


@dataclass
class DiffusionOutput:
    """B completions of N tokens behind prompts of P."""

    sequences: Tensor  # [B, P + N]; the mask token where a row had ended in an earlier block
    step_map: Tensor  # [B, P + N] the step that revealed the token; -1 where none did
    logps: Tensor  # [B, P + N] log-prob of it under what it was drawn from; untempered where greedy; 0 elsewhere
    completion_mask: Tensor  # [B, P + N] bool: revealed tokens of the completion up to its first end, which is one
    finish: tuple[str, ...]  # stop or length
    nfe: Tensor  # [B] forwards in which the row still had masked tokens

    @property
    def tokens_per_forward(self) -> float:
        return float((self.step_map >= 0).sum()) / max(int(self.nfe.sum()), 1)


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    config: DiffusionGenerationConfig | None = None,
    *,
    eos_ids: Sequence[int] = (),
    logits_processor: Sequence[Processor] = (),
    generator: Generators = None,
    streamer: Streamer | None = None,
) -> DiffusionOutput:
    """Completions of prompts, and of masks within them.

    Args:
        model: a :class:`~llmdistill.diffusion.backbone.MaskedDiffusionLM`, or what is called like one.
        input_ids: [B, P], padded on the left. Where it has the mask token, that is filled in first.
        attention_mask: [B, P], 0 on padding.
        eos_ids: what ends a completion, looked for whenever a block is finished.
        logits_processor: in their order, on the logits that are sampled from and that orders read.
        generator: one, or one per row: then a row draws the same whatever its company.

    Raises:
        UserError: settings that contradict each other or the model; nothing to write.
    """
    config = config or DiffusionGenerationConfig()
    config.check(getattr(model, "block_size", None))
    if isinstance(generator, Sequence) and len(generator) != len(input_ids):
        raise UserError(f"{len(generator)} generators for {len(input_ids)} prompts. Fix: one, or one per row.")
    return _Sampling(model, input_ids, attention_mask, config, eos_ids, logits_processor, generator, streamer).run()


class _Sampling:
    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        config: DiffusionGenerationConfig,
        eos_ids: Sequence[int],
        processors: Sequence[Processor],
        generator: Generators,
        streamer: Streamer | None,
    ) -> None:
        self.config, self.processors, self.generator, self.streamer = config, processors, generator, streamer
        rows, self.prompt = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        new = torch.full((rows, config.max_new_tokens), model.mask_token_id, device=input_ids.device)
        self.ids = torch.cat([input_ids, new], 1)
        mask = torch.cat([mask, torch.ones_like(new)], 1)
        self.canvas = Canvas(model, self.ids, mask, self.prompt)
        self.masked = (self.ids == model.mask_token_id) & mask.bool()
        if not bool(self.masked.any()):
            raise UserError(
                "max_new_tokens is 0 and no prompt has a mask: nothing to write. Fix: at least 1 new token."
            )
        self.given = mask.bool() & ~self.masked
        self.forward = CACHES[config.cache](self.canvas)
        self.order, self.select = (
            named(orders, config.order, "diffusion.order"),
            named(selections, config.select, "diffusion.select"),
        )
        self.eos = torch.tensor(sorted(eos_ids), device=input_ids.device, dtype=torch.long)
        self.step_map = torch.full_like(self.ids, -1)
        self.logps = torch.zeros(self.ids.shape, device=input_ids.device)
        self.nfe = torch.zeros(rows, dtype=torch.long, device=input_ids.device)
        self.active = torch.ones(rows, dtype=torch.bool, device=input_ids.device)
        self.steps = 0

    def run(self) -> DiffusionOutput:
        for start, end in self._blocks():
            self._write(start, end)
            if self.config.stop_at_eos and len(self.eos) and start >= self.prompt:
                self.active &= ~torch.isin(self.ids[:, start:end], self.eos).any(-1)
            if not bool(self.active.any()):
                break
        if self.streamer is not None:
            self.streamer.end()
        completion = self.step_map >= 0
        completion[:, : self.prompt] = False
        is_end = torch.isin(self.ids, self.eos) & completion
        before_end = is_end.long().cumsum(-1) - is_end.long() == 0
        finish = tuple("stop" if ended else "length" for ended in is_end.any(-1).tolist())
        return DiffusionOutput(self.ids, self.step_map, self.logps, completion & before_end, finish, self.nfe)

    def _blocks(self) -> list[tuple[int, int]]:
        """Where there are masks in the prompt that is the first block; the completion's follow."""
        total = self.ids.shape[1]
        size = self.config.block_length or self.canvas.block_size or max(total - self.prompt, 1)
        blocks = [(s, min(s + size, total)) for s in range(self.prompt, total, size)]
        return [(0, self.prompt), *blocks] if bool(self.masked[:, : self.prompt].any()) else blocks

    def _write(self, start: int, end: int) -> None:
        """Reveals all tokens of a block, of the sequences that go on."""
        c, span = self.config, slice(start, end)
        in_block = (self.masked[:, span] & self.active.unsqueeze(-1)).sum(-1)
        width = int(in_block.max())
        steps = min(c.denoising_steps or width, width) if c.select == "quota" else c.denoising_steps or width
        bound = steps if c.select in ("quota", "ancestral") else width
        quotas = self._quotas(in_block, bound)
        logits, changed = None, True
        for step in range(bound):
            masked = self.masked[:, span] & self.active.unsqueeze(-1)
            going = masked.any(-1)
            if not bool(going.any()):
                break
            if logits is None or changed:  # what the model says of an unchanged canvas it has said already
                logits = self._logits(start, end, masked, step, bound)
                self.nfe += going.long()
            revealed = self._step(logits, masked, quotas[:, step], self._share(step, bound), span, going)
            changed = bool(revealed.any())
            self.steps += 1
            if self.streamer is not None and changed:
                self.streamer.put(self.ids[:, self.prompt :], self.masked[:, self.prompt :])

    def _quotas(self, in_block: Tensor, steps: int) -> Tensor:
        """[B, steps]; of selections that have none, zeros."""
        if self.config.select != "quota" or steps == 0:
            return torch.zeros(len(in_block), steps, dtype=torch.long, device=in_block.device)
        if self.config.quotas == "even":
            return selections.even_quotas(in_block, steps)
        return selections.scheduled_quotas(in_block, steps, schedule(self.config.quotas))

    def _share(self, step: int, steps: int) -> float:
        """Chance that ancestral sampling reveals a masked token in this step; unused by the other selections."""
        if self.config.select != "ancestral":
            return 1.0
        return selections.ancestral_share(step, steps, schedule(self.config.schedule))

    def _logits(self, start: int, end: int, masked: Tensor, step: int, steps: int) -> Tensor:
        """Of the block, guided and processed, float64 [B, n, V]."""
        c = self.canvas
        logits = self.forward.logits(start, end, step == 0)
        if self.config.cfg_scale > 0:
            hidden = self.given.clone()
            hidden[:, self.prompt :] = False
            last = self.ids.shape[1] if c.blocks is None else end
            unconditional = c.whole(self.ids.masked_fill(hidden, c.model.mask_token_id), last)[:, start:end]
            difference = (logits - unconditional).nan_to_num(nan=0.0)  # of columns at minus infinity in both
            logits = torch.where(logits == -torch.inf, logits, unconditional + (self.config.cfg_scale + 1) * difference)
        state = StepState(self.ids[:, start:end], masked, step / steps)
        for process in self.processors:
            logits = process(logits, state)
        return logits.double()

    def _step(self, logits: Tensor, masked: Tensor, quota: Tensor, share: float, span: slice, going: Tensor) -> Tensor:
        """Draws a token everywhere, reveals some; returns where, [B, n] bool."""
        log_probs = logits.log_softmax(-1)
        sampled_from = self._tempered(logits)
        if self.config.temperature > 0:
            noise = self._uniform(logits.shape, going).clamp_min(torch.finfo(torch.float64).tiny)
            tokens = (sampled_from - (-noise.log()).log()).argmax(-1)
        else:
            tokens = sampled_from.argmax(-1)
        u = self._uniform(tokens.shape, going)
        score = self.order(log_probs, tokens, u)
        certainty = score if self.config.order == "confidence" else log_probs.max(-1).values.exp()
        candidates = selections.Candidates(masked, score, certainty, orders.entropies(log_probs), quota, share, u)
        revealed = self.select(candidates, self.config)
        logps = sampled_from.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1).float()
        self.ids[:, span] = torch.where(revealed, tokens, self.ids[:, span])
        self.logps[:, span] = torch.where(revealed, logps, self.logps[:, span])
        self.step_map[:, span] = self.step_map[:, span].masked_fill(revealed, self.steps)
        self.masked[:, span] &= ~revealed
        return revealed  # type: ignore[no-any-return]

    def _tempered(self, logits: Tensor) -> Tensor:
        """What tokens are drawn from: divided by the temperature, cut by min_p, top_k and top_p."""
        c, width = self.config, logits.shape[-1]
        if c.temperature > 0:
            logits = logits / c.temperature
        flat = logits.reshape(-1, width)
        if c.min_p:
            flat = MinPLogitsWarper(c.min_p)(None, flat)  # type: ignore[arg-type]
        if c.top_k:
            flat = TopKLogitsWarper(min(c.top_k, width))(None, flat)  # type: ignore[arg-type]
        if c.top_p < 1:
            flat = TopPLogitsWarper(c.top_p)(None, flat)  # type: ignore[arg-type]
        return flat.view_as(logits)

    def _uniform(self, shape: Sequence[int], going: Tensor) -> Tensor:
        """[B, …] float64: float32 has too few small numbers, which lowers the temperature of what is drawn with it
        (Zheng et al., arXiv 2409.02908). A row with a generator of its own draws only while it is being written."""
        device, generator = self.ids.device, self.generator
        if generator is None or isinstance(generator, torch.Generator):
            return torch.rand(tuple(shape), dtype=torch.float64, generator=generator, device=device)
        u = torch.full(tuple(shape), 0.5, dtype=torch.float64, device=device)
        for row in going.nonzero().flatten().tolist():
            drawn = torch.rand(tuple(shape[1:]), dtype=torch.float64, generator=generator[row])
            u[row] = drawn.to(device)
        return u
