"""The vLLM rollout engine against transformers with the same weights. float32: bfloat16 hides mistakes of 0.05."""

import copy

import pytest
import torch

from llmdistill.errors import UserError
from llmdistill.texts import Prompt, Sampling
from tests.rollouts import meanings
from tests.test_weights import lora
from tests.tiny import llama, tokenizer

pytest.importorskip("vllm", reason="the vllm extra is not installed")

from llmdistill.rollouts.vllm import VLLMRollouts

TOLERANCE = 2e-4  # float32 log-probs of random tiny models; the two differ by up to 5e-5
PROMPTS = [Prompt(list(range(5, 5 + n)), str(n), domain=f"d{n}") for n in (3, 40, 12, 7)]


def engine_for(model, **options):
    settings = dict(eos_ids=(1,), pad_id=0, dtype="float32", max_model_len=128, kv_cache_gib=0.05)
    return VLLMRollouts(model, **settings, **options)


@pytest.fixture(scope="module")
def tied():
    engine = engine_for(llama(0, hidden=64))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def untied():
    engine = engine_for(llama(0, hidden=64, tied=False))
    engine.sync(llama(0, hidden=64, tied=False), 0)  # whichever test comes first on its worker
    yield engine
    engine.close()


def logprobs_of(model, rollout, temperature=1.0):
    """[B, T-1, V] of transformers; index t-1 speaks of the token at t."""
    with torch.no_grad():
        logits = model(input_ids=rollout.input_ids, attention_mask=rollout.attention_mask.long()).logits
    return (logits.float() / temperature).log_softmax(-1)[:, :-1]


def assert_samples_from(engine, model):
    """Greedy tokens are the model's argmax and the reported log-probs are the model's."""
    greedy = engine.generate(PROMPTS, Sampling(12, temperature=0.0))
    logprobs, counted = logprobs_of(model, greedy), greedy.completion_mask[:, 1:]
    tokens = greedy.input_ids[:, 1:]
    chosen = logprobs.gather(2, tokens[..., None]).squeeze(2)
    assert (logprobs.max(-1).values - chosen)[counted].max() < TOLERANCE
    assert (chosen - greedy.behavior_logprobs[:, 1:])[counted].abs().max() < TOLERANCE
    return greedy


def distance(engine, model):
    rollout = engine.generate(PROMPTS, Sampling(12, temperature=0.0))
    chosen = logprobs_of(model, rollout).gather(2, rollout.input_ids[:, 1:, None]).squeeze(2)
    return (chosen - rollout.behavior_logprobs[:, 1:])[rollout.completion_mask[:, 1:]].abs().max()


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_after_a_push_the_engine_is_the_student(name, request):
    """A second push with other weights: nothing of the first is left, in the packed head or in the prefix cache."""
    engine = request.getfixturevalue(name)
    old, new = llama(1, hidden=64, tied=name == "tied"), llama(2, hidden=64, tied=name == "tied")
    engine.sync(old, 1)
    assert assert_samples_from(engine, old).policy_version == 1
    engine.sync(new, 2)
    assert assert_samples_from(engine, new).policy_version == 2
    assert distance(engine, old) > 0.1  # the comparison can tell the two apart


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_a_push_of_the_trained_weights_only_is_enough(name, request):
    engine, model = request.getfixturevalue(name), llama(3, hidden=64, tied=name == "tied")
    engine.engine.pushed = False  # as a new engine: the first push is complete
    engine.sync(model, 1)
    model.get_input_embeddings().weight.requires_grad_(False)
    model.model.layers[1].requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.3)
    engine.sync(model, 2)
    assert_samples_from(engine, model)


def test_embeddings_that_are_trained_reach_a_tied_head(tied):
    """GROUND's trap: the packed head silently stays old."""
    model = llama(4, hidden=64)
    tied.sync(model, 1)
    model.requires_grad_(False).get_input_embeddings().weight.requires_grad_(True)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(-1.0)
    tied.sync(model, 2)
    assert_samples_from(tied, model)


def test_lora_students_are_pushed_merged(tied):
    adapted = lora(llama(5, hidden=64), target_modules="all-linear")
    tied.engine.pushed = False
    tied.sync(adapted, 1)
    assert_samples_from(tied, adapted)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.mul_(-0.7)
    tied.sync(adapted, 2)  # adapted layers only
    assert_samples_from(tied, adapted)
    assert distance(tied, copy.deepcopy(adapted).unload()) > 0.1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_behavior_logprobs_are_those_of_the_sampling_temperature(untied, temperature):
    model = llama(6, hidden=64, tied=False)
    untied.sync(model, 1)
    rollout = untied.generate(PROMPTS, Sampling(16, temperature=temperature, samples_per_prompt=2))
    chosen = logprobs_of(model, rollout, temperature).gather(2, rollout.input_ids[:, 1:, None]).squeeze(2)
    counted = rollout.completion_mask[:, 1:]
    assert (chosen - rollout.behavior_logprobs[:, 1:])[counted].abs().max() < TOLERANCE
    assert (rollout.behavior_logprobs[~rollout.completion_mask] == 0).all()


def test_behavior_logprobs_are_those_of_the_filtered_distribution(untied):
    """With top-k 3 they are log-softmax over the three tokens that could be drawn."""
    model = llama(6, hidden=64, tied=False)
    untied.sync(model, 1)
    rollout = untied.generate(PROMPTS, Sampling(16, top_k=3))
    top = logprobs_of(model, rollout).topk(3, dim=-1)
    tokens, counted = rollout.input_ids[:, 1:], rollout.completion_mask[:, 1:]
    at = (top.indices == tokens[..., None]).float()
    assert at.sum(-1)[counted].eq(1).all()
    expected = (top.values.log_softmax(-1) * at).sum(-1)
    assert (expected - rollout.behavior_logprobs[:, 1:])[counted].abs().max() < TOLERANCE


def test_sampling_follows_the_model(untied):
    """First tokens of 600 samples of one prompt against the model's probabilities, total variation.

    600 draws from these 264 probabilities miss them by 0.15 on average; 0.25 is more than six deviations away.
    """
    model = llama(6, hidden=64, tied=False)
    untied.sync(model, 1)
    rollout = untied.generate(PROMPTS[:1], Sampling(1, samples_per_prompt=600, seed=3))
    at = len(PROMPTS[0].ids)
    observed = torch.bincount(rollout.input_ids[:, at], minlength=264) / 600
    probabilities = logprobs_of(model, rollout.sequences([0]))[0, at - 1].exp()
    assert (observed - probabilities).abs().sum() / 2 < 0.25


def completions(rollout):
    return [ids[mask].tolist() for ids, mask in zip(rollout.input_ids, rollout.completion_mask, strict=True)]


def test_a_seed_fixes_every_request_whatever_its_company(untied):
    untied.sync(llama(6, hidden=64, tied=False), 1)
    full = completions(untied.generate(PROMPTS, Sampling(12, samples_per_prompt=3, seed=7)))
    assert full == completions(untied.generate(PROMPTS, Sampling(12, samples_per_prompt=3, seed=7)))
    assert full[:6] == completions(untied.generate(PROMPTS[:2], Sampling(12, samples_per_prompt=3, seed=7)))
    assert full[::3] == completions(untied.generate(PROMPTS, Sampling(12, seed=7)))
    assert full != completions(untied.generate(PROMPTS, Sampling(12, samples_per_prompt=3, seed=8)))
    assert len({tuple(c) for c in full}) == len(full)


def test_sampling_leaves_the_global_random_state_alone(untied):
    """Training draws from it, and a resumed run has to find it as an undisturbed one does."""
    before = torch.random.get_rng_state()
    untied.generate(PROMPTS, Sampling(4))
    assert torch.equal(before, torch.random.get_rng_state())


def test_order_prompts_and_domains_are_kept(untied):
    rollout = untied.generate(PROMPTS, Sampling(4, samples_per_prompt=2))
    assert rollout.domain == tuple(p.domain for p in PROMPTS for _ in range(2))
    for i, prompt in enumerate(p for p in PROMPTS for _ in range(2)):
        assert rollout.input_ids[i, : len(prompt.ids)].tolist() == prompt.ids
        assert not rollout.completion_mask[i, : len(prompt.ids)].any()


def test_the_eos_that_ends_a_completion_counts():
    """Both eos ids end it, not only the first one; a completion without one ends by length."""
    model = llama(6, hidden=64, tied=False)
    engine = VLLMRollouts(model, eos_ids=(1, 9), pad_id=0, dtype="float32", max_model_len=64, kv_cache_gib=0.05)
    with torch.no_grad():
        model.lm_head.weight[[1, 9]] = model.lm_head.weight[[1, 9]] * 4
    engine.sync(model, 1)
    rollout = engine.generate(PROMPTS[:1], Sampling(20, samples_per_prompt=40))
    engine.close()
    ended = completions(rollout)
    for ids, finish in zip(ended, rollout.finish, strict=True):
        assert finish == ("stop" if ids[-1] in (1, 9) else "length")
        assert not set(ids[:-1]) & {1, 9}
        assert finish == "stop" or len(ids) == 20
    assert {ids[-1] for ids in ended} >= {1, 9}


def test_the_longest_sequence_fits_and_one_more_is_refused(untied):
    rollout = untied.generate([Prompt(list(range(5, 105)), "")], Sampling(28, temperature=0.0))
    assert rollout.num_rows == 28 or rollout.finish == ("stop",)
    with pytest.raises(UserError, match="rollouts.max_new_tokens is 29"):
        untied.generate([Prompt(list(range(5, 105)), "")], Sampling(29))


def test_settings_of_sampling_mean_what_they_mean_everywhere(tied):
    """And a bound on the tokens splits what is in the engine, not what is drawn."""
    model = meanings.stopping_model(5, hidden=64)
    tied.engine.pushed = False
    tied.sync(model, 1)
    tied.tokenizer = tokenizer()
    bounded = copy.copy(tied)
    bounded.batch_tokens = 3 * (9 + 12)
    meanings.assert_min_p(tied, model)
    meanings.assert_repetition_penalty(tied, model)
    meanings.assert_stops(bounded)
    meanings.assert_ignore_eos(tied)
    meanings.assert_parts(tied, bounded)
