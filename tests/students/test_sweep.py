"""The sweep over architectures: all of them as a proof, a dozen in CI."""

from __future__ import annotations

import pytest

from tests.students import sweep

# Text decoders of every kind: attention, latent attention, state spaces and recurrences, experts fused and scattered,
# scaled and capped heads, heads tied and not; an image-text class.
DOZEN = ["cohere", "deepseek_v3", "falcon_h1", "gemma2", "gemma3", "gpt2"]
DOZEN += ["hyperclovax", "jamba", "minicpm3", "mixtral", "qwen3_next", "rwkv"]


@pytest.mark.slow
@pytest.mark.parametrize("name", DOZEN)
def test_one_of_a_dozen(name: str) -> None:
    row = sweep.examine(name)
    assert row.right and not row.refused, row


@pytest.mark.proof
@pytest.mark.parametrize("name", sweep.names())
def test_every_architecture(name: str) -> None:
    """The few that a small config cannot be made of, in transformers, are named in eval/proof/students.md."""
    try:
        row = sweep.examine(name)
    except sweep.NotMade as error:
        pytest.skip(str(error))
    assert row.right, row
