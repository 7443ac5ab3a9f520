"""Checkpoints with code of their own (LLaDA, Dream, SDAR): loaded when asked to, sampled, scored, reinforced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill.diffusion.backbone import MaskedDiffusionLM
from llmdistill.diffusion.generation_config import DiffusionGenerationConfig
from llmdistill.diffusion.likelihood import elbo
from llmdistill.diffusion.rl_stage import DiffusionRLConfig
from llmdistill.diffusion.rl_trainer import DiffusionRLTrainer
from llmdistill.diffusion.sampling import generate
from llmdistill.errors import UserError
from llmdistill.evals.config import EvalConfig
from llmdistill.evals.engines.make import open_source
from llmdistill.texts.rollout import Sampling

from . import runs
from .remote_models import FAMILIES, MASK, write
from .test_eval_engine import asked

IDS = torch.randint(4, 260, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What transformers copies of the checkpoints' code goes to a folder of the test's."""
    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, modules: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(name, folder)."""
    return request.param, write(request.param, tmp_path_factory.mktemp("families") / request.param)


def loaded(checkpoint: Any, **options: Any) -> MaskedDiffusionLM:
    name, folder = checkpoint
    options = {"block_size": 4, **options} if name == "sdar" else options
    return MaskedDiffusionLM.from_pretrained(folder, trust_remote_code=True, **options)[0]


def test_its_code_runs_only_when_that_is_asked_for(checkpoint: Any) -> None:
    with pytest.raises(UserError, match="trust_remote_code"):
        MaskedDiffusionLM.from_pretrained(checkpoint[1])


def test_the_mask_token_and_the_shift_are_the_familys(checkpoint: Any) -> None:
    """Dream has kept the head that predicts the next token; the others predict the token itself."""
    model = loaded(checkpoint)
    assert model.mask_token_id == MASK and model.shift == (checkpoint[0] == "dream")
    raw = model.model(IDS).logits
    found = model(IDS) if model.block_size is None else None
    if found is not None:
        own = found[:, 1:, :MASK] if model.shift else found[..., :MASK]
        torch.testing.assert_close(own, (raw[:, :-1] if model.shift else raw)[..., :MASK], rtol=1e-4, atol=1e-4)


def test_padding_changes_nothing_and_it_writes_and_scores(checkpoint: Any) -> None:
    model = loaded(checkpoint)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(IDS)], 1)
    greedy = DiffusionGenerationConfig(max_new_tokens=8, temperature=0.0, block_length=4, denoising_steps=2)
    runs_ = [generate(model, *given, config=greedy) for given in ((IDS,), (padded, mask))]
    assert runs_[0].sequences.tolist() == runs_[1].sequences[:, 3:].tolist()
    assert bool((runs_[0].sequences != MASK).all()) and runs_[0].nfe.tolist() == [4, 4]
    bound = elbo(model, IDS, n=8, generator=torch.Generator().manual_seed(0))
    assert bool(bound.nats.isfinite().all())


def test_it_is_evaluated_by_its_own_engine(checkpoint: Any) -> None:
    config = EvalConfig(model=str(checkpoint[1]), engine="diffusion", dtype="float32", trust_remote_code=True)
    samples = list(open_source(config).engine(64).draw(asked(3, 5, room=6), Sampling(6), ()))
    assert len(samples) == 2 and all(0 < s.tokens <= 6 for s in samples)


@pytest.mark.slow
def test_it_is_reinforced(checkpoint: Any, tmp_path: Path) -> None:
    """A step of TraceRL moves its weights, and slices have the log-probs that the sampler drew with."""
    from .test_rl_trainer import is_even, logps

    model = loaded(checkpoint)
    with torch.no_grad():
        model.model.get_output_embeddings().weight[1] *= 2.5 if model.block_size else 1.6  # ends now and then

    class WithReward(DiffusionRLTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, reward=is_even, **kwargs)

    rows = [{"prompt": "add", "answer": "e"}] * 16
    settings: dict[str, Any] = {"samples": 8, "max_steps": 1, "keep_low": 0.0, "keep_high": 1.0}
    settings |= {"shift": model.shift, "block_size": model.block_size}
    t = runs.trainer(
        tmp_path, DiffusionRLConfig, WithReward, model=model.model, train_dataset=rows, eval_dataset=None, **settings
    )
    t.sync_engine()
    text = t.draw(runs.examples(t, 4))["main"]
    written = t._student_samples(runs.examples(t, 4), t._sampling(0))
    recorded = written.behavior_logprobs[written.completion_mask]
    torch.testing.assert_close(logps(t, text).sort().values, recorded.sort().values, rtol=1e-3, atol=1e-3)
    before = t.model.get_output_embeddings().weight.detach().clone()
    t.train()
    assert not torch.equal(before, t.model.get_output_embeddings().weight)
