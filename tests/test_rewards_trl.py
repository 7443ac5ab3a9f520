"""The rewards in TRL's own trainer: a step of GRPO on a tiny model that can say one letter only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmdistill.verify.rewards import choice_reward, code_reward, math_reward
from tests.tiny import llama, tokenizer

TESTS = json.dumps({"style": "asserts", "test": "assert double(2) == 4", "entry_point": "double"})


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True], ids=["texts", "conversations"])
def test_rewards_are_what_trl_trains_on(tmp_path: Path, chat: bool) -> None:
    """Every completion is "B": right for one of the two rows, whose means TRL logs; a program it is not.

    The rows without tests have no reward of programs, which TRL leaves out of its mean.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tok = tokenizer()
    (letter,) = tok.encode("B", add_special_tokens=False)
    rows = [
        {"prompt": [{"role": "user", "content": question}] if chat else question, "answer": answer, "tests": tests}
        for question, answer, tests in (("Which?", "B", TESTS), ("And now?", "C", None))
    ]
    config = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        generation_kwargs={"suppress_tokens": [token for token in range(264) if token != letter]},
    )
    rewards = [math_reward, choice_reward, code_reward]
    trainer = GRPOTrainer(llama(0), rewards, args=config, train_dataset=Dataset.from_list(rows), processing_class=tok)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "reward" in entry)
    assert [logged[f"rewards/{reward.__name__}/mean"] for reward in rewards] == [0.5, 0.5, 0.0]
    assert logged["reward"] == pytest.approx(1.0), "the sum of the rewards there are, over the rows"
