"""An engine that is made when it is first sampled from."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from torch import nn

from llmdistill import RolloutConfig, UserError
from llmdistill.models.generation import HFRollouts
from llmdistill.rollouts.choose import make_rollout_engine
from llmdistill.rollouts.lazy import LazyEngine
from llmdistill.texts import Prompt, Rollout, Sampling
from tests import tiny


class Noted:
    """Records what is done to it; samples nothing."""

    def __init__(self, events: list[Any]) -> None:
        self.events = events
        events.append("made")

    def sync(self, model: nn.Module, policy_version: int) -> None:
        self.events.append(("pushed", policy_version))

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        self.events.append(("sampled", len(prompts)))
        return None  # type: ignore[return-value]

    def close(self) -> None:
        self.events.append("closed")


PROMPTS, SAMPLING = [Prompt([5, 6], ""), Prompt([7], "")], Sampling(2)


def test_a_run_that_never_samples_pays_nothing() -> None:
    events: list[Any] = []
    engine = LazyEngine(lambda: Noted(events))
    for step in range(5):
        engine.sync(nn.Linear(1, 1), step)
    engine.close()
    assert events == []


def test_it_is_made_once_and_pushed_to_when_it_is_sampled_from() -> None:
    """Three rounds of syncs cost one push each time something is drawn, of the newest weights."""
    events: list[Any] = []
    engine, model = LazyEngine(lambda: Noted(events)), nn.Linear(1, 1)
    for step in (0, 1, 2):
        engine.sync(model, step)
    engine.generate(PROMPTS, SAMPLING)
    engine.generate(PROMPTS[:1], SAMPLING)
    engine.sync(model, 7)
    engine.generate(PROMPTS, SAMPLING)
    engine.close()
    assert events == ["made", ("pushed", 2), ("sampled", 2), ("sampled", 1), ("pushed", 7), ("sampled", 2), "closed"]


def test_it_samples_what_the_engine_itself_samples() -> None:
    model = tiny.llama(1)
    engines = [HFRollouts(eos_ids=(1,), pad_id=0), LazyEngine(lambda: HFRollouts(eos_ids=(1,), pad_id=0))]
    drawn = []
    for engine in engines:
        engine.sync(model, 3)
        drawn.append(engine.generate(PROMPTS, Sampling(6, seed=4)))
    assert drawn[0].input_ids.tolist() == drawn[1].input_ids.tolist()
    assert drawn[0].policy_version == drawn[1].policy_version == 3


def make(config: RolloutConfig, **options: Any) -> Any:
    return make_rollout_engine(config, tiny.llama(1), None, eos_ids=[1], pad_id=0, longest=9, seed=0, **options)


@pytest.mark.parametrize(
    ("config", "place"),
    [
        (RolloutConfig(engine="vllm", kv_cache_gib=0.05), "llmdistill.rollouts.vllm.VLLMRollouts"),
        (RolloutConfig(engine="remote", url="http://a"), "llmdistill.rollouts.remote.RemoteRollouts"),
    ],
)
def test_the_engine_that_a_recipe_names_is_made_late(
    config: RolloutConfig, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And at once without ``lazy``: no other engine takes its place in silence."""
    if config.engine == "vllm":
        pytest.importorskip("vllm", reason="the vllm extra is not installed")
    events: list[Any] = []
    monkeypatch.setattr(place, lambda *_, **options: events.append(options) or Noted(events))
    engine = make(config, lazy=True)
    assert isinstance(engine, LazyEngine) and events == []
    engine.sync(nn.Linear(1, 1), 1)
    engine.generate(PROMPTS, SAMPLING)
    assert events[0]["eos_ids"] == [1] and events[1:] == ["made", ("pushed", 1), ("sampled", 2)]
    events.clear()
    assert isinstance(make(config), Noted) and events[1] == "made"


def test_transformers_engine_costs_nothing_and_is_never_lazy() -> None:
    assert isinstance(make(RolloutConfig(), lazy=True), HFRollouts)


def test_what_is_missing_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"rollouts\.token_env is 'NOT_SET'.*export NOT_SET"):
        make(RolloutConfig(engine="remote", url="http://a", token_env="NOT_SET"), lazy=True)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"engine is 'vllm', which is not installed here.*llmdistill\[vllm\]"):
        make(RolloutConfig(engine="vllm"), lazy=True)
