"""What goes wrong elsewhere, or in careless hands: an error or a defined behaviour here, and never an endless loop.

The faults of others are those that their code was found to have; what each is, is said at its test.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmdistill.diffusion import orders, selections
from llmdistill.diffusion.backbone import MaskedDiffusionLM
from llmdistill.diffusion.denoising import DenoisingConfig, denoising_loss
from llmdistill.diffusion.generation_config import DiffusionGenerationConfig as Config
from llmdistill.diffusion.likelihood import elbo
from llmdistill.diffusion.mask_token import check_no_mask
from llmdistill.diffusion.policy import group_advantages
from llmdistill.diffusion.sampling import generate
from llmdistill.diffusion.schedules import sample_times
from llmdistill.diffusion.slicing import NEVER, trace_slices
from llmdistill.errors import UserError

from .exact import Exact, chain
from .test_backbone import MASK, made

PROMPT = torch.tensor([[5, 6, 7], [8, 9, 10]])


class Counted:
    """A model that counts how often it is asked."""

    def __init__(self, model: Any) -> None:
        self.model, self.mask_token_id, self.calls = model, model.mask_token_id, 0

    def __call__(self, ids: Tensor, **options: Any) -> Tensor:
        self.calls += 1
        return self.model(ids, **options)


def model() -> MaskedDiffusionLM:
    return MaskedDiffusionLM(made("llama"), MASK)


# ------------------------------------------------------------------------------------------------- bad input


def test_a_sequence_without_a_maskable_token_is_refused_by_everything_that_masks() -> None:
    ids, nothing = PROMPT, torch.tensor([[True, True, False], [False, False, False]])
    for use in (lambda: denoising_loss(model(), ids, nothing), lambda: elbo(model(), ids, nothing)):
        with pytest.raises(UserError, match="sequence 1 of the batch has no maskable token"):
            use()
    padded = torch.tensor([[1, 1, 1], [0, 0, 1]])
    with pytest.raises(UserError, match="no maskable token"):  # padding is none, whatever is said of it
        elbo(model(), ids, torch.tensor([[True, True, True], [True, True, False]]), attention_mask=padded)


def test_a_mask_id_that_is_a_word_of_the_text_is_refused() -> None:
    """As a name it is refused when a checkpoint is loaded (test_backbone); as an id, where a clean text has it."""
    with pytest.raises(UserError, match=r"sequence 1 of the batch has the mask token \(id 9\)"):
        check_no_mask(PROMPT, 9)
    word = MaskedDiffusionLM(made("llama"), 9)
    for use in (lambda: denoising_loss(word, PROMPT, torch.ones(2, 3).bool()), lambda: elbo(word, PROMPT)):
        with pytest.raises(UserError, match="another diffusion.mask_token"):
            use()


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-0.1, 0.5), (0.2, 1.5), (0.7, 0.7), (float("nan"), 1.0)])
def test_times_outside_their_interval_are_refused(low: float, high: float) -> None:
    with pytest.raises(UserError, match="diffusion.clip"):
        sample_times((4,), low=low, high=high)
    with pytest.raises(UserError, match="diffusion"):
        denoising_loss(model(), PROMPT, torch.ones(2, 3).bool(), config=DenoisingConfig(low=low, high=high))


@pytest.mark.parametrize("select", selections.__all__)
@pytest.mark.parametrize("steps", [1, 3, 50])
def test_exhausted_quotas_end_with_every_token_written(select: str, steps: int) -> None:
    """More steps than tokens, fewer, and rows with fewer masks than others. Fast-dLLM's loop goes on past its quota; a
    threshold that nothing reaches, and a factor that accepts none, still reveal one token a step."""
    counted = Counted(model())
    ids = torch.tensor([[5, MASK, MASK, MASK], [8, 9, MASK, 10]])
    config = Config(max_new_tokens=5, select=select, denoising_steps=steps, threshold=1.0, factor=1e-9)
    out = generate(counted, ids, config=config, generator=torch.Generator().manual_seed(0))
    most = 2 * max(steps, 4) if select == "ancestral" else 8  # of two blocks; the others reveal one a step at least
    assert bool((out.sequences != MASK).all()) and counted.calls <= most
    assert int((out.step_map >= 0).sum()) == 3 + 1 + 2 * 5, "each once, and nothing twice"


def test_a_schedule_that_rounds_to_nothing_still_hands_out_every_token() -> None:
    """dllm drops steps of zero tokens; what is left comes in the last."""
    from llmdistill.diffusion.schedules import schedule

    for name in ("cosine", "square", "sqrt"):
        for masked, steps in ((1, 16), (3, 16), (16, 3)):
            assert int(selections.scheduled_quotas(torch.tensor([masked]), steps, schedule(name)).sum()) == masked


def test_a_model_that_says_nothing_but_mask_is_not_heard() -> None:
    """Its column is never drawn, nor counted as certain; what is trained has no mass on it either (MDLM's SUBS)."""

    class OnlyMask(Counted):
        def __call__(self, ids: Tensor, **options: Any) -> Tensor:
            logits = torch.zeros(*ids.shape, 64)
            logits[..., MASK] = 1e9
            return logits

    out = generate(OnlyMask(model()), PROMPT, config=Config(max_new_tokens=4, select="threshold", threshold=0.5))
    assert bool((out.sequences != MASK).all())
    denoised = denoising_loss(model(), PROMPT, torch.ones(2, 3).bool(), generator=torch.Generator().manual_seed(0))
    assert bool(denoised.ce.isfinite().all()) and float(denoised.loss) > 0


# ------------------------------------------------------------------------------------------- faults of others


def test_the_default_sampler_is_not_the_biased_one() -> None:
    """LLaDA's low_confidence at temperature 1 loses half of the entropy: total variation .54 (test_sampling_exact)."""
    assert Config().order == "entropy" and Config().temperature == 1.0
    assert "confidence" not in (Config().order, Config(select="threshold").order)


def test_the_least_certain_token_is_never_first_in_the_order_of_entropy() -> None:
    """dLLM-RL's neg_entropy is plus the entropy, and reveals the least certain first."""
    logits = torch.zeros(1, 3, 8)
    logits[0, 1, 0] = 9.0
    log_probs = logits.log_softmax(-1)
    score = orders.entropy(log_probs, log_probs.argmax(-1), torch.zeros(1, 3))
    assert int(score.argmax()) == 1


def test_boolean_masks_are_refused_where_eager_attention_would_add_them() -> None:
    """In transformers a boolean 4-D mask under eager attention adds 1 to what it allows, and hides nothing."""
    with pytest.raises(UserError, match=r"attention\.additive"):
        model()(PROMPT, bias=torch.ones(2, 1, 3, 3, dtype=torch.bool))


def test_top_tokens_are_chosen_among_masked_ones_so_that_none_is_left_behind() -> None:
    """Where the k highest of the whole sequence are taken, visible tokens use up the quota, and masks are stranded."""
    score = torch.tensor([[9.0, 8.0, 1.0, 2.0]])
    masked = torch.tensor([[False, False, True, True]])
    assert selections.top(score, masked, torch.tensor([2])).tolist() == [[False, False, True, True]]
    assert selections.top(score, masked, torch.tensor([1])).tolist() == [[False, False, False, True]]
    out = generate(Exact(chain(3, 4)), torch.tensor([[0, 3, 2, 3]]), config=Config(max_new_tokens=0, denoising_steps=1))
    assert bool((out.sequences != 3).all())


def test_guidance_needs_no_attention_mask_and_hides_the_prompt_alone() -> None:
    """LLaDA's sampler has no such name where attention_mask is None (a NameError)."""
    out = generate(model(), PROMPT, None, Config(max_new_tokens=2, cfg_scale=1.0, temperature=0.0))
    assert torch.equal(out.sequences[:, :3], PROMPT)


def test_a_prompts_tokens_have_no_step() -> None:
    """dLLM-RL gives them step 0, which the first revealed token has too: a slice would ask about the prompt."""
    out = generate(model(), PROMPT, config=Config(max_new_tokens=3), generator=torch.Generator().manual_seed(0))
    assert out.step_map[:, :3].tolist() == [[NEVER] * 3] * 2 and int(out.step_map[:, 3:].min()) == 0
    slices = trace_slices(out.step_map, torch.ones_like(out.step_map).bool())
    assert not bool(slices.target[:, :3].any()) and not bool(slices.masked[:, :3].any())


def test_the_deviation_of_a_group_is_the_populations() -> None:
    """TraceRL's; TRL's GRPO takes the sample's, which is larger by sqrt(n / (n - 1))."""
    advantages, _ = group_advantages(torch.tensor([[1.0, 0.0]]), torch.ones(1, 2).bool())
    assert advantages.tolist() == [[1.0, -1.0]]


def test_the_first_token_of_a_shifted_model_is_never_asked_for() -> None:
    """Nothing predicts it: its logits are a stand-in, and dllm's right shift repeats those of the second."""
    shifted = MaskedDiffusionLM(made("llama"), MASK, shift=True)
    everything = torch.ones(1, 3).bool().expand(200, -1)
    found = denoising_loss(shifted, PROMPT[:1].expand(200, -1), everything, generator=torch.Generator().manual_seed(0))
    assert not bool(found.masked[:, 0].any()) and bool(found.masked[:, 1:].any())
