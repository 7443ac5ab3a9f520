"""A denoiser as a view: the trainer's streamed loss is that of the library with whole logits, in any split.

Tolerances are those of float32 sums in another order.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill import DataConfig, UserError
from llmdistill.composition.batch import Text
from llmdistill.diffusion.losses import without_mask_token
from llmdistill.diffusion.noised_view import Denoiser, annealed
from llmdistill.diffusion.noising import Noised, NoiseSettings, filled, times_of
from llmdistill.diffusion.stages import FromARConfig, SFTConfig
from llmdistill.texts import Prompt
from llmdistill.texts.prompts import completed
from llmdistill.texts.sources import Only, Round
from llmdistill.texts.views import student_view
from tests import tiny

from .runs import examples, gradients, naive, trainer

READINGS: list[dict[str, Any]] = [
    {"shift": False},
    {"shift": True},
    {"shift": False, "block_size": 3},
    {"shift": True, "block_size": 3},
]


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_the_gradient_is_that_of_whole_logits(tmp_path: Path, reading: dict[str, Any]) -> None:
    t = trainer(tmp_path, norm="token", **reading)
    texts = t.draw(examples(t))
    rollout = texts["main"].rollout
    loss, expected = naive(t, rollout, float(rollout.noise.countable.sum()))
    assert float(loss) > 0.5
    close(gradients(t, 1, texts), expected)


@pytest.mark.parametrize("norm", ["token", "sequence", "batch", "masked"])
def test_norms_are_what_they_say_in_any_split(tmp_path: Path, norm: str) -> None:
    t = trainer(tmp_path, norm=norm, copies=2)
    texts = t.draw(examples(t, 6))
    rollout = texts["main"].rollout
    assert len(rollout) == 12 and rollout.num_rows < rollout.noise.countable.sum() or norm == "masked"
    lengths = rollout.noise.countable.sum(1).clamp_min(1)
    divisors = {
        "token": (float(lengths.sum()), None),
        "sequence": (12.0, lengths),
        "batch": (12.0, None),
        "masked": (float(rollout.noise.masked.sum()), None),
    }
    _, expected = naive(t, rollout, *divisors[norm])
    for parts in (1, 4):
        close(gradients(t, parts, texts), expected)


def test_a_block_of_one_token_that_is_masked_is_an_autoregressive_model(tmp_path: Path) -> None:
    """Documents, every token masked: the loss is the mean NLL of the causal model that the student was."""
    documents = [{"text": "the first document " * 2}, {"text": "another one"}]
    causal, tokenizer = tiny.llama(1), tiny.tokenizer()
    ids = [tokenizer(row["text"], add_special_tokens=True)["input_ids"] for row in documents]
    t = trainer(
        tmp_path,
        FromARConfig,
        block_size=1,
        low=0.999999,
        weighting="uniform",
        data=DataConfig(text_column="text"),
        train_dataset=documents,
        eval_dataset=None,
    )
    (batch,) = t.batches(t.draw(examples(t)), 1)
    loss = float(t.compute_loss(t.model, {"micro_batch": batch}).detach())
    nll = count = 0.0
    for prompt in t.train_dataset:
        whole = torch.tensor([[*prompt.ids, *prompt.completion]])
        logits = causal(whole).logits[0, :-1].detach()
        logp = without_mask_token(logits, t.denoiser.mask_token_id).log_softmax(-1)
        nll -= float(logp.gather(-1, whole[0, 1:, None]).sum())
        count += whole.shape[1] - 1
    assert count >= sum(map(len, ids)) - 2
    assert loss == pytest.approx(nll / count, rel=1e-5)


def round_of(prompts: list[Prompt], places: list[int], everywhere: int, step: int = 3) -> Round:
    authors = {"dataset": lambda of: (completed(of, 0), list(of))}
    return Round(prompts, step, 10, 7, 0, 1, 0, authors, places=places, prompts_everywhere=everywhere)


PROMPTS = [Prompt([5, 6, 7][: 1 + i % 3], "", row=i, completion=tuple(range(10, 15 + i))) for i in range(4)]


@pytest.mark.parametrize("block_size", [None, 2])
def test_a_sequence_is_noised_alike_in_any_company(block_size: int | None) -> None:
    """What one process draws for four rows, two processes draw for two each: masks, weights, and annealed attention."""
    settings = NoiseSettings(copies=2, anneal_steps=0 if block_size else 9)
    source = Noised(Only("dataset"), Denoiser(99, block_size=block_size), settings, 1)
    together, _ = source.draw(round_of(PROMPTS, [0, 1, 2, 3], 4))
    for half in ([0, 2], [1, 3]):
        alone, prompts = source.draw(round_of([PROMPTS[i] for i in half], half, 4))
        for k, i in enumerate(half):
            for copy in (0, 1):
                a, b = together.sequences([2 * i + copy]), alone.sequences([2 * k + copy])
                for name in ("masked", "weight", "blocks", "countable"):
                    assert torch.equal(getattr(a.noise, name), getattr(b.noise, name))
                if not block_size:
                    assert torch.equal(annealed(a), annealed(b))
        assert [p.row for p in prompts] == [i for i in half for _ in range(2)]
    again, _ = source.draw(round_of(PROMPTS, [0, 1, 2, 3], 4, step=4))
    assert not torch.equal(again.noise.masked, together.noise.masked)


def test_prompts_are_never_masked_and_ends_fill_blocks() -> None:
    source = Noised(Only("dataset"), Denoiser(99, block_size=4), NoiseSettings(low=0.99, fill=4), 1)
    rollout, prompts = source.draw(round_of(PROMPTS, [0, 1, 2, 3], 4))
    for b, prompt in enumerate(prompts):
        start, end = len(prompt.ids), int(rollout.attention_mask[b].sum())
        assert (end - start) % 4 == 0
        assert rollout.input_ids[b, start + len(prompt.completion) : end].eq(1).all()
        assert not bool(rollout.noise.masked[b, :start].any())
        assert rollout.noise.countable[b].tolist() == [start <= i < end for i in range(rollout.input_ids.shape[1])]
    view = student_view(rollout)
    assert view.targets.tolist() == rollout.input_ids[rollout.completion_mask].tolist()


def test_weights_of_tokens_reach_the_filling() -> None:
    weighted = [replace(PROMPTS[0], weight=(0.5,) * 5)]
    rollout, prompts = filled(completed(weighted, 0), weighted, 1, 4, 0)
    assert prompts[0].weight == (0.5,) * 5 + (1.0,) * 3 and rollout.num_rows == 8
    per_sequence, per_row = Text(rollout, prompts, author="dataset").weights({})  # type: ignore[misc]
    assert per_row.tolist() == [0.5] * 5 + [1.0] * 3


def test_times_of_blocks_cover_the_interval_and_are_uniform() -> None:
    """2,000 turns: each of five blocks' times has mean 1/2 within four standard errors of uniform ones, and in every
    turn there is one in each fifth."""
    s, generator = NoiseSettings(low=1e-9), torch.Generator().manual_seed(0)
    turns = torch.rand(2000, dtype=torch.float64, generator=generator).tolist()
    times = torch.stack([times_of(5, turn, s, generator) for turn in turns])
    assert ((times.mean(0) - 0.5).abs() < 4 * (1 / 12) ** 0.5 / 2000**0.5).all()
    gaps = times.sort(1).values.diff(dim=1)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 0.2), atol=1e-6, rtol=0)


def test_attention_is_annealed_from_causal_to_full(tmp_path: Path) -> None:
    """Of what lies ahead a step reaches its share: none of it would be causal, and in the last step it is all."""
    t = trainer(tmp_path, FromARConfig, anneal_steps=4)
    shares = []
    for step in range(4):
        t.state.global_step = step
        rollout = t.draw(examples(t))["main"].rollout
        ahead = torch.ones(rollout.input_ids.shape[1], rollout.input_ids.shape[1]).triu(1).bool()
        real = rollout.attention_mask[:, :, None] & rollout.attention_mask[:, None, :] & ahead
        seen = annealed(rollout)
        assert bool(seen[real.transpose(1, 2)].all())  # all that lies behind
        shares.append(float(seen[real].float().mean()))
        view = student_view(rollout)
        assert view.attention_mask.ndim == (4 if step < 3 else 2)
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=0.05)


def test_settings_that_do_not_go_together_are_refused() -> None:
    for wrong in ({"low": 0.5, "high": 0.2}, {"anneal_steps": 3, "block_size": 4}, {"low": 0.0}, {"copies": 0}):
        with pytest.raises(UserError, match=r"objective\.\w+ (is|and)"):
            SFTConfig(output_dir="x", **wrong)
