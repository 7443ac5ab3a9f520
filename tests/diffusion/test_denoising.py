"""The training loss on real, tiny models: its expectation, its blocks, and that it teaches."""

from __future__ import annotations

import pytest
import torch

from llmdistill.diffusion.attention import block_ids
from llmdistill.diffusion.backbone import MaskedDiffusionLM
from llmdistill.diffusion.denoising import DenoisingConfig, denoising_loss, of_noisy_copy
from llmdistill.diffusion.generation_config import DiffusionGenerationConfig
from llmdistill.diffusion.likelihood import exact_bound
from llmdistill.diffusion.sampling import generate
from llmdistill.errors import UserError

from .test_backbone import MASK, made

IDS = torch.randint(60, (3, 8), generator=torch.Generator().manual_seed(0))
COMPLETION = (torch.arange(8) >= 3).expand(3, -1)


def test_the_mean_loss_is_the_bound_and_prompts_are_never_masked() -> None:
    """4,000 noised copies in one batch, antithetic; 4 standard errors, seed fixed."""
    model = MaskedDiffusionLM(made("llama"), MASK)
    copies, maskable = IDS[:1].expand(4000, -1), COMPLETION[:1].expand(4000, -1)
    with torch.no_grad():
        config = DenoisingConfig(norm="batch")
        found = denoising_loss(model, copies, maskable, config=config, generator=torch.Generator().manual_seed(0))
    assert not bool((found.masked & ~maskable).any())
    expected = float(exact_bound(model, IDS[0], COMPLETION[0]))
    assert float(found.loss) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("shift", [False, True])
def test_a_block_is_trained_in_the_state_that_it_is_written_in(shift: bool) -> None:
    """[clean | noisy] in one pass gives what it says of the sampler's canvas: clean blocks, then this one."""
    model = MaskedDiffusionLM(made("llama"), MASK, block_size=2, shift=shift)
    mask = torch.ones_like(IDS)
    prompt = torch.full((3,), 3)
    blocks = block_ids(mask, 2, prompt)
    assert blocks[0].tolist() == [0, 0, 0, 1, 1, 2, 2, 3]
    noisy = IDS.masked_fill(torch.tensor([0, 0, 0, 1, 0, 1, 1, 1]).bool(), MASK)
    together = of_noisy_copy(model, IDS, noisy, mask, blocks)
    from llmdistill.diffusion.caches import Canvas, NoCache

    for start, end in ((3, 5), (5, 7), (7, 8)):
        canvas = torch.cat([IDS[:, :start], noisy[:, start:]], 1)
        written = NoCache(Canvas(model, canvas, mask, 3)).logits(start, end, True)
        torch.testing.assert_close(together[:, start:end], written, rtol=1e-4, atol=1e-5)


def test_a_tiny_model_learns_its_texts_and_writes_them() -> None:
    """Three texts of five tokens behind prompts that differ: after 120 steps the greedy completions are theirs."""
    model = MaskedDiffusionLM(made("llama"), MASK)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        optimizer.zero_grad()
        denoising_loss(model, IDS.repeat(8, 1), COMPLETION.repeat(8, 1), generator=generator).loss.backward()
        optimizer.step()
    model.eval()
    out = generate(model, IDS[:, :3], config=DiffusionGenerationConfig(max_new_tokens=5, temperature=0.0))
    assert out.sequences.tolist() == IDS.tolist()


def test_one_time_a_block_and_attention_that_opens() -> None:
    model = MaskedDiffusionLM(made("llama"), MASK, block_size=4)
    ids = IDS.repeat(400, 1)
    with torch.no_grad():
        found = denoising_loss(model, ids, torch.ones_like(ids).bool(), generator=torch.Generator().manual_seed(0))
    share = found.masked.view(-1, 2, 4).float().mean(-1)
    apart = (share[:, 0] - share[:, 1]).abs().mean()
    assert float(apart) > 0.2, "two blocks of a sequence have times of their own"
    causal = MaskedDiffusionLM(made("llama"), MASK)
    config = DenoisingConfig(anneal_steps=10)
    losses = list[torch.Tensor]()
    for step in (0, 9):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            losses.append(denoising_loss(causal, IDS, COMPLETION, None, config, step=step, generator=generator).loss)
    assert losses[0] != losses[1]


def test_what_cannot_be_trained_is_refused() -> None:
    model = MaskedDiffusionLM(made("llama"), MASK)
    with pytest.raises(UserError, match="no maskable token"):
        denoising_loss(model, IDS, torch.zeros_like(IDS).bool())
    with pytest.raises(UserError, match="mask token"):
        denoising_loss(model, IDS.masked_fill(IDS[0, 0] == IDS, MASK), COMPLETION)
    for settings, message in (
        ({"low": 0.0}, "diffusion.low"),
        ({"low": 0.9, "high": 0.5}, "diffusion.clip"),
        ({"weighting": "snr"}, "diffusion.weighting"),
        ({"schedule": "line"}, "diffusion.schedule"),
        ({"norm": "none"}, "diffusion.norm"),
    ):
        with pytest.raises(UserError, match=message):
            denoising_loss(model, IDS, COMPLETION, config=DenoisingConfig(**settings))
    with pytest.raises(UserError, match="no maskable token"):  # a shifted head predicts no first token
        first = (torch.arange(8) == 0).expand(3, -1)
        denoising_loss(MaskedDiffusionLM(made("llama"), MASK, shift=True), IDS, first)
