"""Which students a text can be parted for, and what goes beside it; that the parts are right: tests/distributed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill import OPDConfig, OPDTrainer, UserError
from llmdistill.composition.batch import Text
from llmdistill.models.parted import check_parted
from llmdistill.texts import Prompt, Rollout
from llmdistill.training.parted import _joined
from tests import tiny
from tests.students.architectures import small


@pytest.mark.parametrize(
    "make, size, said",
    [
        (lambda: tiny.llama(1), 3, "it has 2 attention heads"),
        (lambda: tiny.llama(1, attn_implementation="eager"), 2, "its attention is eager, not sdpa"),
        (lambda: small("qwen3_moe", 1), 2, "it is a mixture of experts"),
        (lambda: small("gemma3_text", 1), 2, "it has layers of sliding_attention"),
        (lambda: small("mistral", 1, sliding_window=8), 2, "its attention has a window of 8"),
    ],
)
def test_a_student_that_cannot_be_parted_is_named(make: Any, size: int, said: str) -> None:
    with pytest.raises(UserError, match=f"objective.sequence_parallel_size is {size}.*{said}.*Fix"):
        check_parted(make(), size)


def test_a_plain_decoder_can_be() -> None:
    check_parted(tiny.llama(1), 2)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"packing": True, "batch_tokens": 64}, "objective.packing"),
        ({"num_iterations": 2, "estimator": "sampled"}, "objective.num_iterations"),
        ({}, "and 1 processes train"),
    ],
)
def test_what_does_not_go_with_it_is_refused_before_the_first_step(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    args = OPDConfig(output_dir=str(tmp_path), max_steps=1, sequence_parallel_size=2, **settings)
    rows, tokenizer = tiny.rows(4), tiny.tokenizer()
    with pytest.raises(UserError, match=f"objective.sequence_parallel_size is 2.*{said}"):
        OPDTrainer(tiny.llama(1), args, tiny.llama(2), train_dataset=rows, processing_class=tokenizer)


def test_texts_of_several_ranks_keep_what_is_known_of_each_sequence() -> None:
    def text(ids: list[list[int]], logprob: float, reward: float) -> Text:
        input_ids = torch.tensor(ids)
        mask = input_ids > 0
        rollout = Rollout(
            input_ids, mask, mask, torch.where(mask, logprob, 0.0), 3, ("stop",) * len(ids), ("d",) * len(ids)
        )
        return Text(rollout, [Prompt([1], "")] * len(ids), [reward] * len(ids), None, "student")

    found = _joined([text([[1, 2]], -1.0, 0.5), text([[1, 2, 3], [4, 5, 0]], -2.0, 1.0)], pad_id=0)
    assert found.rollout.input_ids.tolist() == [[1, 2, 0], [1, 2, 3], [4, 5, 0]]
    assert found.rollout.attention_mask.tolist() == [[True, True, False], [True] * 3, [True, True, False]]
    assert found.rollout.behavior_logprobs is not None
    assert found.rollout.behavior_logprobs.tolist() == [[-1, -1, 0], [-2, -2, -2], [-2, -2, 0]]
    assert (found.rewards, found.advantages, found.author) == ([0.5, 1.0, 1.0], None, "student")
    assert len(found.prompts) == 3 and found.rollout.domain == ("d",) * 3 and found.rollout.policy_version == 3
