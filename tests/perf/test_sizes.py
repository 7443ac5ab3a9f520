"""The worked table of sizes: its shapes are those of the models, its numbers follow its formulas."""

from dataclasses import replace

import pytest
from transformers import LlamaConfig, Qwen3Config

from eval.perf import sizes
from llmdistill.preflight.estimate import Shape


@pytest.mark.parametrize(
    "shape, config",
    [
        (
            sizes.QWEN3_1_7B,
            Qwen3Config(
                hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
                num_key_value_heads=8, head_dim=128, vocab_size=151_936, tie_word_embeddings=True,
            ),
        ),
        (
            sizes.QWEN3_8B,
            Qwen3Config(
                hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
                num_key_value_heads=8, head_dim=128, vocab_size=151_936, tie_word_embeddings=False,
            ),
        ),
        (
            sizes.LLAMA_8B,
            LlamaConfig(
                hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                num_key_value_heads=8, vocab_size=128_256, tie_word_embeddings=False,
            ),
        ),
    ],
)  # fmt: skip
def test_shapes_are_those_of_the_models(shape: Shape, config: LlamaConfig) -> None:
    found = Shape.of_config(config)
    assert shape.parameters == pytest.approx(found.parameters, rel=1e-3)  # norms
    assert replace(shape, parameters=0) == replace(found, parameters=0)


def test_seventy_billion() -> None:
    assert sizes.LLAMA_70B.parameters == pytest.approx(70.6e9, rel=1e-3)  # of its model card


@pytest.mark.parametrize("plan", sizes.PLANS, ids=lambda plan: plan.name)
def test_a_plan_fits_and_its_step_is_the_sum_of_its_phases(plan: sizes.Plan) -> None:
    found = sizes.report(plan)
    assert found["step"] == pytest.approx(sum(x["seconds"] for x in found["seconds"].values()), abs=0.1)
    assert found["overlapped"]["seconds"] <= found["step"] and sizes.markdown(found)


def test_more_links_gather_faster_and_twice_the_sequences_take_longer() -> None:
    plan = sizes.PLANS[-1]
    wide = replace(plan, device=replace(plan.device, network=4 * plan.device.network))
    assert sizes.seconds(wide)["push of weights"][0] < sizes.seconds(plan)["push of weights"][0]
    assert sizes.seconds(replace(plan, sequences=2 * plan.sequences))["student"][0] == pytest.approx(
        2 * sizes.seconds(plan)["student"][0], rel=1e-6
    )


def test_decoding_is_no_faster_than_reading_the_weights_once_a_token() -> None:
    plan = replace(sizes.PLANS[0], sequences=8, typical=10**9)  # one sequence an engine, all of full length
    floor = plan.max_new_tokens * 2 * plan.student.parameters / (plan.device.bandwidth * plan.device.decodes)
    assert floor < sizes.rollouts(plan)[0] < 1.5 * floor
