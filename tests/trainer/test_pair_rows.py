"""Rows to pairs: template, eos, truncation; and the rows that cannot be trained on."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from llmdistill.errors import UserError
from llmdistill.recipe.data_config import DataConfig
from llmdistill.redi import REDIConfig, REDITrainer
from llmdistill.texts.pairs import collate_pairs, pair_encoder
from llmdistill.training.finite import usable
from tests import tiny
from tests.trainer.pair_cases import assert_same_gradients, by_hand, loss_and_gradients, pair_rows, trainer


def encoder(**settings: Any) -> Any:
    data = settings.pop("data", DataConfig())
    return pair_encoder(tiny.tokenizer(), data, **settings)


ROW = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}


def test_a_pair_is_what_the_template_and_the_eos_make_of_it() -> None:
    tok = tiny.tokenizer()
    chat = {
        "prompt": [{"role": "user", "content": "2+2="}],
        "chosen": [{"role": "assistant", "content": "4"}],
        "rejected": "5 5",
    }
    made = encoder()(chat, 7)
    assert tok.decode(made.prompt.ids) == "<user>2+2=<assistant>"
    assert tok.decode(made.chosen) == "4<eos>" and tok.decode(made.rejected) == "5 5<eos>"
    assert made.row == 7 and made.cut == 0
    assert encoder()(ROW).prompt.ids == tok("2+2=")["input_ids"]
    own = encoder(chosen_column="good", rejected_column="bad", data=DataConfig(prompt_column="q"))
    renamed = own({"q": "2+2=", "good": "4", "bad": "5"})
    assert renamed.chosen == encoder()(ROW).chosen


def test_lengths_are_counted_after_truncation(tmp_path: Path) -> None:
    """|y| divides by what is left: the gradient and the metric are those of the cut text alone."""
    rows = [{"prompt": "ab", "chosen": "cdefghij", "rejected": "xy"}]
    cut = encoder(max_completion_tokens=3).encode_all(rows, "data.train")
    assert [len(cut[0].chosen), len(cut[0].rejected), cut[0].cut] == [3, 3, 1]  # "xy" and its eos fit
    assert cut[0].chosen[-1] != 1 and cut[0].rejected[-1] == 1
    student = tiny.llama(1)
    t = trainer(tmp_path, student, rows=rows, max_completion_tokens=3)
    loss, gradients = loss_and_gradients(t, t.train_dataset)
    student.zero_grad()
    a, b = by_hand(student, cut)
    expected = (-a + 0.8 * b).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-5)  # a difference of two terms near 6
    assert_same_gradients(gradients, {n: p.grad for n, p in student.named_parameters()})


@pytest.mark.parametrize(
    "row,settings,said",
    [
        ({**ROW, "chosen": ""}, {}, "row 1: chosen is empty"),
        ({**ROW, "rejected": None}, {}, "row 1: rejected is empty"),
        ({**ROW, "rejected": " \n"}, {}, "row 1: rejected is empty"),
        ({**ROW, "rejected": [{"role": "assistant", "content": ""}]}, {}, "row 1: rejected is empty"),
        ({**ROW, "rejected": "4"}, {}, "row 1: chosen and rejected are the same text"),
        (
            {**ROW, "chosen": "44445", "rejected": "44446"},
            {"max_completion_tokens": 4},
            "same text, up to objective.max_completion_tokens",
        ),
        ({**ROW, "prompt": "2" * 30}, {"data": DataConfig(max_prompt_tokens=20)}, "row 1: the prompt has 30 tokens"),
        ({**ROW, "rejected": "5" * 40}, {"context": 32}, "row 1: prompt and completion have 45 tokens"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_an_error_or_a_counted_skip(
    row: Any, settings: dict[str, Any], said: str, caplog: Any
) -> None:
    rows = [ROW, row, ROW]
    with pytest.raises(UserError, match="Fix: ") as error:
        encoder(**settings).encode_all(rows, "data.train")
    assert said in str(error.value) and str(error.value).startswith("data.train, row 1")
    of_length = "tokens" in said and "same text" not in said
    other = {"bad_pairs": "skip"} if of_length else {"data": DataConfig(overlong="drop")}
    with pytest.raises(UserError, match="row 1"):  # each setting forgives its own kind of row only
        encoder(**{**settings, **other}).encode_all(rows, "data.train")
    data = settings.get("data", DataConfig())
    forgiving = {"data": DataConfig(max_prompt_tokens=data.max_prompt_tokens, overlong="drop"), "bad_pairs": "skip"}
    made = encoder(**{**settings, **forgiving})
    with caplog.at_level(logging.WARNING, "llmdistill"):
        pairs = made.encode_all(rows, "data.train")
    assert [p.row for p in pairs] == [0, 2]
    assert sum(made.skipped.values()) == 1
    assert any("data.train: 1 of 3 rows skipped" in r.getMessage() for r in caplog.records)
    with pytest.raises(UserError, match="no pair is left"):
        made.encode_all([row, row], "data.train")


@pytest.mark.parametrize("column,setting", [("prompt", "data.prompt_column"), ("chosen", "objective.chosen_column")])
def test_a_missing_column_is_named_with_its_setting(column: str, setting: str) -> None:
    with pytest.raises(UserError, match=f"no column '{column}'.*--{setting}"):
        encoder().encode_all([{k: v for k, v in ROW.items() if k != column}], "data.train")


def test_the_rejected_column_is_asked_of_pairs_and_not_of_positives() -> None:
    rows = [{"prompt": "2+2=", "chosen": "4"}]
    with pytest.raises(UserError, match=r"no column 'rejected' \(it has prompt, chosen\).*--objective.rejected_column"):
        encoder().encode_all(rows, "data.train")
    (positive,) = encoder().encode_all(rows, "objective.positives", positive=True)
    assert positive.rejected == () and len(collate_pairs([positive], 0)) == 1


@pytest.mark.parametrize("prompt", ["2+2=", [{"role": "user", "content": "2+2="}]])
@pytest.mark.parametrize("completion", ["4", [{"role": "assistant", "content": "4"}]])
def test_a_trace_is_a_positive_with_its_completion(prompt: Any, completion: Any) -> None:
    """Rows with prompt and completion, as traces have them, are what fine-tuning takes."""
    row = {"prompt": prompt, "completion": completion}
    (made,) = encoder().encode_all([row], "data.train", positive=True)
    (same,) = encoder().encode_all([{"prompt": prompt, "chosen": completion}], "data.train", positive=True)
    assert (made.prompt.ids, made.chosen, made.rejected) == (same.prompt.ids, same.chosen, ())
    assert tiny.tokenizer().decode(made.chosen) == "4<eos>"


def test_a_tokenizer_without_an_eos_is_refused() -> None:
    tok = tiny.tokenizer()
    tok.eos_token = None
    with pytest.raises(UserError, match="no eos token"):
        pair_encoder(tok, DataConfig())


def test_an_infinite_loss_names_step_rows_and_the_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    """The weights are sound: what is wrong is one row, at the step it comes up."""
    bang = tiny.tokenizer()("!")["input_ids"][0]

    class Break(TrainerCallback):
        """ "!" overflows after step 2; only row 9's rejected side has one."""

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            def overflow(module: Any, given: Any, out: Any) -> Any:
                return out.masked_fill((given[0] == bang)[..., None], math.inf)

            if state.global_step == 2:
                model.get_input_embeddings().register_forward_hook(overflow)

    rows = pair_rows(12)
    rows[9]["rejected"] = "x!x"
    settings = {"max_steps": 9, "save_strategy": "steps", "save_steps": 1}
    t = trainer(tmp_path, tiny.llama(1), rows=rows, callbacks=[Break()], **settings)
    with pytest.raises(UserError) as error:
        t.train()
    step = t.state.global_step
    assert step in (2, 3, 4, 5)  # row 9 comes up once an epoch of three steps
    assert f"at step {step + 1}, on the prompts of rows 9; training cannot go on" in str(error.value)
    assert str(tmp_path / "run" / f"checkpoint-{step}") in str(error.value)


class Destroy(TrainerCallback):
    """What a too large update does: after step 3 one trained weight is no number, or far beyond what a model bears."""

    def __init__(self, value: float) -> None:
        self.value = value

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 3:
            with torch.no_grad():
                model.model.layers[0].mlp.down_proj.weight[0, 0] = self.value


@pytest.mark.parametrize("value", [math.nan, -math.inf, 1e38])
def test_weights_that_an_update_destroyed_are_never_saved(tmp_path: Path, value: float) -> None:
    """They would be the newest checkpoint, and save_total_limit would remove the good one for them."""
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    t = trainer(tmp_path, tiny.llama(1), callbacks=[Destroy(value)], **settings)
    with pytest.raises(UserError) as error:
        t.train()
    good = tmp_path / "run" / "checkpoint-2"
    said = str(error.value)
    assert "the weights are NaN, inf or too large to be squared since the update of step 3; they were not saved" in said
    assert f"The last complete checkpoint is {good}." in said and f"--resume, which goes on from {good}." in said
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    again = trainer(tmp_path, tiny.llama(1), **settings)
    again.train(resume_from_checkpoint=str(good))
    assert again.state.global_step == 6 and usable(again.model)


def test_a_loss_that_destroyed_weights_cause_names_the_update_and_not_only_the_rows(tmp_path: Path) -> None:
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    t = trainer(tmp_path, tiny.llama(1), callbacks=[Destroy(math.nan)], **settings)
    with pytest.raises(
        UserError, match=r"nan at step 4, on the prompts of rows [\d, ]+; the weights .* of step 3"
    ) as e:
        t.train()
    assert f"goes on from {tmp_path / 'run' / 'checkpoint-2'}" in str(e.value)
    assert "look at those rows" not in str(e.value)  # it was not they


def test_the_last_update_is_looked_at_too_and_so_are_weights_that_came_broken(tmp_path: Path) -> None:
    t = trainer(tmp_path, tiny.llama(1), callbacks=[Destroy(math.nan)], max_steps=3)  # nothing is saved in it
    with pytest.raises(UserError, match="since the update of step 3.*none was saved yet.*start again"):
        t.train()
    broken = tiny.llama(1)
    Destroy(math.nan).on_step_end(None, t.state, None, broken)
    with pytest.raises(UserError, match="nan at step 1, .*as they were loaded.*start from other weights"):
        trainer(tmp_path / "broken", broken).train()


def test_a_teacher_is_not_needed_and_not_asked(tmp_path: Path) -> None:
    args = REDIConfig(output_dir=str(tmp_path))
    with pytest.warns(UserWarning, match="not asked"):
        REDITrainer(tiny.llama(1), args, tiny.llama(2), train_dataset=pair_rows(4), processing_class=tiny.tokenizer())
    with pytest.raises(UserError, match="processing_class"):
        REDITrainer(tiny.llama(1), args, train_dataset=pair_rows(4))
