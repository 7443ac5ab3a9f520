"""The sampler against official traces, its caches against no cache, and what must not make it loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmdistill.diffusion import orders, selections
from llmdistill.diffusion.backbone import MaskedDiffusionLM
from llmdistill.diffusion.generation_config import DiffusionGenerationConfig as Config
from llmdistill.diffusion.sampling import generate
from llmdistill.diffusion.schedules import schedule
from llmdistill.errors import UserError

from .exact import golden
from .test_backbone import MASK, made

TRACE, INDEX, QUOTAS = golden("sampling_trace"), golden("transfer_index"), golden("num_transfer_tokens")


class Toy:
    """The explicit denoiser of the trace file. Its mask column is a small number, as a careless model's would be."""

    def __init__(self) -> None:
        inputs = TRACE["inputs"]
        self.w, self.c, self.emb = (torch.tensor(inputs[k], dtype=torch.float64) for k in ("W", "C", "Emb"))
        self.mask_token_id = inputs["mask_id"]
        self.calls = 0

    def __call__(self, ids: Tensor, **_: Any) -> Tensor:
        self.calls += 1
        logits = self.w + torch.einsum("lj,bjv->blv", self.c, self.emb[ids])
        logits[..., self.mask_token_id] = -20
        return logits


GREEDY: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.0, "order": "confidence"}


@pytest.mark.parametrize(
    "case", TRACE["expected"]["llada"], ids=lambda c: f"{c['steps']}-{c['block_length']}-{c['cfg_scale']}"
)
def test_greedy_runs_are_lladas_step_by_step(case: dict) -> None:
    blocks = 8 // case["block_length"]
    config = Config(
        **GREEDY,
        block_length=case["block_length"],
        denoising_steps=case["steps"] // blocks,
        cfg_scale=case["cfg_scale"],
    )
    out = generate(Toy(), torch.tensor(TRACE["inputs"]["prompt"]), config=config)
    assert out.sequences.tolist() == case["sequences"]
    assert out.step_map[:, 3:].tolist() == case["step_map_new_tokens"]
    assert out.nfe.tolist() == [case["nfe"]] * 2 and bool((out.step_map[:, :3] == -1).all())


@pytest.mark.parametrize("case", TRACE["expected"]["fastdllm_threshold"], ids=lambda c: str(c["threshold"]))
def test_thresholds_are_fast_dllms(case: dict) -> None:
    config = Config(**GREEDY, block_length=case["block_length"], select="threshold", threshold=case["threshold"])
    out = generate(Toy(), torch.tensor(TRACE["inputs"]["prompt"][:1]), config=config)
    assert out.sequences.tolist() == case["sequences"] and out.nfe.tolist() == [case["nfe"]]


def test_a_threshold_of_one_is_one_token_a_step_and_fewer_forwards_come_with_laxer_settings() -> None:
    """Row 22."""
    prompt = torch.tensor(TRACE["inputs"]["prompt"])
    single = generate(Toy(), prompt, config=Config(**GREEDY))
    strict = generate(Toy(), prompt, config=Config(**GREEDY, select="threshold", threshold=1.0))
    assert strict.sequences.tolist() == single.sequences.tolist()
    rising = {"threshold": (0.9, 0.6, 0.3), "factor": (0.2, 1.0, 3.0), "entropy_bound": (0.0, 0.5, 3.0)}
    for setting, values in rising.items():
        configs = [Config(**GREEDY, select=setting, **{setting: value}) for value in values]
        nfe = [int(generate(Toy(), prompt, config=config).nfe.sum()) for config in configs]
        assert nfe == sorted(nfe, reverse=True) and nfe[-1] < nfe[0], setting


def index_candidates() -> tuple[selections.Candidates, Tensor]:
    inputs = INDEX["inputs"]
    logits, masked = torch.tensor(inputs["logits"], dtype=torch.float64), torch.tensor(inputs["mask"])
    log_probs = logits.log_softmax(-1)
    confidence = log_probs.max(-1).values.exp()
    u = torch.zeros_like(confidence)
    found = selections.Candidates(
        masked, confidence, confidence, orders.entropies(log_probs), torch.tensor(inputs["k"]), 0.0, u
    )
    return found, log_probs


def test_orders_and_selections_are_those_of_the_libraries_that_agree() -> None:
    c, log_probs = index_candidates()
    expected, tokens = INDEX["expected"], log_probs.argmax(-1)
    assert tokens[c.masked].tolist() == torch.tensor(expected["x0_argmax"])[c.masked].tolist()
    for name, key in (("confidence", "conf_top1"), ("margin", "conf_margin"), ("entropy", "conf_neg_entropy")):
        score = getattr(orders, name)(log_probs, tokens, c.u)
        torch.testing.assert_close(score, torch.tensor(expected[key], dtype=torch.float64), rtol=1e-6, atol=1e-7)
        chosen = selections.top(score, c.masked, c.quota).int().tolist()
        theirs = {"confidence": "FastdLLM topk", "margin": "dLLM-RL topk margin_confidence"}
        theirs["entropy"] = "topk neg_entropy (Dream/diffusers convention: +sum p log p)"
        assert chosen == expected[theirs[name]], name
    for tau in (0.3, 0.6, 0.99):
        chosen = selections.threshold(c, Config(threshold=tau)).int().tolist()
        assert chosen == expected[f"FastdLLM threshold {tau}"]
    for f in (0.5, 1.0, 2.0):
        assert selections.factor(c, Config(factor=f)).int().tolist() == expected[f"dllm factor {f}"]


def test_the_order_of_entropy_begins_with_the_most_certain() -> None:
    """A peer's sign is wrong; its choice is recorded, and is another."""
    c, log_probs = index_candidates()
    ours = selections.top(orders.entropy(log_probs, log_probs.argmax(-1), c.u), c.masked, c.quota).int().tolist()
    key = next(k for k in INDEX["expected"] if "sign bug" in k)
    assert ours != INDEX["expected"][key]


def test_the_entropy_bound_is_transformers_where_all_is_masked() -> None:
    c, _ = index_candidates()
    everywhere = selections.Candidates(torch.ones_like(c.masked), c.score, c.certainty, c.entropies, c.quota, 0.0, c.u)
    for gamma in (0.05, 0.5, 1.5):
        key = f"HF EntropyBoundSampler (ALL positions, no mask) {gamma}"
        assert (
            selections.entropy_bound(everywhere, Config(entropy_bound=gamma)).int().tolist() == INDEX["expected"][key]
        )
    chosen = selections.entropy_bound(c, Config(entropy_bound=0.0))
    assert bool((chosen.sum(-1) == 1).all()) and not bool((chosen & ~c.masked).any())


def test_quotas_are_lladas_and_dllms() -> None:
    """dllm rounds in float32: where a step is a tie up to its rounding error, half to even is ours."""
    differ = 0
    for case in QUOTAS["expected"]:
        counts = torch.tensor(case["num_masked"])
        assert selections.even_quotas(counts, case["steps"]).tolist() == case["llada"]
        for name in ("linear", "cosine"):
            quotas = selections.scheduled_quotas(counts, case["steps"], schedule(name)).tolist()
            assert [sum(row) for row in quotas] == case["num_masked"]
            theirs = [row + [0] * (case["steps"] - len(row)) for row in case[f"dllm_{name}"]]
            differ += quotas != theirs
    assert differ <= 4, differ


@pytest.mark.parametrize("shift", [False, True])
def test_the_block_cache_is_exact(shift: bool) -> None:
    """Row 16, by whole runs on prompts of different length: no cache, and keys of finished blocks kept."""
    model = MaskedDiffusionLM(made("llama"), MASK, block_size=4, shift=shift)
    ids = torch.randint(60, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    runs = [
        generate(model, ids, mask, Config(max_new_tokens=10, temperature=0.0, cache=cache, denoising_steps=3))
        for cache in ("none", "block")
    ]
    assert runs[0].sequences.tolist() == runs[1].sequences.tolist()
    torch.testing.assert_close(runs[0].logps, runs[1].logps, rtol=1e-3, atol=1e-4)
    shorter = generate(model, ids[:1, 2:], None, Config(max_new_tokens=10, temperature=0.0, denoising_steps=3))
    assert shorter.sequences[0].tolist() == runs[0].sequences[0, 2:].tolist(), "padding on the left changes nothing"


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("shift", [False, True])
def test_caches_of_full_attention_are_right_at_the_first_step_of_a_block(cache: str, shift: bool) -> None:
    """One step a block is then exact; with several, keys are stale, and the answers near."""
    model = MaskedDiffusionLM(made("llama"), MASK, shift=shift)
    ids = torch.randint(60, (2, 5), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 8, "temperature": 0.0, "block_length": 4}
    exact, cached = (
        generate(model, ids, None, Config(**settings, denoising_steps=1, cache=c)) for c in ("none", cache)
    )
    assert exact.sequences.tolist() == cached.sequences.tolist()
    torch.testing.assert_close(exact.logps, cached.logps, rtol=1e-3, atol=1e-5)
    exact, cached = (generate(model, ids, None, Config(**settings, cache=c)) for c in ("none", cache))
    away = (exact.logps - cached.logps).abs().max()
    assert 0 < float(away) < 0.5


def test_overwriting_a_cache_leaves_the_old_one_whole() -> None:
    from llmdistill.diffusion.caches import SpanCache

    cache, states = SpanCache(), torch.arange(24.0).view(1, 1, 6, 4)
    cache.update(states, states, 0)
    held = cache.layers[0].keys
    cache.overwrite((2, 4))
    keys, _ = cache.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    assert torch.equal(held, states) and keys[0, 0, 2:4].abs().sum() == 0
    assert torch.equal(keys[0, 0, [0, 1, 4, 5]], states[0, 0, [0, 1, 4, 5]])


def test_masks_in_the_prompt_are_filled_and_the_rest_of_it_stays() -> None:
    model = MaskedDiffusionLM(made("llama"), MASK)
    ids = torch.tensor([[5, MASK, 7, MASK, 9], [5, 6, 7, 8, 9]])
    out = generate(model, ids, config=Config(max_new_tokens=0))
    assert bool((out.sequences != MASK).all())
    assert out.sequences[:, [0, 2, 4]].tolist() == ids[:, [0, 2, 4]].tolist() and out.nfe.tolist() == [2, 0]
    assert out.sequences[1].tolist() == ids[1].tolist()


def test_a_row_draws_the_same_in_whatever_company() -> None:
    model = MaskedDiffusionLM(made("llama"), MASK)
    ids = torch.randint(60, (3, 4), generator=torch.Generator().manual_seed(0))
    config = Config(max_new_tokens=8, block_length=4, select="threshold", threshold=0.05)

    def seeds(*numbers: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(n) for n in numbers]

    together = generate(model, ids, config=config, generator=seeds(1, 2, 3)).sequences
    alone = generate(model, ids[1:2], config=config, generator=seeds(2)).sequences
    assert together[1].tolist() == alone[0].tolist()
    with pytest.raises(UserError, match="2 generators for 3 prompts"):
        generate(model, ids, config=config, generator=seeds(1, 2))


def test_a_sequence_goes_no_further_than_the_block_of_its_end() -> None:
    toy = Toy()
    config = Config(**GREEDY, block_length=2)
    prompt = torch.tensor(TRACE["inputs"]["prompt"][:1])
    whole = generate(toy, prompt, config=config)
    end = int(whole.sequences[0, 3])
    toy.calls = 0
    out = generate(toy, prompt, config=config, eos_ids=[end])
    assert toy.calls == 2 and out.finish == ("stop",) and whole.finish == ("length",)
    assert out.completion_mask.sum() == 1 and bool((out.sequences[0, 5:] == toy.mask_token_id).all())


def test_a_model_that_answers_mask_writes_words_and_ends() -> None:
    """With the mask column the largest by far, and for every selection: as many forwards as tokens at most."""

    class OnlyMask(Toy):
        def __call__(self, ids: Tensor, **options: Any) -> Tensor:
            logits = super().__call__(ids, **options)
            logits[..., self.mask_token_id] = 1e4
            return logits

    for select in selections.__all__:
        toy = OnlyMask()
        config = Config(max_new_tokens=8, select=select, threshold=1.0, factor=1e-9, denoising_steps=3)
        out = generate(toy, torch.tensor([[1, 2, 3]]), config=config, generator=torch.Generator().manual_seed(0))
        assert bool((out.sequences != toy.mask_token_id).all()) and toy.calls <= 8, select


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -1.0}, "diffusion.temperature is -1.0"),
        ({"order": "low_confidence"}, "diffusion.order is 'low_confidence'; there are confidence, entropy"),
        ({"select": "topk"}, "diffusion.select"),
        ({"cache": "paged"}, "diffusion.cache is 'paged'"),
        ({"cache": "block"}, "the model has full attention"),
        ({"cfg_scale": 1.0, "cache": "dual"}, "cfg_scale is 1 with a cache"),
        ({"max_new_tokens": 0}, "nothing to write"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(Toy(), torch.tensor([[1, 2, 3]]), config=Config(**{"max_new_tokens": 8, **settings}))


def test_block_models_write_in_their_own_blocks() -> None:
    model = MaskedDiffusionLM(made("llama"), MASK, block_size=4)
    for settings, message in (({"block_length": 3}, "attends in blocks of 4"), ({"cache": "dual"}, "blocks of 4")):
        with pytest.raises(UserError, match=message):
            generate(model, torch.tensor([[1, 2, 3]]), config=Config(max_new_tokens=8, **settings))
