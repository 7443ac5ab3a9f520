"""Settings of sampling have one meaning in every engine, and a bound on the tokens changes nothing that is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from llmdistill.datagen.jobs import read_sampling
from llmdistill.diffusion.generation_config import generation_config
from llmdistill.errors import UserError
from llmdistill.models.generation import HFRollouts
from llmdistill.recipe.config import RolloutConfig
from llmdistill.rollouts.choose import sampling_of
from llmdistill.rollouts.remote import RemoteRollouts
from llmdistill.teachers.local import LocalTeacher
from llmdistill.texts import Prompt, Sampling
from llmdistill.texts.batches import groups
from llmdistill.texts.stops import StopStrings
from llmdistill.wire import protocol
from llmdistill.wire.bodies import unpack_prompts
from tests import tiny
from tests.rollouts import meanings
from tests.rollouts.meanings import PROMPTS, SAMPLED
from tests.service.faulty import Faulty

BOUND = 3 * (9 + 12)  # three of the longest sequences
QUICK = {"timeout_s": 5.0, "backoff_s": 0.01, "max_backoff_s": 0.05, "cool_down_s": 0.02, "max_outage_s": 5.0}


@pytest.fixture(scope="module")
def model() -> Any:
    return meanings.stopping_model(5)


@pytest.fixture(scope="module")
def served(model: Any) -> Iterator[Faulty]:
    with Faulty(LocalTeacher(tiny.llama(9), tiny.tokenizer())) as service:
        yield service


@pytest.fixture(params=["hf", "remote"])
def engines(request: pytest.FixtureRequest, model: Any, served: Faulty) -> Iterator[list[Any]]:
    """An engine, and one with a bound."""
    made: list[Any] = []
    for batch_tokens in (0, BOUND):
        if request.param == "hf":
            options: dict[str, Any] = {"eos_ids": (1,), "pad_id": 0, "tokenizer": tiny.tokenizer()}
            made.append(HFRollouts(**options, batch_tokens=batch_tokens))
        else:
            made.append(RemoteRollouts(served.url, eos_ids=(1,), pad_id=0, batch_tokens=batch_tokens, **QUICK))
        made[-1].sync(model, 0)
    yield made
    for engine in made:
        engine.close()


def test_every_setting_means_what_the_model_itself_says(engines: list[Any], model: Any) -> None:
    meanings.assert_min_p(engines[0], model)
    meanings.assert_repetition_penalty(engines[0], model)
    meanings.assert_stops(engines[1])
    meanings.assert_ignore_eos(engines[1])
    meanings.assert_parts(*engines)


def test_no_forward_pass_of_generation_has_more_tokens_than_the_bound(model: Any) -> None:
    """32 x 4 samples of a round of accumulation: one batch without the bound."""
    engine = HFRollouts(eos_ids=(1,), pad_id=0, batch_tokens=200)
    engine.sync(model, 0)
    prompts, sizes = [Prompt([40 + i % 9, 41, 42], "") for i in range(32)], []
    engine.generate(PROMPTS, SAMPLED)  # the probe of batched generation, once for a model
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    try:
        bounded = engine.generate(prompts, Sampling(7, samples_per_prompt=4, seed=1))
        assert max(sizes) == 200 // (3 + 7)
        engine.batch_tokens = 0
        whole = engine.generate(prompts, Sampling(7, samples_per_prompt=4, seed=1))
        assert max(sizes) == 128
    finally:
        handle.remove()
    meanings.assert_same(bounded, whole)


def test_a_service_is_sent_no_more_at_one_time(served: Faulty, model: Any) -> None:
    """Prompts, and the samples of one prompt where these are too many already."""
    engine = RemoteRollouts(served.url, eos_ids=(1,), pad_id=0, batch_tokens=BOUND, **QUICK)
    engine.sync(model, 0)
    before = len(served.posts(protocol.GENERATE))
    engine.generate(PROMPTS, replace(SAMPLED, samples_per_prompt=8))
    engine.close()
    asked = [unpack_prompts(s.body) for s in served.posts(protocol.GENERATE)[before:]]
    tokens = [len(a.ids) * a.settings["sampling"]["samples_per_prompt"] * (9 + 12) for a in asked]
    assert max(tokens) <= BOUND and len(asked) >= 8
    assert sorted({a.settings["sampling"]["first_sample"] for a in asked}) == [0, 3, 6]


def test_groups_keep_within_the_bound() -> None:
    assert groups([3, 3, 9, 2, 2], 9) == [[0, 1], [2], [3, 4]]  # 9 is alone; 3 x 3 would fit, 9 x 3 does not
    assert groups([20, 1], 9) == [[0], [1]] and groups([1] * 5, 0) == [[0, 1, 2, 3, 4]]
    assert groups([1] * 5, 0, at_most=2) == [[0, 1], [2, 3], [4]] and groups([], 9) == []


class TestStopStrings:
    """The byte-level tokenizer of the tests: a token is a byte, so an umlaut is two."""

    tokenizer = tiny.tokenizer()

    def end(self, text: str, *strings: str) -> int | None:
        return StopStrings(self.tokenizer, strings).end(self.tokenizer(text)["input_ids"])

    def test_the_first_token_that_completes_a_string_ends_it(self) -> None:
        assert self.end("so: 42.\n\nQ: next", "\n\nQ:", "Q") == len("so: 42.\n\nQ")
        assert self.end("für ü", "ü") == 3 and self.end("nothing", "x") is None

    def test_a_special_token_is_text_too(self) -> None:
        assert self.end("a<user>b", "<user>") == 2

    def test_it_is_found_across_the_window_of_a_long_text(self) -> None:
        for before in range(20, 60):
            assert self.end("a" * before + "stop" + "b" * 50, "stop") == before + 4


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"min_p": 1.5}, "rollouts.min_p is 1.5; it must be in [0, 1]"),
        ({"repetition_penalty": 0}, "rollouts.repetition_penalty is 0; it must be > 0"),
        ({"stop": ["a", ""]}, "rollouts.stop is ['a', '']"),
        ({"batch_tokens": -1}, "rollouts.batch_tokens is -1"),
        ({"ignore_eos": True, "mask_truncated": True}, "every completion is cut off"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        RolloutConfig(**settings)
    assert line in str(error.value) and "Fix: " in str(error.value)


def test_every_setting_of_a_recipe_that_sampling_has_reaches_it() -> None:
    said = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True}
    config = RolloutConfig(**said, stop="END", samples_per_prompt=3, max_new_tokens=9)  # type: ignore[arg-type]
    sampling = sampling_of(config, 4)
    assert sampling == Sampling(9, **said, stop=("END",), samples_per_prompt=3, seed=4)  # type: ignore[arg-type]


def test_an_engine_without_a_tokenizer_says_that_it_needs_one(model: Any) -> None:
    engine = HFRollouts(eos_ids=(1,), pad_id=0)
    engine.sync(model, 0)
    with pytest.raises(UserError, match="no tokenizer"):
        engine.generate(PROMPTS, replace(SAMPLED, stop=("x",)))


def test_penalised_tokens_are_not_weighed(tmp_path: Any) -> None:
    """Whoever asks how tokens are drawn, a method of one's own too, hears that no estimator is unbiased then."""
    from llmdistill.opd import OPDConfig

    rollouts = RolloutConfig(repetition_penalty=1.2)
    for more in ({"estimator": "sampled"}, {"importance_cap": 2.0, "estimator": "sampled"}):
        with pytest.raises(UserError, match="gradient would be biased.*repetition_penalty 1"):
            OPDConfig(output_dir=str(tmp_path), rollouts=rollouts, **more)  # type: ignore[arg-type]
    allowed = OPDConfig(output_dir=str(tmp_path), rollouts=rollouts, estimator="full")
    with pytest.raises(UserError, match="gradient would be biased"):
        _ = allowed.sampler
    assert allowed.build().terms[0].name == "divergence"  # the whole distribution is right in any state


def test_a_denoiser_takes_what_has_a_meaning_without_an_order() -> None:
    assert generation_config({}, Sampling(4, min_p=0.1), 4).min_p == 0.1
    for more in ({"stop": ("x",)}, {"repetition_penalty": 1.1}):
        with pytest.raises(UserError, match=f"rollouts.{next(iter(more))} is .*writes in any order"):
            generation_config({}, Sampling(4, **more), 4)  # type: ignore[arg-type]


def test_traces_refuse_what_is_no_part_of_a_call_s_name() -> None:
    """Two calls that differ in it alone would be taken for one, and its answer for both."""
    for given in ({"min_p": 0.1}, Sampling(4, stop=("x",))):
        with pytest.raises(UserError, match="traces are drawn by max_new_tokens, temperature, top_p, top_k"):
            read_sampling(given, 0)
    assert read_sampling({"temperature": 0.5}, 3).seed == 3
